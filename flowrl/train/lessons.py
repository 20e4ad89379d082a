"""What is learnt from a rollout: its decisions with their advantages, part by part.

A rollout is cut into parts when its scores arrive one after the other; a part becomes a lesson when
its advantages are known. Reading order: `Part`, `Judged`, `Lesson`, `Lessons`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flowrl.methods.spec import Method
from flowrl.protocols import Stepped, Trajectory
from flowrl.types import Decisions, PromptBatch


@dataclass(frozen=True)
class Part:
    """Some samples of a step, with what the rollout stored of them."""

    batch: PromptBatch
    trajectory: Trajectory


@dataclass(frozen=True)
class Judged:
    """What the scores say of a part.

    Attributes:
        advantages: [N], or [N, T] of the step that each sample took; detached.
        valid: bool [N] or [N, T], False = the decision is masked.
        negative_advantages: as advantages, the method's; None = it has none.
    """

    advantages: Tensor
    valid: Tensor
    negative_advantages: Tensor | None = None

    def split(self, sizes: list[int]) -> list[Judged]:
        """What it says of the first samples, of the next ones and so on."""
        each = (self.advantages, self.valid, self.negative_advantages)
        columns = [[None] * len(sizes) if it is None else it.split(sizes) for it in each]
        return [Judged(*values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Lesson:
    """A part that is ready to be learnt from.

    Attributes:
        trajectory: the part's.
        data: its decisions [E], masked where they are invalid.
        advantage: as data.old_log_prob.
        weight: [E], the method's; None = 1.
        update: int64 [E], the update that trains on a decision.
        negative_advantage: as advantage; None = the method has none.
    """

    trajectory: Trajectory
    data: Decisions
    advantage: Tensor
    weight: Tensor | None
    update: Tensor
    negative_advantage: Tensor | None = None


class Lessons:
    """The lessons of a step, each made when it is asked for.

    Args:
        method: whose weights the decisions have.
        parts: of the rollout.
        stored: the decisions of every part.
        judged: number of a part -> its advantages; may wait for them.
    """

    def __init__(
        self,
        method: Method,
        parts: Sequence[Part],
        stored: Sequence[Decisions],
        judged: Callable[[int], Judged],
    ) -> None:
        self._method = method
        self._parts = parts
        self._stored = stored
        self._judged = judged
        self._ready: dict[int, Lesson] = {}

    def __getitem__(self, number: int) -> Lesson:
        if number not in self._ready:
            part, data, judged = self._parts[number], self._stored[number], self._judged(number)
            data = replace(data, mask=data.mask & like(per_decision(judged.valid, data), data.mask))
            negative = judged.negative_advantages
            self._ready[number] = Lesson(
                part.trajectory,
                data,
                _spread(judged.advantages, data),
                _weight(self._method, part.trajectory, data),
                part.batch.update[data.sample],
                None if negative is None else _spread(negative, data),
            )
        return self._ready[number]

    def parts_of(self, update: int) -> list[int]:
        """The parts with samples of an update, in order."""
        return [
            n for n, part in enumerate(self._parts) if bool((part.batch.update == update).any())
        ]

    def expected(self, update: int) -> float:
        """Decisions of an update on this rank, if all of its samples are valid."""
        pairs = zip(self._parts, self._stored, strict=True)
        return sum(float(d.mask[p.batch.update[d.sample] == update].sum()) for p, d in pairs)

    def counted(self, update: int) -> float:
        """Decisions of an update on this rank, without those that are invalid."""
        lessons = [self[number] for number in self.parts_of(update)]
        return sum(float(each.data.mask[each.update == update].sum()) for each in lessons)


def _weight(method: Method, trajectory: Trajectory, data: Decisions) -> Tensor | None:
    """The method's weight of every decision [E], None where it has none."""
    if method.weighting is None:
        return None
    if not isinstance(trajectory, Stepped):
        raise ValueError(f"{method.name} weights sampler steps, and tokens have none")
    return method.weighting(trajectory.plan, trajectory.sigmas).float()[data.step]


def _spread(advantages: Tensor, data: Decisions) -> Tensor:
    """Advantages [N] or [N, T] as the decisions' old_log_prob."""
    return like(per_decision(advantages, data), data.mask).float().expand(data.mask.shape)


def per_decision(values: Tensor, data: Decisions) -> Tensor:
    """[E]: each decision's entry of values [N] per sample or [N, T] per sample and step."""
    return values[data.sample] if values.ndim == 1 else values[data.sample, data.step]


def like(values: Tensor, shaped: Tensor) -> Tensor:
    """Per-decision values [E] with the dims of [E, ...]."""
    return values.reshape(values.shape + (1,) * (shaped.ndim - 1))
