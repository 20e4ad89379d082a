"""The scores of all ranks together, what is logged of them, and when too many are missing.

A sample without a score is masked, and its group's statistics are taken over the others: sound for
a few. `thin_groups` leaves out a group of which too little is left; `Breaker` stops a run that
loses too much. Every rank sees the same scores and decides the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flowrl.errors import RewardError
from flowrl.schema import ScoringConfig
from flowrl.train.attempts import joined
from flowrl.types import Failures, Scores


class Collector:
    """Gathers a step's scores: called for the whole step or part by part, then settled.

    Args:
        accelerator: of the run.
        scoring: how much may be missing.
        note: is told what a step has lost, as `lost` says it, before anything is raised.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        scoring: ScoringConfig,
        *,
        note: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self._accelerator = accelerator
        self._note = note
        self._min_group_share = scoring.min_group_share
        self.breaker = Breaker(max_share=scoring.max_invalid, window=scoring.window)

    def __call__(self, scores: Scores, group_id: Tensor) -> tuple[Scores, Tensor]:
        """The scores of all samples, without groups that are too thin, and their `group_id`.

        Args:
            scores: of this rank's samples, of whole groups unless all are there.
            group_id: int64 [N], theirs.
        """
        everyone = Scores(
            {name: self.gather(values) for name, values in scores.rewards.items()},
            scores.weights,
            self.gather(scores.valid),
        )
        group_id = self.gather(group_id)
        valid = thin_groups(everyone.valid, group_id, self._min_group_share)
        return replace(everyone, valid=valid), group_id

    def settle(self, own: Scores, everyone: Scores) -> dict[str, float]:
        """Ends a step: what is logged of failures and of the rewards' components.

        Args:
            own: the scores of this rank's samples of the step.
            everyone: those of all ranks.

        Raises:
            RewardError: a reward has failed too often.
        """
        ranks = [(own.failures, _sums(own.components))]
        if self._accelerator.num_processes > 1:
            ranks = gather_object(ranks)
        failures = [failed for failed, _ in ranks]
        metrics = {
            f"reward/{name}/failed_calls": float(
                sum(failed[name].calls for failed in failures if name in failed)
            )
            for name in own.rewards
        }
        for name in sorted({name for _, sums in ranks for name in sums}):
            parts = [sums[name] for _, sums in ranks if name in sums]
            num = sum(part[1] for part in parts)
            metrics[f"reward/{name}"] = sum(part[0] for part in parts) / num if num else math.nan
        self._note(lost(everyone.rewards, failures))
        self.breaker.observe(
            everyone.trained,
            {name: failed.reason for each in failures for name, failed in each.items()},
        )
        return metrics

    def gather(self, values: Tensor) -> Tensor:
        """Values [N] of every rank, one after the other, on the CPU."""
        device = self._accelerator.device
        return self._accelerator.gather(values.to(device)).cpu()  # type: ignore[no-any-return]


def together(parts: Sequence[Scores]) -> Scores:
    """The scores of several parts of a batch, one after the other."""
    first, sizes = parts[0], [len(part.valid) for part in parts]
    failures: dict[str, Failures] = {}
    for part in parts:
        for name, failed in part.failures.items():
            so_far = failures.get(name, Failures())
            failures[name] = Failures(
                so_far.calls + failed.calls, so_far.samples + failed.samples, failed.reason
            )
    return Scores(
        {name: torch.cat([part.rewards[name] for part in parts]) for name in first.rewards},
        first.weights,
        torch.cat([part.valid for part in parts]),
        joined([part.components for part in parts], sizes),
        failures,
        {name: sum(part.seconds[name] for part in parts) for name in first.seconds},
    )


def lost(
    rewards: Mapping[str, Tensor], failures: Sequence[Mapping[str, Failures]]
) -> list[dict[str, Any]]:
    """What rewards lost and why, a JSON row each; rewards that lost nothing have none.

    `lost` of the `of` samples have no score, of which `unanswered` were in calls that failed for
    good; the reward said NaN or infinity of the others. `calls` failed, and `reason` is the last.

    Args:
        rewards: name -> [N] of all ranks, NaN = invalid.
        failures: of every rank.
    """
    rows = []
    for name, values in rewards.items():
        failed = [each[name] for each in failures if name in each]
        row = {
            "reward": name,
            "lost": int((~values.isfinite()).sum()),
            "of": len(values),
            "unanswered": sum(each.samples for each in failed),
            "calls": sum(each.calls for each in failed),
            "reason": next((each.reason for each in reversed(failed) if each.reason), ""),
        }
        if row["lost"] or row["calls"]:
            rows.append(row)
    return rows


