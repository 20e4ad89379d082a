"""The adversary as an add-on: both games by hand, who learns from which, and that it pulls."""

import math

import pytest
import torch

from tokenizers_vis.addons.adversarial import (
    Adversarial,
    fooling_loss,
    lecam_penalty,
    telling_loss,
)
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.tokenizer import TokenizerOutput
from tokenizers_vis.tokens import Tokens, register_layout
from tokenizers_vis.training import TokenizerTraining

LARP = {
    "image_size": 16, "patch_size": 8, "num_tokens": 4, "vocab": 16, "code_dim": 4, "dim": 32,
    "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
}  # fmt: skip
GRID = {"image_size": 16, "channels": (8, 16), "vocab": 16}
CLIP = {**LARP, "num_frames": 4, "patch_frames": 2}
JUDGE = {"channels": (8, 16), "dim": 32, "depth": 1, "num_heads": 2}
CASES = [("grid", GRID), ("larp", CLIP)]
NETWORKS = [("patch", {}), ("transformer", {"patch_size": 8})]


def attached(name="grid", args=GRID, **changes):
    torch.manual_seed(0)
    addon = Adversarial(**{**JUDGE, **changes})
    return TokenizerTraining(make_tokenizer(name, args), addons={"adversary": addon}), addon


def output_of(images):
    """With these pictures as the reconstruction."""
    tokens = Tokens(
        torch.zeros(len(images), 1, 1),
        torch.ones(len(images), 1, dtype=torch.bool),
        register_layout(1, nested=False),
    )
    return TokenizerOutput(tokens, {}, images)


def test_the_losses_of_both_games():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    # hinge: (mean(0, .5) + mean(0, 1)) / 2 = (.25 + .5) / 2; fooling: -mean(-3, 0)
    assert telling_loss(real, fake, "hinge") == pytest.approx(0.375)
    assert fooling_loss(fake, "hinge") == pytest.approx(1.5)
    # softplus(-2) = .126928, softplus(-.5) = .474077; softplus(-3) = .048587, softplus(0) = ln 2
    expected = (0.126928 + 0.474077) / 2 + (0.048587 + math.log(2)) / 2
    assert telling_loss(real, fake, "non_saturating") == pytest.approx(expected, abs=1e-5)
    # softplus(3) = 3.048587. Kills the saturating loss, -softplus(fake).
    assert fooling_loss(fake, "non_saturating") == pytest.approx(
        (3.048587 + math.log(2)) / 2, abs=1e-5
    )


def test_lecam_pulls_each_score_to_the_others_mean():
    # (2 - (-1))^2 = 9, (.5 + 1)^2 = 2.25 -> 5.625; (-3 - 1)^2 = 16, (0 - 1)^2 = 1 -> 8.5
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    penalty = lecam_penalty(real, fake, torch.tensor(1.0), torch.tensor(-1.0))
    assert penalty == pytest.approx(14.125)


def test_lecams_means_are_those_of_the_first_batch_after_one_batch():
    # Kills: means that start at zero uncorrected, which would be a pull to zero.
    training, addon = attached(lecam=0.5)
    images = torch.rand(4, 3, 16, 16)
    output = training.tokenizer(images)
    with torch.no_grad():
        real = addon.adversary(images)
        fake = addon.adversary(output.reconstruction)
    plain = telling_loss(real, fake, "hinge")
    expected = plain + 0.5 * lecam_penalty(real, fake, real.mean(), fake.mean())
    found = addon.adversary_loss(images, output, progress=0.0)
    assert torch.allclose(found, expected, atol=1e-5)
    assert {"means", "num_seen"} <= addon.state_dict().keys()


@pytest.mark.parametrize(("network", "more"), NETWORKS)
@pytest.mark.parametrize(("name", "args"), CASES)
def test_each_side_learns_from_its_own_loss_alone(name, args, network, more):
    # Kills: weights of the adversary that are not held constant; a reconstruction not detached.
    training, addon = attached(name, args, network=network, **more)
    images = torch.rand(3, *training.tokenizer.sample_shape)
    output = training(images, progress=0.5, generator=torch.Generator().manual_seed(0))
    output.losses["adversarial"].value.backward(retain_graph=True)
    assert all(p.grad is None for p in addon.adversary.parameters())
    assert any(p.grad is not None and p.grad.any() for p in training.tokenizer.decoder.parameters())
    training.zero_grad()
    addon.adversary_loss(images, output, progress=0.5).backward()
    assert all(p.grad is not None for p in addon.adversary.parameters())
    assert all(p.grad is None for p in training.tokenizer.parameters())
    assert training.adversaries == {"adversary": addon}


def test_both_sides_rest_before_the_start():
    training, addon = attached(start=0.25)
    images = torch.rand(2, 3, 16, 16)
    early = training(images, progress=0.24)
    assert "adversarial" not in early.losses
    assert addon.adversary_loss(images, early, progress=0.24) is None
    late = training(images, progress=0.25)
    assert "adversarial" in late.losses
    assert addon.adversary_loss(images, late, progress=0.25) is not None


@pytest.mark.parametrize("game", ["hinge", "non_saturating"])
@pytest.mark.parametrize(("network", "more"), NETWORKS)
def test_the_game_pulls_reconstructions_towards_the_samples(game, network, more):
    # Samples are bright, the reconstruction starts at grey. Kills: a sign of either loss.
    _, addon = attached(game=game, network=network, lecam=0.01, **more)
    level = torch.zeros(1, requires_grad=True)
    ours = torch.optim.Adam([level], lr=0.03)
    theirs = torch.optim.Adam(addon.adversary.parameters(), lr=1e-3, betas=(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        images = 0.8 + 0.05 * torch.randn(4, 3, 16, 16, generator=generator)
        noise = 0.05 * torch.randn(4, 3, 16, 16, generator=generator)
        output = output_of(torch.sigmoid(level) + noise)
        losses = addon(images, output, progress=1.0, generator=generator)
        ours.zero_grad()
        losses["adversarial"].value.backward()
        ours.step()
        theirs.zero_grad()
        addon.adversary_loss(images, output, progress=1.0).backward()
        theirs.step()
    assert float(torch.sigmoid(level.detach())) > 0.62


def test_a_sampling_decoder_and_unknown_names_are_refused():
    flextok = {
        "image_size": 16, "patch_size": 4, "num_registers": 4, "dim": 32, "num_heads": 2,
        "encoder_depth": 1, "decoder_depth": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="flextok"):
        attached("flextok", flextok)
    with pytest.raises(ValueError, match="hinge, non_saturating"):
        Adversarial(game="wasserstein")
    with pytest.raises(ValueError, match="patch"):
        Adversarial(network="pixel")
