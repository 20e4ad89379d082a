"""LARP's prior on any tokenizer: who learns from it, what its second round reads, its floor."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenizers_vis.addons.prior import ARPrior, code_logits, mixed_inputs
from tokenizers_vis.quantizers.base import straight_through
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.tokenizer import TokenizerOutput
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.training import TokenizerTraining

LARP = {
    "image_size": 16, "patch_size": 8, "num_tokens": 4, "vocab": 16, "code_dim": 4, "dim": 32,
    "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
}  # fmt: skip
FLEXTOK = {
    "image_size": 16, "patch_size": 4, "num_registers": 4, "dim": 32, "num_heads": 2,
    "encoder_depth": 1, "decoder_depth": 1, "levels": (5, 5),
}  # fmt: skip
GRID = {"image_size": 16, "channels": (8, 16), "vocab": 16}
SMALL = {"dim": 32, "depth": 1, "num_heads": 2}


def attached(name="larp", args=LARP, **changes):
    torch.manual_seed(0)
    tokenizer, prior = make_tokenizer(name, args), ARPrior(**{**SMALL, **changes})
    return TokenizerTraining(tokenizer, addons={"prior": prior}), prior


def output_of(tokenizer, ids, mask=None):
    """As if the encoder had given exactly these codes."""
    soft = torch.zeros(*ids.shape, tokenizer.codebooks[0].dim, requires_grad=True)
    embeddings = straight_through(tokenizer.embed(ids), soft)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return TokenizerOutput(Tokens(embeddings, mask, tokenizer.layout, ids), {}), soft


def run(prior, output, *, progress=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return prior(torch.empty(0), output, progress=progress, generator=generator)["prior"]


@pytest.mark.parametrize(
    ("name", "args"), [("larp", LARP), ("flextok", FLEXTOK), ("grid", GRID), ("titok", LARP)]
)
def test_its_gradient_reaches_encoder_and_prior_and_neither_codebook_nor_decoder(name, args):
    # Kills: a table that is not detached; targets or inputs that are.
    training, _ = attached(name, args)
    tokenizer = training.tokenizer
    images = torch.rand(3, *tokenizer.sample_shape)
    output = training(images, progress=0.5, generator=torch.Generator().manual_seed(0))
    output.losses["prior"].value.backward()
    grads = {key: p.grad for key, p in training.named_parameters()}
    reached = {key for key, grad in grads.items() if grad is not None and grad.any()}
    assert any(key.startswith("tokenizer.encoder") for key in reached)
    assert any(key.startswith("tokenizer.quantizer.project") for key in reached)
    assert {key for key in grads if key.startswith("addons")} <= reached
    assert not any(part in key for key in reached for part in ("codes", "table", "decoder"))


def test_it_is_no_part_of_what_is_saved_and_the_tokenizer_no_part_of_it():
    training, prior = attached()
    assert not any("encoder" in key for key in prior.state_dict())
    assert not any("prior" in key for key in training.tokenizer.state_dict())


def test_the_share_of_own_guesses_rises_linearly_to_half_at_three_tenths():
    prior = ARPrior(**SMALL)
    ratios = [prior.mix_ratio(progress) for progress in (0.0, 0.15, 0.3, 1.0)]
    assert ratios == pytest.approx([0.0, 0.25, 0.5, 0.5])
    assert ARPrior(**SMALL, mix_until=0.0).mix_ratio(0.0) == 0.5


def test_a_guess_replaces_the_token_that_it_guesses():
    # Kills: guesses that stand one place late; a first token that is replaced.
    inputs = torch.tensor([[[1.0], [2.0], [3.0]]])  # tokens 1, 2, 3
    guess = torch.tensor([[[20.0], [30.0], [40.0]]])  # of tokens 2, 3, 4
    every = torch.tensor([[True, True, True]])
    second = torch.tensor([[False, True, False]])
    assert mixed_inputs(inputs, guess, every).flatten().tolist() == [1, 20, 30]
    assert mixed_inputs(inputs, guess, second).flatten().tolist() == [1, 2, 30]
    assert mixed_inputs(inputs, guess, ~every).flatten().tolist() == [1, 2, 3]


def test_no_guess_is_read_at_the_start_and_guesses_are_read_later():
    training, prior = attached()
    output, _ = output_of(training.tokenizer, torch.randint(16, (8, 4)))
    losses = {
        progress: [run(prior, output, progress=progress, seed=seed).value for seed in (1, 2)]
        for progress in (0.0, 0.9)
    }
    assert torch.equal(*losses[0.0]) and not torch.equal(*losses[0.9])


def test_a_token_is_predicted_from_those_before_it_alone():
    _, prior = attached()
    table = prior.table(torch.device("cpu"))
    inputs = torch.randn(2, 3, 4, requires_grad=True)
    logits = prior.logits(inputs, table)
    assert logits.shape == (2, 3, 16)
    (seen,) = torch.autograd.grad(logits[:, 1].square().sum(), inputs)
    assert seen.any(2).tolist() == [[True, True, False]] * 2


def test_even_a_perfect_prediction_costs_almost_log_of_the_vocabulary():
    # 256 random unit codes in 8 dimensions, temperature 1: E = log sum exp(cos) - 1. By the
    # isotropic mean E[exp(cos)] = Gamma(4) I_3(1) / (1/2)^3 = 48 * .0221684 = 1.06408 the other
    # 255 codes give log(255 * 1.06408 + e) - 1 = 4.6132; ln 256 = 5.545.
    torch.manual_seed(0)
    table = F.normalize(torch.randn(256, 8), dim=-1)
    logits = code_logits(table, table, 1.0, unit=True)
    perfect = F.cross_entropy(logits, torch.arange(256))
    assert float(perfect) == pytest.approx(4.6132, abs=0.01) and float(perfect) < math.log(256)
    sharp = code_logits(table, table, 0.03, unit=True)
    assert float(F.cross_entropy(sharp, torch.arange(256))) < 0.1


def test_cosines_and_distances_agree_on_unit_codes_and_a_lattice_needs_distances():
    torch.manual_seed(0)
    table, point = F.normalize(torch.randn(9, 4), dim=-1), F.normalize(torch.randn(5, 4), dim=-1)
    cosine = code_logits(point, table, 0.5, unit=True).softmax(-1)
    distance = code_logits(point, table, 0.5, unit=False).softmax(-1)
    assert torch.allclose(cosine, distance, atol=1e-6)
    lattice = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    best = code_logits(lattice, lattice, 0.01, unit=False).argmax(-1)
    assert best.tolist() == [0, 1, 2]
    assert attached()[1].is_unit and not attached("flextok", FLEXTOK)[1].is_unit


def test_tokens_beyond_the_mask_are_not_predicted():
    training, prior = attached(args={**LARP, "nested": True})
    ids = torch.randint(16, (2, 4))
    mask = torch.tensor([[True, True, False, False]] * 2)
    output, soft = output_of(training.tokenizer, ids, mask)
    run(prior, output, progress=0.0).value.backward()
    assert soft.grad.any(2).tolist() == [[True, False, False, False]] * 2


def test_it_learns_what_follows_what():
    # id_{i+1} = 3 id_i + 1 mod 16: certain once the first token is known. Kills: targets that are
    # not shifted against the inputs.
    training, prior = attached(temperature=0.05, mix=0.5)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        ids = [torch.randint(16, (64,), generator=generator)]
        while len(ids) < 4:
            ids.append((3 * ids[-1] + 1) % 16)
        output, _ = output_of(training.tokenizer, torch.stack(ids, 1))
        loss = prior(torch.empty(0), output, progress=1.0, generator=generator)["prior"]
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert float(loss.value.detach()) < 0.25 < math.log(16)
    tokens = output.tokens
    predicted = prior.logits(tokens.embeddings[:, :-1], prior.table(torch.device("cpu"))).argmax(-1)
    assert (predicted == tokens.ids[:, 1:]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("grid", {**GRID, "quantizer": "kl"}, "one codebook of single ids"),
        ("grid", {**GRID, "quantizer": "binary", "num_bits": 8, "group_bits": 4}, "single ids"),
        ("larp", {**LARP, "num_tokens": 1}, "two tokens"),
    ],
)
def test_a_tokenizer_that_it_cannot_serve_is_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        attached(name, args)
