"""Which runs end early: Hyperband's successive halving, as W&B's engine applies it to a sweep.

Paper: Hyperband, arXiv:1603.06560, algorithm 1. Differs: runs are not drawn in brackets; a run that
has reached a band is compared with all that have, whenever they did, and ends if it is not among
the best 1/eta of them. Pure; what a band counts are logged values of the metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Goal = Literal["minimize", "maximize"]
_MAX_BANDS = 100


def bands_from_first(min_iter: int, eta: float) -> list[int]:
    """The bands min_iter * eta^k, k = 0, 1, ..."""
    return [int(min_iter * eta**k) for k in range(_MAX_BANDS)]


def bands_to_last(max_iter: int, num: float, eta: float) -> list[int]:
    """The bands max_iter / eta^k, k = 1, ..., num, as far as they are 1 or more, ascending."""
    found = [max_iter / eta**k for k in range(1, int(num) + 1)]
    return sorted(int(band) for band in found if band >= 1)


def is_left_behind(
    history: Sequence[float],
    histories: Sequence[Sequence[float]],
    *,
    bands: Sequence[int],
    eta: float,
    goal: Goal,
    strict: bool,
) -> bool:
    """Whether a run should end.

    Args:
        history: the run's values of the metric so far, finite.
        histories: those of all runs, this one included, finished ones too.
        bands: numbers of values at which runs are compared, ascending.
        eta: one in eta goes on.
        goal: whether low or high is good.
        strict: judge the run by its value at the last band that it reached; else by its best so
            far.

    Returns:
        True if the run's value is worse than that of rank floor(n / eta), from 0, among the n runs
        that have reached the band.
    """
    sign = 1.0 if goal == "minimize" else -1.0
    reached = [band for band in bands if band <= len(history)]
    if not reached:
        return False
    band = reached[-1]
    at_band = sorted(sign * each[band - 1] for each in histories if len(each) >= band)
    threshold = at_band[math.floor(len(at_band) / eta)]
    mine = sign * history[band - 1] if strict else min(sign * value for value in history)
    return mine > threshold
