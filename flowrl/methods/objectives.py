"""The ratio objective and the combinations of rewards: what all GRPO methods share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flowrl.functional.advantages import (
    clip_advantages,
    gdpo,
    global_std_normalized,
    group_centered,
    group_normalized,
    leave_one_out,
    sum_of_normalized,
    weighted_sum,
)
from flowrl.functional.ratios import log_ratio, ratio_norm
from flowrl.functional.regularizers import gaussian_kl, gaussian_kl_without_dt, k3
from flowrl.functional.selection import best_of_n
from flowrl.functional.surrogates import dppo, dppo_keep, ppo_clip, ppo_clip_each
from flowrl.methods.spec import Loss, Needs, require_positive
from flowrl.types import Chunk, Decisions, Evaluation, Scores, Tree

AdvantageStd = Literal["group", "global", "none", "leave_one_out"]
KLName = Literal["paper", "code"]

Normalize = Callable[[Tensor, Tensor, Tensor | None], Tensor]

NORMALIZERS: dict[AdvantageStd, Normalize] = {
    "group": partial(group_normalized, eps=1e-4, ddof=0),
    "global": partial(global_std_normalized, eps=1e-4, ddof=0),
    "none": group_centered,
    "leave_one_out": leave_one_out,
}
"""How Flow-GRPO's code and its kin turn rewards into advantages, by the std that they divide by."""

COMPARES: dict[AdvantageStd, Literal["group", "rollout"]] = {
    "group": "group",
    "global": "rollout",
    "none": "group",
    "leave_one_out": "group",
}
"""Whose scores such an advantage depends on."""


def summed_rewards(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None = None,
    *,
    normalize: Normalize,
    clip: float,
    scale: float = 1.0,
) -> Tensor:
    """Advantage [N] of the weighted sum of raw rewards, clamped to +-clip and then times `scale`.

    The tree is not read.
    """
    total = weighted_sum(scores.trained, scores.weights)
    return scale * clip_advantages(normalize(total, group_id, scores.valid), clip)


def selected_samples(
    scores: Scores, group_id: Tensor, tree: Tree | None = None, *, select: Normalize
) -> Tensor:
    """Weight or sign [N] of each sample by the weighted sum of raw rewards; 0 = not chosen.

    `select` is of `functional.selection`; the tree is not read.
    """
    total = weighted_sum(scores.trained, scores.weights)
    return select(total, group_id, scores.valid)


def first_of_pairs(scores: Scores, group_id: Tensor, tree: Tree | None = None) -> Tensor:
    """Sign [N] of a data set's pairs: 1 for the first of every group, which was chosen, else -1.

    The samples of a group stand together in the order of `Prompt.images`; nothing else is read.
    """
    is_first = torch.ones_like(group_id, dtype=torch.bool)
    is_first[1:] = group_id[1:] != group_id[:-1]
    return torch.where(is_first, 1.0, -1.0)


def chosen(advantages: Tensor, group_id: Tensor, tree: Tree | None) -> Tensor:
    """Bool [N]: the samples with an advantage, for `prune`: the mean is over them alone."""
    return advantages != 0


def extreme_samples(advantages: Tensor, group_id: Tensor, tree: Tree | None, *, num: int) -> Tensor:
    """Bool [N], for `prune`: the `num` best and the `num` worst samples of a group."""
    return best_of_n(advantages, group_id, top=num, bottom=num)


def normalized_rewards(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None = None,
    *,
    eps: float,
    ddof: int,
    clip: float,
) -> Tensor:
    """Advantage [N]: every reward normalised in its group, then their weighted sum, clamped.

    The tree is not read.
    """
    total = sum_of_normalized(
        scores.trained, group_id, scores.valid, weights=scores.weights, eps=eps, ddof=ddof
    )
    return clip_advantages(total, clip)


def decoupled_rewards(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None = None,
    *,
    eps: float,
    ddof: int,
    clip: float,
) -> Tensor:
    """Advantage [N]: `normalized_rewards` over their std in the whole rollout, clamped (GDPO).

    The tree is not read.
    """
    total = gdpo(scores.trained, group_id, scores.valid, weights=scores.weights, eps=eps, ddof=ddof)
    return clip_advantages(total, clip)


def transition_kl(new: Evaluation, reference: Evaluation, chunk: Chunk) -> Tensor:
    """Closed-form KL(current to reference) of the Gaussian transitions [E]."""
    mean, reference_mean, std = _transitions(new, reference)
    return gaussian_kl(mean, reference_mean, std)


def transition_kl_of_published_code(new: Evaluation, reference: Evaluation, chunk: Chunk) -> Tensor:
    """The KL of Flow-GRPO's code [E]: `transition_kl` times -dt; the published coefficients'."""
    mean, reference_mean, std = _transitions(new, reference)
    dt = chunk.decisions.sigma_next - chunk.decisions.sigma
    return gaussian_kl_without_dt(mean, reference_mean, std, dt.to(mean.device))


def token_kl(new: Evaluation, reference: Evaluation, chunk: Chunk) -> Tensor:
    """Schulman's k3 of the token log-probs, as old_log_prob."""
    return k3(new.log_prob, reference.log_prob)


def _transitions(new: Evaluation, reference: Evaluation) -> tuple[Tensor, Tensor, Tensor]:
    if new.transition_mean is None or new.transition_std is None:
        raise ValueError("a transition KL needs a flow policy; use token_kl for tokens")
    assert reference.transition_mean is not None
    return new.transition_mean, reference.transition_mean, new.transition_std


