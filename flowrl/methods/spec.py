"""What a method is made of: a step plan, an advantage, an objective. Records only, no tensor maths.

A `Method` is built by a function of `methods/flow.py` or `methods/token.py` whose keyword defaults
are its paper's table. Slots are plain functions, or `functools.partial`s of them, so `describe()`
can print every number that is in force.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flowrl.errors import ShapeError
from flowrl.functional import sde
from flowrl.functional.aggregate import aggregate
from flowrl.methods.forward_plan import ForwardPlan
from flowrl.methods.tails import Ending
from flowrl.types import Chunk, PromptBatch, Scores, Tree

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Keys = Callable[[PromptBatch, "StepPlan"], Tensor]
Advantage = Callable[[Scores, Tensor, Tree | None], Tensor]
Prune = Callable[[Tensor, Tensor, Any], Tensor]


def own_noise(batch: PromptBatch, plan: StepPlan) -> Tensor:
    """Keys [N, T+1] of chains: every sample has its own start and its own noise in every step."""
    keys = torch.full((len(batch), plan.num_steps + 1), -1)
    keys[:, 0] = batch.sample_id
    keys[:, [1 + step for step in plan.stochastic]] = batch.sample_id[:, None]
    return keys


def shared_start(batch: PromptBatch, plan: StepPlan) -> Tensor:
    """`own_noise`, but for one starting noise per group: its deterministic prefix is one chain."""
    keys = own_noise(batch, plan)
    keys[:, 0] = batch.group_id
    return keys


@dataclass(frozen=True)
class NoiseMix:
    """Noise that samples share in part: (shared + scale * own) / sqrt(1 + scale^2).

    Attributes:
        keys: names the shared noise as a plan's `keys` name the own one; -1 = own noise alone.
        scale: s above; the correlation of two samples of one shared noise is 1 / (1 + s^2).
    """

    keys: Keys
    scale: float


@dataclass(frozen=True)
class StepPlan:
    """How a flow rollout draws noise, and which of its stochastic steps are trained.

    What a step does may differ from sample to sample: `keys` names the noise of every sample and
    step, and so says which samples are the same state before a step (`types.Tree`): those whose
    keys agree up to there. A distinct state is evaluated once. Noise derives from (batch.seed,
    key, column) alone, so keys must differ where noise must be independent, on all ranks: make
    them of sample_id or group_id.

    Attributes:
        num_steps: sampler steps T.
        kernel: (x_t, velocity, sigma, sigma_next, sigma_max) -> (mean, std) of a stochastic step.
        stochastic: steps in which some sample draws noise; all others are Euler's ODE.
        trained: stochastic steps whose decisions are stored; ascending.
        trained_fraction: share of `trained` that each sample keeps, drawn per sample; 1.0 = all.
        keys: (batch, plan) -> int64 [N, T+1]; column 0 names the starting noise, column 1 + i the
            noise of step i; -1 = the step is deterministic for this sample.
        mix: part of the noise that samples share; None = keys say it all.
        tail: other ways from the last stochastic step to the end (`tails`); None = the schedule's.
        group_size: samples that a group must have, all on one rank; None = any, anywhere.
        store_mean: decisions remember the mean of their transition under the behaviour policy.
    """

    num_steps: int
    kernel: Kernel
    stochastic: tuple[int, ...]
    trained: tuple[int, ...]
    trained_fraction: float = 1.0
    keys: Keys = own_noise
    mix: NoiseMix | None = None
    tail: Ending | None = None
    group_size: int | None = None
    store_mean: bool = False

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
        if self.tail is not None and self.num_table_steps + self.tail.least > self.num_steps:
            last, need = max(self.stochastic, default=-1), self.tail.lead + self.tail.least
            raise ValueError(
                f"after step {last}, the last stochastic one, {self.num_steps - 1 - last} of "
                f"{self.num_steps} steps are left for a tail that needs {need}; use more steps or "
                "an earlier one"
            )

    @property
    def needs_whole_groups(self) -> bool:
        """True = a group must lie on one rank, because it grows as one tree."""
        return self.group_size is not None

    @property
    def num_kept(self) -> int:
        """Trained steps per sample, rounded down as in DanceGRPO's code."""
        return int(self.trained_fraction * len(self.trained))

    @property
    def num_table_steps(self) -> int:
        """Steps before the tail; T without one."""
        if self.tail is None:
            return self.num_steps
        return max(self.stochastic, default=-1) + 1 + self.tail.lead

    @property
    def num_tail_steps(self) -> int:
        """Steps of the tail, all its paths together; 0 without one."""
        if self.tail is None:
            return 0
        return self.tail.num_steps(self.num_steps - self.num_table_steps)

    def table(self, batch: PromptBatch) -> Tensor:
        """The plan's keys for a batch, int64 [N, T+1], checked.

        Raises:
            ShapeError: they are not what `keys` promises.
        """
        keys = self.keys(batch, self)
        shape = (len(batch), self.num_steps + 1)
        if keys.dtype != torch.int64 or keys.shape != shape or bool((keys[:, 0] < 0).any()):
            raise ShapeError(
                f"keys of a plan must be int64 {list(shape)} with no -1 in column 0, got "
                f"{keys.dtype} {list(keys.shape)}"
            )
        noisy = (keys[:, 1:] >= 0).any(0).nonzero().flatten().tolist()
        if not set(noisy) <= set(self.stochastic):
            raise ShapeError(f"keys draw noise in steps {noisy}, beyond {self.stochastic}")
        return keys


