"""The objectives of forward-process methods: what DiffusionNFT, AWM, RWR, DGPO and DPO minimise.

Each is a frozen record of its numbers, called as `(new, old, reference, chunk) -> Loss`, where the
first three are `Matching` records of one chunk at the same points: of the current set, of the set
`old` and of the reference, None where `needs` does not name the set. All penalties on leaving a
set are squared distances of velocities, as in the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flowrl.functional import matching
from flowrl.functional.matching import Matching, Weighting, matching_error, matching_log_prob
from flowrl.functional.pairs import dgpo_weight, flow_dpo, preference_margin, unit_sum
from flowrl.functional.ratios import importance_ratio
from flowrl.functional.surrogates import ppo_clip
from flowrl.methods.spec import Loss, Needs, require_positive
from flowrl.types import Chunk

Anchor = Literal["reference", "old"]
NFTLoss = Callable[[Matching, Matching, Tensor, float], Tensor]
NFTForm = Literal["paper", "code"]
WeightingName = Literal["uniform", "t", "t_squared", "huber", "ghuber"]


def nft_of_paper(new: Matching, old: Matching, optimal: Tensor, mix: float) -> Tensor:
    """`matching.nft` of two evaluations [E]."""
    return matching.nft(new.velocity, old.velocity, new.target, optimal, mix)


def nft_of_code(new: Matching, old: Matching, optimal: Tensor, mix: float) -> Tensor:
    """`matching.nft_of_published_code` of two evaluations [E]."""
    return matching.nft_of_published_code(
        new.velocity, old.velocity, new.x_t, new.x0, new.sigma, optimal, mix
    )


NFT_LOSSES: dict[NFTForm, NFTLoss] = {"paper": nft_of_paper, "code": nft_of_code}

WEIGHTINGS: dict[WeightingName, Weighting] = {
    "uniform": matching.plain,
    "t": matching.times_sigma,
    "t_squared": matching.times_sigma_squared,
    "huber": matching.huber,
    "ghuber": partial(matching.general_huber, power=0.25),
}
"""AWM's, by their names there."""


def old_decay(updates: int, *, start: int = 0, slope: float = 0.001, most: float = 0.5) -> float:
    """Share of itself that `old` keeps when it moves towards current after so many updates.

    Paper: DiffusionNFT's code, which does so once after every rollout. Its type 1 is the default,
    type 2 is start=75, slope=.0075, most=.999, and type 0 (on-policy: old is current) is most=0.
    DGPO and AWM: slope=.001, most=.3.
    """
    return min(max(slope * (updates - start), 0.0), most)


def renewal(updates: int, *, every: int) -> float:
    """0 after every `every` updates, when `old` becomes current, else 1: it stays as it is.

    Paper: Flow-GRPO's code, the reference of its online DPO. A rollout's number of updates must
    divide `every`; otherwise old is renewed less often, at their common multiples.
    """
    return 0.0 if updates % every == 0 else 1.0


@dataclass(frozen=True)
class NegativeAware:
    """DiffusionNFT: good samples attract the velocity, bad ones repel it through its mirror at old.

    Paper: DiffusionNFT, arXiv:2509.16117. `loss` is its formula ("paper") or what its code
    minimises ("code", with `scale` 5).

    Attributes:
        loss: one of NFT_LOSSES.
        mix: how much of (new - old) the two implicit policies carry; the paper's beta.
        advantage_limit: advantages from -limit to limit become optimality 0 to 1.
        scale: factor of the loss; the code multiplies by its advantage limit.
        kl_coef: of the squared distance to the reference's velocity.
    """

    loss: NFTLoss
    mix: float = 1.0
    advantage_limit: float = 5.0
    scale: float = 1.0
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        require_positive(mix=self.mix, advantage_limit=self.advantage_limit, scale=self.scale)
        _require_coef(kl_coef=self.kl_coef)

    @property
    def needs(self) -> Needs:
        """Old, and all decisions: at advantage 0 both policies attract, so new returns to old."""
        return Needs(("old", *_reference(self.kl_coef)), advantage=False)

    def __call__(
        self, new: Matching, old: Matching | None, reference: Matching | None, chunk: Chunk
    ) -> Loss:
        old = _require(old, "old", "NegativeAware mirrors the velocity at it")
        optimal = matching.optimality(chunk.advantage, self.advantage_limit)
        values = self.scale * self.loss(new, old, optimal, self.mix)
        metrics = {
            "matching_error": new.error.detach(),
            "optimality": optimal,
            "old_distance": matching_error(new.velocity, old.velocity).detach(),
        }
        return _with_penalties(values, metrics, new, kl=(self.kl_coef, reference))


