"""The course of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """Factor on the learning rate after `update` updates: linear warm-up, then the schedule.

    Plain numbers only: torch stores them with every checkpoint.
    """

    schedule: str
    warmup: int
    total: int

    def __call__(self, update: int) -> float:
        if update < self.warmup:
            return (update + 1) / self.warmup
        share = min(1.0, (update - self.warmup) / max(1, self.total - self.warmup))
        if self.schedule == "linear":
            return 1 - share
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1.0
