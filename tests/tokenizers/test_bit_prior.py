"""The generative-aware prior: causal, taught and teaching, for tokens of bits alone."""

import pytest
import torch

from tokenizers_vis.addons.bit_prior import BitPredictor, BitPrior
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.tokens import Tokens, grid_layout, register_layout
from tokenizers_vis.training import TokenizerTraining

SMALL = {"image_size": 16, "channels": (8, 16)}
BITS = {"num_bits": 8, "group_bits": 4}
TINY = {"dim": 16, "depth": 1, "num_heads": 2, "head_dim": 16, "head_depth": 1}


def tokens_of(bits, layout, mask=None):
    kept = torch.ones(bits.shape[:2], dtype=torch.bool) if mask is None else mask
    return Tokens(bits, kept, layout)


def bits_like(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1


def loosened(predictor):
    """AdaLN and the last layer start at zero and let nothing through; these do."""
    for layer in (predictor.head.out, predictor.head.last_modulation):
        torch.nn.init.normal_(layer.weight)
    return predictor


@pytest.mark.parametrize("layout", [grid_layout(2, 3), register_layout(6, nested=True)])
def test_a_token_is_predicted_from_those_before_it_alone(layout):
    """Mutation: the bits are not shifted, so that a token sees itself."""
    torch.manual_seed(0)
    predictor = BitPredictor(4, **TINY)
    bits = bits_like(1, 6, 4)
    plain = predictor.conditions(bits, layout)
    for place in range(6):
        other = bits.clone()
        other[:, place] *= -1
        change = (predictor.conditions(other, layout) - plain).abs().amax((0, 2)) > 0
        assert change.tolist() == [later > place for later in range(6)]


def test_the_order_is_known_without_places():
    """Registers have no coordinates: the same bits elsewhere in the past are another past."""
    torch.manual_seed(0)
    predictor = BitPredictor(4, **TINY)
    layout = register_layout(6, nested=True)
    bits = bits_like(1, 6, 4)
    swapped = bits[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.equal(bits, swapped)
    last = [predictor.conditions(each, layout)[:, -1].detach() for each in (bits, swapped)]
    assert float((last[0] - last[1]).abs().max()) > 1e-4


def test_the_gradient_reaches_bits_as_target_and_as_past():
    """The last token is only a target; the first also a past. Mutation: detached embeddings."""
    torch.manual_seed(0)
    predictor = loosened(BitPredictor(4, **TINY))
    bits = bits_like(1, 6, 4).requires_grad_()
    layout = grid_layout(2, 3)
    generator = torch.Generator().manual_seed(0)
    predictor.loss(tokens_of(bits, layout), generator=generator).backward()
    assert bool((bits.grad.abs().sum(-1) > 0).all())
    # As a past alone: where only the last token is a target, the others are what it is told from.
    past = bits_like(1, 6, 4).requires_grad_()
    only_last = torch.arange(6)[None] == 5
    predictor.loss(tokens_of(past, layout, only_last), generator=generator).backward()
    assert bool((past.grad.abs().sum(-1) > 0).all())


def test_dropped_tokens_count_neither_as_target_nor_as_past():
    torch.manual_seed(0)
    predictor = loosened(BitPredictor(4, **TINY))
    bits = bits_like(2, 6, 4).requires_grad_()
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    loss = predictor.loss(tokens_of(bits, register_layout(6, nested=True), mask),
                          generator=torch.Generator().manual_seed(0))  # fmt: skip
    loss.backward()
    assert torch.equal(bits.grad.abs().sum(-1) > 0, mask)


CASES = {
    "uniwetok": ("uniwetok", {**SMALL, **BITS, "num_heads": 2}),
    "bitdance": ("bitdance", {**SMALL, **BITS}),
    "lfq": ("grid", {**SMALL, **BITS, "quantizer": "lfq"}),
}


@pytest.mark.parametrize("case", CASES)
def test_its_loss_reaches_the_encoder_of_any_tokenizer_of_bits(case):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(*CASES[case])
    prior = BitPrior(weight=0.3, **TINY)
    training = TokenizerTraining(tokenizer, addons={"prior": prior})
    loosened(prior.predictor)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    output = training(images, progress=0.5, generator=torch.Generator().manual_seed(0))
    term = output.losses["bit_prior"]
    assert term.weight == 0.3
    encoder = list(tokenizer.encoder.parameters())
    found = torch.autograd.grad(term.value, encoder, allow_unused=True)
    assert all(each is not None and bool(each.any()) for each in found)


def test_the_trunk_reads_bits_of_which_some_are_turned():
    """Its share is the add-on's `flip`. Mutation: another share, or turned targets."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(*CASES["bitdance"])
    prior = BitPrior(flip=1.0, **TINY)
    prior.attach(tokenizer)
    loosened(prior.predictor)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    output = tokenizer(images)

    def seeded():
        return torch.Generator().manual_seed(0)

    found = prior(images, output, progress=0.5, generator=seeded())["bit_prior"].value
    turned = prior.predictor.loss(output.tokens, flip=1.0, generator=seeded())
    seen = []
    prior.predictor.conditions = lambda bits, layout: seen.append(bits) or torch.zeros(2, 16, 16)
    prior(images, output, progress=0.5, generator=seeded())
    assert torch.equal(found, turned) and torch.equal(seen[0], -output.tokens.embeddings)


def test_tokens_that_are_no_bits_are_refused():
    for args in ({"vocab": 16}, {"quantizer": "kl", "dim": 4}):
        tokenizer = make_tokenizer("grid", {**SMALL, **args})
        with pytest.raises(ValueError, match="needs tokens of bits"):
            TokenizerTraining(tokenizer, addons={"prior": BitPrior(**TINY)})


def test_the_predictor_learns_what_the_past_tells():
    """Token 2 repeats token 1: the copy becomes predictable, the original stays a coin."""
    torch.manual_seed(0)
    predictor = BitPredictor(3, **TINY)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    layout = grid_layout(1, 2)

    def drawn(num):
        first = torch.randint(0, 2, (num, 1, 3), generator=generator) * 2.0 - 1
        return first.expand(-1, 2, -1)

    for _ in range(150):
        loss = predictor.loss(tokens_of(drawn(64), layout), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = drawn(256)
    with torch.no_grad():
        known = predictor.conditions(bits, layout)
        values = predictor.head.loss(bits, known, repeats=8, generator=generator).mean(0)
    assert float(values[1]) < 0.3 * float(values[0])
