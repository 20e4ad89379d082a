"""Which rewards have a gradient: those that say so, and no others.

Kills, among others: a declaration that is copied with a class; a `no_grad` that comes back; a
gradient that is NaN where an image is plain.
"""

from __future__ import annotations

import pytest
import torch

import rewards
from flowrl.testing import check_reward
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt, PromptBatch
from rewards.base import is_differentiable
from rewards.registry import find

# The others round to 8 bit, go through PIL or ask another process; see docs/rewards.md.
DECLARED = ("shapes_proxy", "brightness", "colourfulness")


def test_these_declare_a_gradient_and_no_others() -> None:
    assert tuple(name for name in rewards.NAMES if is_differentiable(find(name)[0])) == DECLARED


@pytest.mark.parametrize("name", DECLARED)
def test_the_gradient_is_that_of_the_score(name: str) -> None:
    check_reward(rewards.load(name), tolerance=1e-3)


def scores(name: str, images: torch.Tensor) -> torch.Tensor:
    reward = rewards.load(name)
    given = {"images": images, "prompts": ["a photo of a red star"] * len(images)}
    found = reward.score(**{key: given[key] for key in reward.inputs})
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("name", DECLARED)
def test_it_agrees_with_a_difference_and_stays_in_its_own_sample(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 64, generator=generator).requires_grad_()
    found = scores(name, images)
    (gradient,) = torch.autograd.grad(found[1], images)
    assert not gradient[0].any() and not gradient[2].any()
    # Along the gradient, and along a random direction: central differences.
    for direction in (
        gradient[1] / gradient[1].norm(),
        torch.randn(3, 64, 64, generator=generator),
    ):
        step = 0.02 * direction / direction.norm()
        with torch.no_grad():
            up, down = (scores(name, (images + s * step)[1:2])[0].double() for s in (1, -1))
        expected = float((gradient[1] * step).sum())
        scale = float(gradient[1].norm() * step.norm())
        assert float(up - down) / 2 == pytest.approx(expected, abs=0.02 * scale)


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_it_is_finite_for_an_image_without_contrast(name: str, level: float) -> None:
    images = torch.full((2, 3, 64, 64), level, requires_grad=True)
    scores(name, images).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()


def test_training_asks_for_no_gradient() -> None:
    seen = []

    class Watched(type(rewards.load("shapes_proxy"))):  # type: ignore[misc]
        def score(self, **inputs: object) -> torch.Tensor:
            seen.append(torch.is_grad_enabled())
            found: torch.Tensor = super().score(**inputs)
            return found

    batch = PromptBatch((Prompt("a red star"),) * 2, *[torch.zeros(2).long()] * 4, seed=0)
    set_ = RewardSet([("proxy", Watched(), 1.0)])
    assert not set_.score(batch, images=torch.rand(2, 3, 64, 64)).rewards["proxy"].requires_grad
    assert seen == [False]
