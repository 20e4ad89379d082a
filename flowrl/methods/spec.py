"""What a method is made of: a step plan, an advantage, an objective. Records only, no tensor maths.

A `Method` is built by a function of `methods/flow.py` or `methods/token.py` whose keyword defaults
are its paper's table. Slots are plain functions, or `functools.partial`s of them, so `describe()`
can print every number that is in force.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

from flowrl.functional import sde
from flowrl.functional.aggregate import aggregate
from flowrl.types import Chunk, Evaluation, Scores

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Advantage = Callable[[Scores, Tensor], Tensor]


@dataclass(frozen=True)
class StepPlan:
    """Which steps of a flow rollout are stochastic and which of those are trained.

    Attributes:
        num_steps: sampler steps T.
        kernel: (x_t, velocity, sigma, sigma_next, sigma_max) -> (mean, std) of a stochastic step.
        stochastic: steps that draw noise; the others are Euler's ODE.
        trained: stochastic steps whose decisions are stored; ascending.
        trained_fraction: share of `trained` that each sample keeps, drawn per sample; 1.0 = all.
        shared_noise: a group starts from one x_T, so its deterministic prefix is computed once.
    """

    num_steps: int
    kernel: Kernel
    stochastic: tuple[int, ...]
    trained: tuple[int, ...]
    trained_fraction: float = 1.0
    shared_noise: bool = False

    def __post_init__(self) -> None:
        if not set(self.trained) <= set(self.stochastic):
            raise ValueError(f"trained steps {self.trained} are not all stochastic")
        if any(not 0 <= step < self.num_steps for step in self.stochastic):
            raise ValueError(f"steps {self.stochastic} do not lie in [0, {self.num_steps})")
        if list(self.trained) != sorted(set(self.trained)):
            raise ValueError(f"trained steps {self.trained} are not in ascending order")
        if self.trained and not 1 <= self.num_kept <= len(self.trained):
            raise ValueError(
                f"trained_fraction={self.trained_fraction} of {len(self.trained)} steps keeps "
                f"{self.num_kept}; use {1 / len(self.trained):.3g} to 1"
            )

    @property
    def num_kept(self) -> int:
        """Trained steps per sample, rounded down as in DanceGRPO's code."""
        return int(self.trained_fraction * len(self.trained))


@dataclass(frozen=True)
class TokenPlan:
    """How a token rollout is drawn; the temperature is the policy's own."""


@dataclass(frozen=True)
class Loss:
    """Per-decision values of an objective, and what to log about them.

    Attributes:
        values: as the chunk's old_log_prob; to be minimised, with gradient.
        metrics: name -> per-decision values, detached; averaged over the mask by the trainer.
    """

    values: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A named composition. `plan(step)` must depend on its argument alone: every rank asks it.

    Attributes:
        name: name in the config.
        paper: title and arXiv id.
        policy: kind of policy that it trains.
        plan: training step -> StepPlan or TokenPlan.
        advantage: (scores, group_id) -> [N], detached, 0 where invalid.
        objective: (new, reference or None, chunk) -> Loss.
        aggregate: (values, mask, denominator) -> scalar loss.
        kl_coef: coefficient of the KL inside `objective`; 0 = the reference is never evaluated.
        numbers: what the plan was made from, for `describe`.
    """

    name: str
    paper: str
    policy: Literal["flow", "token"]
    plan: Callable[[int], Any]
    advantage: Advantage
    objective: Callable[[Evaluation, Evaluation | None, Chunk], Loss]
    kl_coef: float = 0.0
    aggregate: Callable[[Tensor, Tensor, float], Tensor] = aggregate
    numbers: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> list[tuple[str, str]]:
        """Rows (slot, text) with every number in force."""
        rows = [("method", self.name), ("paper", self.paper)]
        rows += [(name, _text(value)) for name, value in self.numbers.items()]
        for slot in ("advantage", "objective", "aggregate"):
            rows += _slot_rows(slot, getattr(self, slot))
        return rows


def require_positive(**numbers: float) -> None:
    """Refuses (ValueError) arguments of a method, given by name, that are not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")


def flow_sde_kernel(noise_level: float) -> Kernel:
    """`functional.sde.flow_sde` in the kernel slot."""

    def flow_sde(
        x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sde.flow_sde(
            x_t, velocity, sigma, sigma_next, noise_level=noise_level, sigma_max=sigma_max
        )

    return flow_sde


def dance_sde_kernel(noise_level: float) -> Kernel:
    """`functional.sde.dance_sde` in the kernel slot."""

    def dance_sde(
        x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sde.dance_sde(x_t, velocity, sigma, sigma_next, noise_level=noise_level)

    return dance_sde


def cps_kernel(noise_level: float) -> Kernel:
    """`functional.sde.cps` in the kernel slot.

    Raises:
        ValueError: noise_level beyond 1, where nothing of the predicted noise is left.
    """
    if noise_level > 1:
        raise ValueError(f"noise_level of the kernel cps must be in (0, 1], got {noise_level}")

    def cps(
        x_t: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor
    ) -> tuple[Tensor, Tensor]:
        return sde.cps(x_t, velocity, sigma, sigma_next, noise_level=noise_level)

    return cps


KERNELS = {"flow_sde": flow_sde_kernel, "dance_sde": dance_sde_kernel, "cps": cps_kernel}
KernelName = Literal["flow_sde", "dance_sde", "cps"]


def _slot_rows(slot: str, value: Any) -> list[tuple[str, str]]:
    """A row per slot; an objective (a dataclass) is a row per field."""
    if is_dataclass(value):
        return [(f"{slot}.{f.name}", _text(getattr(value, f.name))) for f in fields(value)]
    return [(slot, _text(value))]


def _text(value: Any) -> str:
    """A function with its bound numbers, as `name(key=value)`; anything else as itself."""
    if isinstance(value, functools.partial):
        bound = ", ".join(f"{k}={_text(v)}" for k, v in value.keywords.items())
        return f"{value.func.__name__}({bound})"
    if callable(value):
        return str(getattr(value, "__name__", value))
    return str(value)