@dataclass(frozen=True)
class TokenPlan:
    """How a token rollout is drawn; the temperature is the policy's own.

    Attributes:
        group_size, needs_whole_groups: as StepPlan's; any group, anywhere.
    """

    group_size: int | None = None
    needs_whole_groups: bool = False


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
class Needs:
    """What an objective must be given.

    Attributes:
        sets: those of "old" and "reference" whose view of the decisions it takes.
        advantage: True = a decision of advantage 0 has no gradient, so it is not evaluated.
        together: decisions of one unit of the trajectory that must stand in one chunk, at most.
        ratio_clip: the smallest distance from 1 at which it clips the ratio to the log-probs of the
            rollout; None = it has no such ratio.
        negative_advantage: True = it clips the loss of every reward by itself, where the method
            tells them apart (`Chunk.negative_advantage`).
    """

    sets: tuple[str, ...] = ()
    advantage: bool = True
    together: int = 1
    ratio_clip: float | None = None
    negative_advantage: bool = False


class Objective(Protocol):
    """What a method minimises: a frozen record of its numbers.

    `new`, `old` and `reference` are how parameter sets see the chunk's decisions, as the policy's
    `evaluate` gives it; None for a set that `needs` does not name.
    """

    @property
    def needs(self) -> Needs: ...
    def __call__(self, new: Any, old: Any, reference: Any, chunk: Chunk) -> Loss: ...


@dataclass(frozen=True)
class Method:
    """A named composition. `plan(step)` must depend on its argument alone: every rank asks it.

    Attributes:
        name: name in the config.
        paper: title and arXiv id.
        policy: kind of policy that it trains: "flow" scores the steps of a sampler, "forward" the
            clean samples of a flow model, noised afresh, "neighbor" the distances of its samples in
            a group, "token" the tokens of a sequence.
        plan: training step -> StepPlan, ForwardPlan, NeighborPlan or TokenPlan.
        advantage: (scores, group_id, tree) of all ranks -> [N], or [N, T] of the step that each
            sample took (equal for samples of one edge); detached, 0 where invalid. The tree is None
            but for "flow".
        objective: (new, old, reference, chunk) -> Loss.
        aggregate: (values, mask, denominator) -> scalar loss.
        weighting: (plan, sigmas [T+1]) -> [T], factors on the loss of a step's decisions, detached;
            None = 1.
        prune: (advantages, group_id, tree) of all ranks -> bool [N]; decisions from which no True
            sample descends are masked, so not counted in the mean either; None = all stay.
        old_decay: share of itself that the set `old` keeps, when it moves towards current after a
            rollout was learnt from, by the number of updates so far; None = `old` is not kept.
        compares: whose scores an advantage depends on: those of its "group", or of the "rollout".
        negative_advantage: as advantage, the sum of the rewards' negative advantages alone, for one
            clipped loss per reward; None = one of their sum.
        numbers: what the plan was made from, for `describe`.
    """

    name: str
    paper: str
    policy: Literal["flow", "forward", "neighbor", "token"]
    plan: Callable[[int], Any]
    advantage: Advantage
    objective: Objective
    aggregate: Callable[[Tensor, Tensor, float], Tensor] = aggregate
    weighting: Callable[[StepPlan, Tensor], Tensor] | None = None
    prune: Prune | None = None
    old_decay: Callable[[int], float] | None = None
    compares: Literal["group", "rollout"] = "rollout"
    negative_advantage: Advantage | None = None
    numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "old" in self.objective.needs.sets and self.old_decay is None:
            raise ValueError(f"{self.name}: the objective looks at 'old', which has no old_decay")
        if self.negative_advantage is not None and not self.objective.needs.negative_advantage:
            raise ValueError(
                f"{self.name}: a negative_advantage is for one clipped loss per reward, but its "
                f"objective, {type(self.objective).__name__}, has one for all; use ClippedRatio"
            )

    @property
    def takes_pairs(self) -> bool:
        """True = it draws no sample: it learns from a data set of pairs, and from no reward."""
        plan = self.plan(0)
        return isinstance(plan, ForwardPlan) and plan.solver is None

    def describe(self) -> list[tuple[str, str]]:
        """Rows (slot, text) with every number in force."""
        rows = [("method", self.name), ("paper", self.paper)]
        rows += [(name, _text(value)) for name, value in self.numbers.items()]
        slots = ("advantage", "negative_advantage", "objective", "aggregate", "weighting", "prune")
        for slot in (*slots, "old_decay"):
            if (value := getattr(self, slot)) is not None:
                rows += _slot_rows(slot, value)
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


def transition_scales(plan: StepPlan, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """(d mean / d velocity, std) of the plan's kernel in every step, [T] each.

    Args:
        plan: whose kernel it is.
        sigmas: [T+1] of the schedule.
    """
    zero = sigmas.new_zeros(plan.num_steps, 1)
    steps = (sigmas[:-1], sigmas[1:], sigmas[1])
    still, std = plan.kernel(zero, zero, *steps)
    moved, _ = plan.kernel(zero, zero + 1, *steps)
    return (moved - still)[:, 0], std.expand_as(zero)[:, 0]


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
