"""FlexTok's mechanism: causal registers, prefixes, dropout, guidance, the velocity."""

import dataclasses

import pytest
import torch

from tests.tokenizers.test_contract import FLEXTOK, samples
from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.tokenizer import Solver


def opened(**args):
    """A FlexTok whose decoder listens: its gates begin at zero."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("flextok", {**FLEXTOK, **args}).eval()
    for block in tokenizer.decoder.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.3)
    return tokenizer


@pytest.mark.parametrize(("is_causal", "untouched"), [(True, [0, 1]), (False, [])])
def test_a_register_sees_those_before_it(is_causal, untouched):
    """Exact: what register 2 starts from changes 2 and 3 alone. Mutation: `tril` left out."""
    tokenizer = opened(is_causal=is_causal)
    images = samples(tokenizer)
    with torch.no_grad():
        before = tokenizer.encode(images).features
        tokenizer.registers[2] += 1.0
        after = tokenizer.encode(images).features
    same = [i for i in range(4) if torch.equal(before[:, i], after[:, i])]
    assert same == untouched


def test_patches_do_not_see_registers():
    tokenizer = opened()
    mask = tokenizer.encoder_mask
    num = tokenizer.num_patches
    assert not mask[:num, num:].any() and mask[:, :num].all()


def test_more_tokens_give_another_image_of_the_same_noise():
    tokenizer = opened()
    images = samples(tokenizer)
    with torch.no_grad():
        drawn = [tokenizer.decode(tokenizer.encode(images, k), solver=Solver(2)) for k in (1, 4)]
        again = tokenizer.decode(tokenizer.encode(images, 4), solver=Solver(2))
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], again)


def test_the_loss_is_that_of_the_velocity():
    """A decoder that outputs the clean patches has no loss; one that outputs 0 has E|x0 / s|^2."""
    tokenizer = opened()
    images = samples(tokenizer)
    clean = tokenizer.patches(images)

    class Oracle(torch.nn.Module):
        out_features = clean.shape[-1]

        def forward(self, x):
            return clean

    tokenizer.patch_out = Oracle()
    generator = torch.Generator().manual_seed(0)
    tokenizer.config = dataclasses.replace(tokenizer.config, min_sigma=1e-6)
    loss = tokenizer(images, generator=generator).losses["flow"].value
    assert float(loss) < 1e-8


def test_guidance_moves_away_from_no_tokens():
    tokenizer = opened()
    tokens = tokenizer.encode(samples(tokenizer))
    x = torch.randn(3, tokenizer.num_patches, tokenizer.patch_out.out_features)
    sigma = torch.tensor(0.5)
    everyone = torch.ones(3, dtype=torch.bool)
    plain = tokenizer.velocity(x, sigma.expand(3), tokens, is_null=everyone)
    conditional = tokenizer.velocity(x, sigma.expand(3), tokens)
    guided = tokenizer._guided(x, sigma, tokens, 3.0)
    torch.testing.assert_close(guided, plain + 3 * (conditional - plain))
    assert not torch.allclose(plain, conditional)


def test_hidden_registers_hide_what_they_say():
    """The null is one vector: tokens of other images change nothing."""
    tokenizer = opened()
    tokens = tokenizer.encode(samples(tokenizer))
    x = torch.randn(3, tokenizer.num_patches, tokenizer.patch_out.out_features)
    everyone = torch.ones(3, dtype=torch.bool)
    one = tokenizer.velocity(x, torch.full((3,), 0.5), tokens, is_null=everyone)
    other = tokenizer.velocity(
        x, torch.full((3,), 0.5), tokens.select(torch.tensor([2, 0, 1])), is_null=everyone
    )
    assert torch.equal(one, other)


def test_a_patch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="patch_size 5"):
        make_tokenizer("flextok", {**FLEXTOK, "patch_size": 5})


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("uniform", {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
        ("pow2", {1: 1 / 3, 2: 1 / 3, 4: 1 / 3}),
        ("pow2_ceil", {1: 0.25, 2: 0.25, 4: 0.5}),
    ],
)
def test_dropout_draws_the_law_it_names(mode, expected):
    drawn = TokenDropout(mode).draw(20_000, (1, 2, 3, 4), torch.Generator().manual_seed(0))
    shares = {int(k): float((drawn == k).float().mean()) for k in drawn.unique()}
    assert shares.keys() == expected.keys()
    for count, share in expected.items():
        assert shares[count] == pytest.approx(share, abs=0.015)


def test_dropout_keeps_all_where_it_should_and_refuses_a_fixed_length():
    generator = torch.Generator().manual_seed(0)
    drawn = TokenDropout("uniform", full=0.5).draw(20_000, tuple(range(1, 33)), generator)
    assert float((drawn == 32).float().mean()) == pytest.approx(0.5 + 0.5 / 32, abs=0.015)
    with pytest.raises(ValueError, match="several counts"):
        TokenDropout().draw(2, (64,))
