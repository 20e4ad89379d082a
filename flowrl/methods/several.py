"""Several rewards with one clipped loss each, for methods that clip the ratio of chains or tokens.

Where rewards disagree about a sample, their advantages cancel in a sum before the clip acts;
clipped one by one, each is stopped, or pulls back, by itself. Two numbers per sample are enough for
that, see `functional.surrogates.ppo_clip_each`. Reading order: `combine`, `separate_rewards`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from flowrl.functional.advantages import group_normalized, signed_sums
from flowrl.methods.objectives import Normalize
from flowrl.methods.spec import Method
from flowrl.types import Scores, Tree

RewardLosses = Literal["summed", "separate"]

DANCE: Normalize = partial(group_normalized, eps=1e-8, ddof=1)
"""How DanceGRPO's code and its kin normalise one reward."""


def combine(
    method: Method, reward_losses: RewardLosses, *, normalize: Normalize, clip: float
) -> Method:
    """The method as it is ("summed"), or with one clipped loss per reward ("separate").

    Args:
        method: with an objective that takes a negative_advantage.
        reward_losses: which.
        normalize: (reward, group_id, valid) -> advantage of one reward, for "separate".
        clip: to which each of these advantages is clamped.

    Raises:
        ValueError: another name.
    """
    numbers = method.numbers | {"losses of several rewards": reward_losses}
    if reward_losses == "summed":
        return replace(method, numbers=numbers)
    if reward_losses != "separate":
        raise ValueError(f"reward_losses must be 'summed' or 'separate', got {reward_losses!r}")
    return replace(
        method,
        advantage=partial(separate_rewards, normalize=normalize, clip=clip),
        negative_advantage=partial(blaming_rewards, normalize=normalize, clip=clip),
        numbers=numbers,
    )


def separate_rewards(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None = None,
    *,
    normalize: Normalize,
    clip: float,
) -> Tensor:
    """Advantage [N]: every reward's own, clamped to +-clip, then their weighted sum.

    The tree is not read.
    """
    return _sums(scores, group_id, normalize, clip)[0]


def blaming_rewards(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None = None,
    *,
    normalize: Normalize,
    clip: float,
) -> Tensor:
    """Of `separate_rewards`, the sum [N] of the negative terms alone. The tree is not read."""
    return _sums(scores, group_id, normalize, clip)[1]


def _sums(
    scores: Scores, group_id: Tensor, normalize: Normalize, clip: float
) -> tuple[Tensor, Tensor]:
    return signed_sums(
        scores.trained,
        group_id,
        scores.valid,
        weights=scores.weights,
        normalize=normalize,
        limit=clip,
    )
