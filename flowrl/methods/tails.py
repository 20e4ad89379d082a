"""How samples go on after the last stochastic step, where not by the sampler's schedule.

A `StepPlan` without a tail walks all T steps of its table. With one, the table ends `lead` steps
after the last stochastic step, and every state goes on from there along one path or several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from flowrl.functional.solvers import dpmpp_2m, euler, resampled
from flowrl.methods.forward_plan import Solver

TailCount = Literal["paper", "code"]


class Ending(Protocol):
    """Paths to the end; sample n of a group takes path n modulo their number.

    `lead` is how many deterministic steps of the schedule come first, which all paths share;
    `least` how many must be left after them. `num_steps(remaining)` counts the steps of all paths
    in place of `remaining`; `paths(sigmas, first)` are their noise levels, from sigmas[first] to 0,
    for the steps of `solver`.
    """

    @property
    def lead(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def solver(self) -> Solver: ...
    def num_steps(self, remaining: int) -> int: ...
    def paths(self, sigmas: Tensor, first: int) -> list[Tensor]: ...


@dataclass(frozen=True)
class Tail:
    """Fewer steps, of second order, after the last stochastic one.

    Paper: MixGRPO-Flash, arXiv:2507.21802, section 4.4: the rest of the schedule is resampled to
    fewer points, `functional.solvers.resampled`, and walked with `functional.solvers.dpmpp_2m`.

    Attributes:
        ratio: r in (0, 1], share of the remaining steps that is kept.
        count: "paper" = ceil(remaining * r) steps; "code" = as many as its published code, which
            takes int((remaining + 1) * r) points, so one step fewer, but at least the step to
            sigma = 0 (with one point, the code stops short of it and decodes noise).
    """

    ratio: float
    count: TailCount = "paper"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio of the tail must be in (0, 1], got {self.ratio}; 1 keeps all")

    @property
    def lead(self) -> int:
        """None: the path leaves the schedule at once."""
        return 0

    @property
    def least(self) -> int:
        """One step, to sigma = 0."""
        return 1

    @property
    def solver(self) -> Solver:
        """Of second order."""
        return dpmpp_2m

    def num_steps(self, remaining: int) -> int:
        """Steps in place of `remaining` steps."""
        if self.count == "code":
            return max(int((remaining + 1) * self.ratio) - 1, 1)
        return math.ceil(round(remaining * self.ratio, 9))  # 0.1 * 30 is a little above 3

    def paths(self, sigmas: Tensor, first: int) -> list[Tensor]:
        """One path, evenly spaced in unshifted time."""
        return [resampled(sigmas, first, self.num_steps(len(sigmas) - 1 - first))]


@dataclass(frozen=True)
class Granularities:
    """The rest of the schedule once for every stride: as many images of a state as there are.

    Paper: G2RPO, arXiv:2510.01982, its code: the step after the stochastic one is taken in full,
    then every stride-th entry of the schedule. A last step that would stop short of sigma = 0 goes
    there instead, as the code decodes its prediction of x0.

    Attributes:
        strides: the paper's lambda, one at least; 1 = every step.

    Raises:
        ValueError: no stride, one below 1, or one twice.
    """

    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        distinct = len(set(self.strides)) == len(self.strides)
        if not self.strides or min(self.strides) < 1 or not distinct:
            raise ValueError(
                f"granularities={self.strides} must be different strides of at least 1, such as "
                "(1, 2); 1 takes every step"
            )

    @property
    def lead(self) -> int:
        """The step that all granularities share."""
        return 1

    @property
    def least(self) -> int:
        """One stride of each."""
        return max(self.strides)

    @property
    def solver(self) -> Solver:
        """Euler's, as in the table."""
        return euler

    def num_steps(self, remaining: int) -> int:
        """Steps of all granularities together in place of `remaining` steps."""
        return sum(remaining // stride for stride in self.strides)

    def paths(self, sigmas: Tensor, first: int) -> list[Tensor]:
        """Every stride-th entry; the last one is 0."""
        paths = [sigmas[first::stride].clone() for stride in self.strides]
        for points in paths:
            points[-1] = 0.0
        return paths
