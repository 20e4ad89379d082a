"""A reward of latents is trained on without a single image being decoded.

Kills: a decoder that runs whether or not somebody looks; latents other than those that are decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.toys import TARGETS, TargetReward
from flowrl.train.scoring import RewardSet
from tests.training.test_overlap import trainer_step
from tests.training.toy_run import FLOW, TOKEN, toy_trainer, write_config


class Near:
    """The target's reward on the points themselves, which are the toy's latents."""

    inputs = ("latents", "prompts")
    scope = "sample"
    range = (-float("inf"), 0.0)

    def score(self, *, latents: Tensor, prompts: list[str]) -> Tensor:
        return -(latents - torch.tensor([TARGETS[text] for text in prompts])).norm(dim=1)


@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_is_decoded_for_a_reward_of_latents(tmp_path: Path, parts: int) -> None:
    trainer = toy_trainer(write_config(tmp_path, FLOW), f"scoring.parts={parts}")
    pipeline: Any = trainer.policy.pipeline
    decode, seen = pipeline.decode, []

    def watched(latents: Tensor) -> Tensor:
        seen.append(len(latents))
        return decode(latents)

    pipeline.decode = watched
    trainer.rewards = RewardSet([("near", Near(), 1.0)])
    trainer_step(trainer)
    assert not seen
    trainer.rewards = RewardSet([("near", Near(), 1.0), ("seen", TargetReward(), 0.0)])
    trainer_step(trainer)
    assert sum(seen) == 64


def test_a_reward_of_latents_sees_what_is_decoded(tmp_path: Path) -> None:
    trainer = toy_trainer(write_config(tmp_path, FLOW))
    batch = trainer.sampler(0)
    rollout, _ = trainer.policy.rollout(batch, trainer.method.plan(0))
    torch.testing.assert_close(rollout.images, trainer.policy.pipeline.decode(rollout.latents))
    both = RewardSet([("near", Near(), 1.0), ("seen", TargetReward(), 1.0)])
    scores = both.score(batch, images=rollout.images, latents=rollout.latents.float())
    torch.testing.assert_close(*scores.rewards.values(), atol=0.02, rtol=0)  # the images' grid


def test_tokens_are_what_a_token_rollout_decodes(tmp_path: Path) -> None:
    trainer = toy_trainer(write_config(tmp_path, TOKEN))
    rollout, trajectory = trainer.policy.rollout(trainer.sampler(0), trainer.method.plan(0))
    assert torch.equal(rollout.latents, trajectory.tokens)