def _sums(components: Mapping[str, Tensor]) -> dict[str, tuple[float, int]]:
    """Name -> (sum, number) of the finite values."""
    finite = {name: values[values.isfinite()] for name, values in components.items()}
    return {name: (float(values.sum()), len(values)) for name, values in finite.items()}


def thin_groups(valid: Tensor, group_id: Tensor, min_share: float) -> Tensor:
    """Bool [N]: `valid` without the groups of which less than a share is valid.

    Args:
        valid: bool [N].
        group_id: int64 [N].
        min_share: in [0, 1].
    """
    _, index, size = torch.unique(group_id, return_inverse=True, return_counts=True)
    scored = torch.zeros(len(size)).index_add(0, index, valid.float())
    return valid & (scored >= min_share * size)[index]


class Breaker:
    """Stops a run of which too large a share of the samples cannot be scored.

    Args:
        max_share: of the samples of `window` steps, above which it stops.
        window: training steps. A window that is not full yet counts as if the rest of it went
            well, so that one bad step at the beginning is no more than that.
    """

    def __init__(self, *, max_share: float, window: int) -> None:
        self.max_share = max_share
        self.window = window
        self._lost: deque[dict[str, int]] = deque(maxlen=window)

    def observe(self, rewards: Mapping[str, Tensor], reasons: Mapping[str, str]) -> None:
        """Counts a step's samples.

        Args:
            rewards: name -> [N] of all ranks, NaN = invalid; those that are trained on.
            reasons: name -> why a call failed last, where one did.

        Raises:
            RewardError: a reward has failed too often.
        """
        lost = {name: int((~values.isfinite()).sum()) for name, values in rewards.items()}
        self._lost.append(lost)
        for name, values in rewards.items():
            total = sum(step.get(name, 0) for step in self._lost)
            allowed = self.max_share * self.window * len(values)
            if total <= allowed:
                continue
            why = reasons.get(name) or "it returned NaN for them"
            raise RewardError(
                f"reward '{name}' could not score {total} samples of the last {len(self._lost)} "
                f"steps, more than {self.max_share:.3g} of what {self.window} steps have "
                f"({why}); repair it, or raise scoring.max_invalid or scoring.window. The last "
                "checkpoint stands: run.resume=latest goes on from it"
            )

    def state_dict(self) -> list[dict[str, int]]:
        """What a checkpoint keeps."""
        return list(self._lost)

    def load_state_dict(self, state: Any) -> None:
        """Goes on from a checkpoint; None = it kept nothing."""
        self._lost.clear()
        self._lost.extend(state or [])


def reward_metrics(
    scores: Scores, advantages: Tensor, group_id: Tensor, negative: Tensor | None = None
) -> dict[str, float]:
    """What is logged about a step's rewards; statistics are over valid samples.

    Without a reward that has a weight there is no sum of them.

    Of advantages [N, T], a group without any is counted, and the mean is over samples and steps.
    With their `negative` part told apart, a group in which rewards cancel is one with advantages.
    """
    metrics: dict[str, float] = {}
    for name, values in scores.rewards.items():
        finite = values[values.isfinite()]
        metrics[f"reward/{name}/mean"] = _stat(finite, torch.mean)
        metrics[f"reward/{name}/std"] = _stat(finite, lambda v: v.std(correction=0))
        metrics[f"reward/{name}/invalid_frac"] = 1 - len(finite) / max(len(values), 1)
    if scores.weights:
        summed = torch.stack([scores.rewards[n] * w for n, w in scores.weights.items()]).sum(0)
        summed = summed[scores.valid]
        metrics["train/reward_mean"] = _stat(summed, torch.mean)
        metrics["train/reward_std"] = _stat(summed, lambda v: v.std(correction=0))
    _, index = torch.unique(group_id, return_inverse=True)
    size = advantages.abs() if negative is None else advantages.abs() - negative
    strength = torch.zeros(int(index.max()) + 1).index_add(
        0, index, size.float().reshape(len(index), -1).sum(1)
    )
    metrics |= {
        "train/zero_std_frac": float((strength == 0).float().mean()),
        "train/invalid_frac": float((~scores.valid).float().mean()),
        "train/advantage_abs_mean": _stat(advantages[scores.valid].abs(), torch.mean),
    }
    return metrics


def _stat(values: Tensor, statistic: Any) -> float:
    return float(statistic(values)) if len(values) else float("nan")
