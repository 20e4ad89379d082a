"""Where MixGRPO's sliding window stands: a function of the training step, the same on all ranks.

Paper: MixGRPO, arXiv:2507.21802, section 4.2: l <- min(l + stride, last) every `interval` steps.
Differs from the public code: there the window shrinks at the right end and then is empty for ever
or for one round; here it keeps its width, stays at the end, and rolls back only if asked to.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["progressive", "linear_decay", "exp_decay", "random", "frozen"]


@dataclass(frozen=True)
class SlidingWindow:
    """A window of `width` consecutive sampler steps that moves over training.

    Attributes:
        num_trainable: sampler steps that may be trained, from 0; the window never leaves them.
        width: w, steps in the window.
        stride: s, steps by which it moves.
        interval: tau, training steps between two moves (the first one, if it decays).
        strategy: "progressive" (constant interval), "linear_decay" (interval falls linearly to 1
            with the position), "exp_decay" (interval * exp(-0.1 * steps beyond `exp_threshold`)),
            "random" (a new uniform position every training step), "frozen" (never moves).
        roll_back: start again at 0 after the last position instead of staying there.
        exp_threshold: position after which exp_decay sets in; the paper's code has 13 of 25.
        seed: of the random strategy.
    """

    num_trainable: int
    width: int
    stride: int = 1
    interval: int = 25
    strategy: Strategy = "progressive"
    roll_back: bool = False
    exp_threshold: int = 13
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.width <= self.num_trainable:
            raise ValueError(
                f"window={self.width} does not fit into {self.num_trainable} trainable steps "
                f"(the last sampler step is never trained); use 1 to {self.num_trainable}"
            )
        if self.stride < 1 or self.interval < 1:
            raise ValueError(
                f"stride={self.stride} and interval={self.interval} must be at least 1; "
                "use strategy='frozen' for a window that does not move"
            )

    @property
    def last_start(self) -> int:
        """The rightmost position."""
        return self.num_trainable - self.width

    def start(self, step: int) -> int:
        """First sampler step of the window at a training step."""
        if self.strategy == "frozen":
            return 0
        if self.strategy == "random":
            return random.Random(f"{self.seed}:{step}").randint(0, self.last_start)
        position, left = 0, step
        while left >= (stay := self._stay(position)):
            if position == self.last_start and not self.roll_back:
                break
            left -= stay
            at_end = position == self.last_start
            position = 0 if at_end else min(position + self.stride, self.last_start)
        return position

    def steps(self, step: int) -> tuple[int, ...]:
        """The sampler steps in the window at a training step."""
        start = self.start(step)
        return tuple(range(start, start + self.width))

    @property
    def words(self) -> str:
        """How the window moves, with every number in force."""
        if self.strategy == "frozen":
            return "frozen at 0"
        if self.strategy == "random":
            return f"random in every training step, seed {self.seed}"
        interval = f"stride {self.stride} every {self.interval} training steps"
        if self.strategy == "linear_decay":
            interval += f", falling to 1 at position {self.last_start}"
        if self.strategy == "exp_decay":
            interval += f", times exp(-0.1) per step beyond position {self.exp_threshold}"
        end = "rolls back to 0" if self.roll_back else "stays"
        return f"{self.strategy}, {interval}; {end} after position {self.last_start}"

    def _stay(self, position: int) -> int:
        """Training steps for which the window stands at a position, at least 1."""
        if self.strategy == "linear_decay":
            share = position / max(self.last_start, 1)
            return max(1, round(self.interval * (1 - share) + share))
        if self.strategy == "exp_decay":
            beyond = max(position - self.exp_threshold, 0)
            return max(1, math.ceil(self.interval * math.exp(-0.1 * beyond)))
        return self.interval