def _behaviour(new: Evaluation, data: Decisions) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, mean under the behaviour policy, their std) of transitions."""
    if new.transition_mean is None or new.transition_std is None or data.old_mean is None:
        raise ValueError("the objective compares transition means; its plan must set store_mean")
    return new.transition_mean, data.old_mean, new.transition_std


def density_log_ratio(new: Evaluation, data: Decisions) -> Tensor:
    """log_prob - old_log_prob, 0 where masked."""
    return log_ratio(new.log_prob, data.old_log_prob, data.mask)


def normalized_log_ratio(new: Evaluation, data: Decisions) -> Tensor:
    """Guard's log-ratio [E], centred and as wide at every step; 0 where masked.

    Raises:
        ValueError: tokens, or a plan without store_mean.
    """
    return ratio_norm(density_log_ratio(new, data), *_behaviour(new, data), data.mask)


KLS = {"paper": transition_kl, "code": transition_kl_of_published_code}


@dataclass(frozen=True)
class ClippedRatio:
    """PPO's clipped surrogate with an optional KL to the reference, as a loss per decision.

    A chunk with a negative_advantage has one surrogate per reward, and their sum is taken.

    Attributes:
        clip_low, clip_high: distances of the clip bounds from 1.
        kl: (new, reference, chunk) -> per decision; called only if kl_coef > 0.
        kl_coef: its coefficient.
        log_ratio: (new, decisions) -> logarithm of the ratio that is clipped, per decision.

    Raises:
        ValueError: a clip distance that is not positive, or a negative kl_coef.
    """

    clip_low: float
    clip_high: float
    kl: Callable[[Evaluation, Evaluation, Chunk], Tensor]
    kl_coef: float = 0.0
    log_ratio: Callable[[Evaluation, Decisions], Tensor] = density_log_ratio

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}; 0 = no KL")

    @property
    def needs(self) -> Needs:
        """The reference, and all decisions, if there is a KL."""
        has_kl = self.kl_coef > 0
        return Needs(
            sets=("reference",) if has_kl else (),
            advantage=not has_kl,
            ratio_clip=min(self.clip_low, self.clip_high),
            negative_advantage=True,
        )

    def __call__(
        self, new: Evaluation, old: Evaluation | None, reference: Evaluation | None, chunk: Chunk
    ) -> Loss:
        change = self.log_ratio(new, chunk.decisions)
        ratio = torch.exp(change)
        advantage, negative = chunk.advantage, chunk.negative_advantage
        if negative is None:
            values = -ppo_clip(ratio, advantage, self.clip_low, self.clip_high)
        else:
            values = -ppo_clip_each(ratio, advantage, negative, self.clip_low, self.clip_high)
        is_clipped = (ratio > 1 + self.clip_high) | (ratio < 1 - self.clip_low)
        metrics = _ratio_metrics(change, advantage, is_clipped, negative)
        if self.kl_coef > 0:
            if reference is None:
                raise ValueError("kl_coef > 0 needs the reference's evaluation")
            kl = self.kl(new, reference, chunk)
            values = values + self.kl_coef * kl
            metrics["kl"] = kl.detach()
        return Loss(values, metrics)


@dataclass(frozen=True)
class DivergenceBound:
    """DPPO: the plain ratio surrogate inside a bound on the exact KL from the behaviour policy.

    Attributes:
        threshold: KL per latent dim from which a decision is no longer moved further away.

    Raises:
        ValueError: a threshold that is not positive; in a call, tokens or a plan without
            store_mean.
    """

    threshold: float

    def __post_init__(self) -> None:
        require_positive(threshold=self.threshold)

    @property
    def needs(self) -> Needs:
        """The bound in terms of the ratio: a KL of k has log-ratios of about sqrt(2 k)."""
        return Needs(ratio_clip=math.sqrt(2 * self.threshold))

    def __call__(
        self, new: Evaluation, old: Evaluation | None, reference: Evaluation | None, chunk: Chunk
    ) -> Loss:
        change = density_log_ratio(new, chunk.decisions)
        ratio = torch.exp(change)
        kl = gaussian_kl(*_behaviour(new, chunk.decisions)).detach()
        values = -dppo(ratio, chunk.advantage, kl, self.threshold)
        is_stopped = ~dppo_keep(ratio, chunk.advantage, kl, self.threshold)
        metrics = _ratio_metrics(change, chunk.advantage, is_stopped)
        return Loss(values, metrics | {"behaviour_kl": kl})


@torch.no_grad()
def _ratio_metrics(
    change: Tensor, advantage: Tensor, is_stopped: Tensor, negative: Tensor | None = None
) -> dict[str, Tensor]:
    """What to log about log-ratios; is_stopped = outside the bound, on either side.

    A decision whose rewards are clipped one by one is stopped where some reward is.
    """
    ratio = torch.exp(change)
    negative = advantage.clamp(max=0) if negative is None else negative
    stopped_high = is_stopped & (ratio > 1) & (advantage - negative > 0)
    stopped_low = is_stopped & (ratio < 1) & (negative < 0)
    return {
        "ratio_mean": ratio,
        "ratio_max_dev": (ratio - 1).abs(),
        "clip_frac_high": stopped_high.to(ratio.dtype),
        "clip_frac_low": stopped_low.to(ratio.dtype),
        "approx_kl": 0.5 * change.square(),
    }