@dataclass(frozen=True)
class MatchedRatio:
    """AWM: PPO's clipped surrogate on a likelihood that is the negative weighted matching error.

    Paper: AWM, arXiv:2509.25050. With `is_off_policy` the ratio is taken against `old`; without, it
    is 1 and its gradient that of the log-likelihood, which is the published default (one update per
    rollout). Differs: with several updates per rollout the code scores the later ones against the
    weights of the rollout; here an on-policy ratio stays 1.

    Attributes:
        weighting: one of WEIGHTINGS.
        clip_low, clip_high: distances of the clip bounds from 1; 1 is the published, inactive one.
        is_off_policy: True = `old` drew the samples.
        kl_coef: of the squared distance to the reference's velocity; published .001 to .003.
        old_kl_coef: of the squared distance to old's velocity; published 1 ("EMA-KL").
    """

    weighting: Weighting
    clip_low: float = 1.0
    clip_high: float = 1.0
    is_off_policy: bool = False
    kl_coef: float = 0.0
    old_kl_coef: float = 0.0

    def __post_init__(self) -> None:
        require_positive(clip_low=self.clip_low, clip_high=self.clip_high)
        _require_coef(kl_coef=self.kl_coef, old_kl_coef=self.old_kl_coef)

    @property
    def needs(self) -> Needs:
        """Old if it is in the ratio or a penalty; all decisions if there is a penalty."""
        old = ("old",) if self.is_off_policy or self.old_kl_coef > 0 else ()
        return Needs((*old, *_reference(self.kl_coef)), self.kl_coef == self.old_kl_coef == 0)

    def __call__(
        self, new: Matching, old: Matching | None, reference: Matching | None, chunk: Chunk
    ) -> Loss:
        behaviour = _require(old, "old", "it drew the samples") if self.is_off_policy else new
        ratio = importance_ratio(
            matching_log_prob(new.error, new.sigma, self.weighting),
            matching_log_prob(behaviour.error, new.sigma, self.weighting),
            chunk.decisions.mask,
        )
        values = -ppo_clip(ratio, chunk.advantage, self.clip_low, self.clip_high)
        away = (ratio.detach() - 1).abs()
        clipped = torch.where(
            chunk.advantage > 0, ratio > 1 + self.clip_high, ratio < 1 - self.clip_low
        )
        metrics = {
            "matching_error": new.error.detach(),
            "ratio_mean": ratio.detach(),
            "ratio_max_dev": away,
            "clip_frac": (clipped & (chunk.advantage != 0)).to(ratio.dtype),
        }
        penalties = {"kl": (self.kl_coef, reference), "old_kl": (self.old_kl_coef, old)}
        return _with_penalties(values, metrics, new, **penalties)


@dataclass(frozen=True)
class WeightedMatching:
    """RWR and SFT on the best: flow matching's loss, weighted by what `advantage` says.

    Paper: Flow-GRPO's code. RWR's weight is the reward (`selection.reward_weights`), SFT's 1 for
    the best of a group (`selection.best_of_group`). Differs: no bug that masks only with a KL.

    Attributes:
        kl_coef: of the squared distance to the reference's velocity.
    """

    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        _require_coef(kl_coef=self.kl_coef)

    @property
    def needs(self) -> Needs:
        """The reference, and all decisions, if there is a penalty."""
        return Needs(_reference(self.kl_coef), self.kl_coef == 0)

    def __call__(
        self, new: Matching, old: Matching | None, reference: Matching | None, chunk: Chunk
    ) -> Loss:
        metrics = {"matching_error": new.error.detach(), "weight": chunk.advantage}
        values = chunk.advantage * new.error
        return _with_penalties(values, metrics, new, kl=(self.kl_coef, reference))


