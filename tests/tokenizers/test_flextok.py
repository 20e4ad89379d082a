"""FlexTok's mechanism: causal registers, prefixes, dropout, guidance, the velocity."""

import pytest
import torch

from tests.tokenizers.test_contract import FLEXTOK, VAE, samples
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


class Oracle(torch.nn.Module):
    """In place of the decoder's last layer: says these clean patches, and counts."""

    def __init__(self, clean):
        super().__init__()
        self.clean, self.out_features, self.calls = clean, clean.shape[-1], 0

    def forward(self, x):
        self.calls += 1
        return self.clean


@pytest.mark.parametrize("compare", ["velocity", "clean"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_the_loss_is_that_of_the_velocity(compare, mean):
    """A decoder that outputs the clean patches has no loss; one that outputs 0 has E|x0 / s|^2, or
    E|x0|^2 where the clean image is compared. Mutation: the weight forgotten; the mean of s."""
    tokenizer = opened(compare=compare, sigma_mean=mean, min_sigma=1e-6)
    images = samples(tokenizer)
    clean = tokenizer.patches(images)
    sigma = torch.sigmoid(torch.randn(3, generator=torch.Generator().manual_seed(0)) + mean)
    level = sigma if compare == "velocity" else torch.ones(3)
    by_hand = (clean / level[:, None, None]).square().mean()
    for said, expected in ((clean, 0.0), (torch.zeros_like(clean), float(by_hand))):
        tokenizer.patch_out = Oracle(said)
        generator = torch.Generator().manual_seed(0)
        loss = tokenizer(images, generator=generator).losses["flow"].value
        assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 1), (3.0, 2)])
def test_euler_ends_at_what_the_decoder_says(scale, calls):
    """x' = x0 + (s' / s) (x - x0): with an exact prediction any number of steps ends there.

    Mutations: noise levels that rise; a step's sign; a last level above 0; noise as the prediction.
    """
    tokenizer = opened(min_sigma=1e-6)
    images = samples(tokenizer)
    tokens = tokenizer.encode(images)
    for num_steps in (1, 3):
        tokenizer.patch_out = oracle = Oracle(tokenizer.patches(images))
        with torch.no_grad():
            drawn = tokenizer.decode(tokens, solver=Solver(num_steps, scale))
        torch.testing.assert_close(drawn, images, atol=1e-4, rtol=0)
        assert oracle.calls == calls * num_steps


@pytest.mark.parametrize(("rate", "listens"), [(0.0, True), (1.0, False)])
def test_a_hidden_image_teaches_its_registers_nothing(rate, listens):
    """Mutation: the share of hidden images is not what `null_rate` says."""
    tokenizer = opened(null_rate=rate)
    loss = tokenizer(samples(tokenizer), generator=torch.Generator().manual_seed(0)).loss
    (gradient,) = torch.autograd.grad(loss, tokenizer.registers, allow_unused=True)
    assert bool(gradient is not None and gradient.any()) == listens


def test_registers_are_modulated_in_their_own_way():
    tokenizer = opened()
    assert tokenizer.kind.tolist() == [0] * tokenizer.num_patches + [1] * 4


def test_latents_are_scaled_and_shifted_and_back():
    """diffusers' own: (mean - shift) * scale; the images are [-1, 1]. Mutation: one of the four."""
    stage0 = opened(patch_size=2, autoencoder=VAE).stage0
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    vae = stage0.vae
    with torch.no_grad():
        latents = stage0.encode(images)
        mean = vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(latents, (mean - 0.1) * 1.1)
        expected = (vae.decode(mean).sample + 1) / 2
        torch.testing.assert_close(stage0.decode(latents), expected, atol=1e-5, rtol=0)
    assert not any(each.requires_grad for each in vae.parameters())
    assert not stage0.train().vae.training and stage0.shape == (4, 8, 8)


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