@dataclass(frozen=True)
class GroupPreference:
    """DGPO: weighted matching, where a group counts less the better it is ranked already.

    Paper: DGPO, arXiv:2510.08425. Differs: without the clip that its authors' code puts on the
    change of the error since `old`.

    Attributes:
        group_size: samples of a group.
        scale: sharpness of the weight; the paper's beta.
        kl_coef: of the squared distance to the reference's velocity.
        anchor: "reference" or "old"; the implicit reward is measured against it.
    """

    group_size: int
    scale: float = 100.0
    kl_coef: float = 0.0
    anchor: Anchor = "reference"

    def __post_init__(self) -> None:
        require_positive(group_size=self.group_size, scale=self.scale)
        _require_coef(kl_coef=self.kl_coef)

    @property
    def needs(self) -> Needs:
        """The anchor, and a whole group in one chunk."""
        sets = (self.anchor, *_reference(self.kl_coef))
        return Needs(tuple(dict.fromkeys(sets)), self.kl_coef == 0, self.group_size)

    def __call__(
        self, new: Matching, old: Matching | None, reference: Matching | None, chunk: Chunk
    ) -> Loss:
        anchor = _anchor(self.anchor, old, reference, "DGPO compares with it")
        advantage = torch.where(chunk.decisions.mask, chunk.advantage, 0.0)
        weight = dgpo_weight(
            new.error,
            anchor.error,
            advantage,
            new.unit,
            scale=self.scale,
            group_size=self.group_size,
        )
        metrics = {"matching_error": new.error.detach(), "weight": weight}
        values = weight * advantage * new.error
        return _with_penalties(values, metrics, new, kl=(self.kl_coef, reference))


@dataclass(frozen=True)
class PairPreference:
    """Diffusion-DPO for flows: the winner's error falls below the loser's, against the reference.

    Paper: Diffusion-DPO, arXiv:2311.12908. The sign of the advantage names the winner and the loser
    of a unit, 0 nobody (`selection.best_and_worst`). Both carry the pair's loss, so that their mean
    is the mean over pairs.

    Attributes:
        scale: of the margin; the paper's beta.
        anchor: "reference" or "old"; takes the part of the paper's reference.
    """

    scale: float = 100.0
    anchor: Anchor = "reference"

    def __post_init__(self) -> None:
        require_positive(scale=self.scale)

    @property
    def needs(self) -> Needs:
        """The anchor, and both of a pair in one chunk."""
        return Needs((self.anchor,), together=2)

    def __call__(
        self, new: Matching, old: Matching | None, reference: Matching | None, chunk: Chunk
    ) -> Loss:
        anchor = _anchor(self.anchor, old, reference, "DPO compares with it")
        in_pair = chunk.decisions.mask & (chunk.advantage != 0)
        wins, loses = in_pair & (chunk.advantage > 0), in_pair & (chunk.advantage < 0)
        is_whole = [unit_sum(side.long(), new.unit) == 1 for side in (wins, loses)]
        if bool((in_pair & ~(is_whole[0] & is_whole[1])).any()):
            raise ValueError(
                "every unit of a chunk needs one winner and one loser; keep the decisions of a "
                "unit in one chunk, and the samples of a group on one rank"
            )
        win, lose, ref_win, ref_lose = (
            unit_sum(torch.where(side, each.error, 0.0), new.unit)
            for each in (new, anchor)
            for side in (wins, loses)
        )
        loss = flow_dpo(win, lose, ref_win, ref_lose, scale=self.scale)
        values = torch.where(in_pair, loss, 0.0)
        margin = preference_margin(win, lose, ref_win, ref_lose).detach()
        metrics = {
            "matching_error": new.error.detach(),
            "margin": margin,
            "ranked_right": (margin > 0).to(margin.dtype),
        }
        return Loss(values, metrics)


def _with_penalties(
    values: Tensor,
    metrics: dict[str, Tensor],
    new: Matching,
    **penalties: tuple[float, Matching | None],
) -> Loss:
    """The loss plus coefficient * squared distance to each named set; 0 = not evaluated."""
    for name, (coef, other) in penalties.items():
        if coef > 0:
            anchor = _require(other, name, "its coefficient is positive")
            distance = matching_error(new.velocity, anchor.velocity)
            values = values + coef * distance
            metrics = metrics | {name: distance.detach()}
    return Loss(values, metrics)


def _anchor(name: Anchor, old: Matching | None, reference: Matching | None, why: str) -> Matching:
    return _require(old if name == "old" else reference, name, why)


def _require(evaluation: Matching | None, name: str, why: str) -> Matching:
    if evaluation is None:
        raise ValueError(f"the evaluation of {name!r} is missing, and {why}")
    return evaluation


def _reference(kl_coef: float) -> tuple[str, ...]:
    return ("reference",) if kl_coef > 0 else ()


def _require_coef(**numbers: float) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name} must not be negative, got {number}; 0 = none")
