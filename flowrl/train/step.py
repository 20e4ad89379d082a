"""One training step after the rollout: chunks of decisions, backward, and the optimiser's updates.

The loss of an update is a sum over decisions divided by ONE denominator, the number of unmasked
decisions of that update on all ranks, so gradients depend neither on chunks nor on the world size.
Reading order: `Learner.learn`, `_backward`, `_chunks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowrl.errors import NonFiniteError
from flowrl.methods.spec import Loss, Method
from flowrl.protocols import Policy, Trajectory, View
from flowrl.train.lessons import Judged, Lesson, Lessons, Part, like
from flowrl.types import Chunk, Decisions


@dataclass
class Sums:
    """Sums, counts and maxima of per-decision metrics over chunks; divided once, over all ranks."""

    totals: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    count: float = 0.0

    def add(self, loss: Loss, mask: Tensor) -> None:
        """Adds a chunk's unmasked values; a metric that ends in `_max_dev` keeps its maximum."""
        self.count += float(mask.sum())
        for name, values in {"loss": loss.values.detach(), **loss.metrics}.items():
            chosen = values[mask]
            if name.endswith("_max_dev"):
                peak = float(chosen.max()) if chosen.numel() else 0.0
                self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            else:
                self.totals[name] = self.totals.get(name, 0.0) + float(chosen.sum())

    def reduce(self, accelerator: Accelerator, denominator: float) -> dict[str, float]:
        """The loss over `denominator`, other metrics over the evaluated decisions, of all ranks."""
        names = sorted(self.totals)
        count, *totals = total(accelerator, [self.count, *(self.totals[n] for n in names)])
        means = {name: value / max(count, 1) for name, value in zip(names, totals, strict=True)}
        if "loss" in means:
            means["loss"] *= count / max(denominator, 1)
        return means | {name: highest(accelerator, peak) for name, peak in self.peaks.items()}


@dataclass(frozen=True)
class StepResult:
    """What a step's updates did.

    Attributes:
        metrics: of all ranks.
        num_rows: network evaluations with gradient, of this rank.
        num_frozen_rows: those without, of other parameter sets or to recompute, of this rank.
        num_decisions: of all ranks.
    """

    metrics: dict[str, float]
    num_rows: int
    num_frozen_rows: int
    num_decisions: int


class Learner:
    """Trains a policy on one rollout at a time.

    Args:
        accelerator: that prepared network, optimizer and schedule.
        network: the prepared network, which the policy evaluates.
        policy: scores decisions.
        method: gives the objective.
        optimizer, schedule: of the network's trainable parameters.
        rows_per_chunk: rows per forward and backward.
        max_grad_norm: global norm to which gradients are cut.
        epochs: passes over a rollout.
        ema_every: updates between two steps of the moving average.
        recompute_old_log_prob: score the rollout once more, in the chunks of training, before the
            first update: costs a forward per row, and makes the ratio 1 where the network's
            numbers depend on the batch (bf16 on a GPU).
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        network: nn.Module,
        policy: Policy,
        method: Method,
        optimizer: Any,
        schedule: Any,
        rows_per_chunk: int,
        max_grad_norm: float,
        epochs: int = 1,
        ema_every: int = 1,
        recompute_old_log_prob: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.network = network
        self.policy = policy
        self.method = method
        self.optimizer = optimizer
        self.schedule = schedule
        self.rows_per_chunk = rows_per_chunk
        self.max_grad_norm = max_grad_norm
        self.epochs = epochs
        self.ema_every = ema_every
        self.recompute_old_log_prob = recompute_old_log_prob
        self.num_updates = 0

    def learn(
        self, parts: Sequence[Part], judged: Callable[[int], Judged], *, streams: bool = False
    ) -> StepResult:
        """All updates of a step.

        Args:
            parts: of the rollout, in the order of the batch. A part is judged after the parts
                before it were learnt from.
            judged: number of a part -> its advantages; may wait for them.
            streams: the advantages of later parts may not be known yet: an update's gradient is
                summed over the denominator of a rollout without invalid samples, and corrected at
                the end by how many there were.

        Afterwards the set `old` follows, where the method keeps one.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are as before the update.
        """
        stored = [part.trajectory.decisions for part in parts]
        num_frozen = 0
        if self.recompute_old_log_prob:
            stored = [
                self._recomputed(part.trajectory, data)
                for part, data in zip(parts, stored, strict=True)
            ]
            num_frozen = sum(part.trajectory.num_rows for part in parts)
        lessons = Lessons(self.method, parts, stored, judged)
        sums, norms, num_decisions, num_rows = Sums(), [], 0.0, 0
        last = max(int(part.batch.update.max()) for part in parts)
        for _ in range(self.epochs):
            for update in range(int(highest(self.accelerator, last)) + 1):
                counted = lessons.expected(update) if streams else lessons.counted(update)
                denominator = total(self.accelerator, [counted])[0]
                rows = self._backward(lessons, update, denominator, sums)
                if streams:
                    found = total(self.accelerator, [lessons.counted(update)])[0]
                    self._rescale(denominator, found)
                    denominator = found
                num_decisions += denominator
                num_rows += rows
                if rows:
                    norms.append(self._step_optimizer())
        metrics = sums.reduce(self.accelerator, num_decisions)
        metrics["grad_norm"] = sum(norms) / max(len(norms), 1)
        if self.method.old_decay is not None:
            self.policy.weights.update_old(self.method.old_decay(self.num_updates))
        num_frozen += num_rows * len(self.method.objective.needs.sets)
        return StepResult(metrics, num_rows, num_frozen, int(num_decisions))

    def first_ratio_deviation(self, trajectory: Trajectory) -> float:
        """Largest |ratio - 1| of the stored decisions before any update, over all ranks."""
        data = trajectory.decisions
        if self.recompute_old_log_prob:
            data = self._recomputed(trajectory, data)
        again = self._recomputed(trajectory, data)
        deviation = torch.expm1(again.old_log_prob - data.old_log_prob)[data.mask].abs()
        return highest(self.accelerator, float(deviation.max()) if deviation.numel() else 0.0)

    def _backward(self, lessons: Lessons, update: int, denominator: float, sums: Sums) -> int:
        """Sums an update's gradient over the parts; the number of rows that it evaluated."""
        accelerator, num_rows = self.accelerator, 0
        numbers = lessons.parts_of(update)
        for number in numbers:
            is_last = number == numbers[-1]
            lesson = lessons[number]
            # The gradients of ranks are joined in the last backward, so there must be one.
            least = int(is_last and num_rows > 0 and accelerator.num_processes > 1)
            chunks = self._chunks(lesson, lesson.update == update, least)
            for position, (index, chunk) in enumerate(chunks):
                joins = is_last and position == len(chunks) - 1
                with nullcontext() if joins else accelerator.no_sync(self.network):
                    self._backward_chunk(lesson.trajectory, index, chunk, denominator, sums)
                num_rows += len(torch.unique(lesson.data.row[index]))
        return num_rows

    def _backward_chunk(
        self,
        trajectory: Trajectory,
        index: Tensor,
        chunk: Chunk,
        denominator: float,
        sums: Sums,
    ) -> None:
        new = self.policy.evaluate(trajectory, index)
        old, reference = (self._seen_by(s, trajectory, index) for s in ("old", "reference"))
        loss = weighted(self.method.objective(new, old, reference, chunk), chunk.weight)
        value = self.method.aggregate(loss.values, chunk.decisions.mask, denominator)
        if not torch.isfinite(value):
            raise _not_finite(new, chunk)
        # DDP averages the gradients of ranks; the denominator is of all ranks already.
        self.accelerator.backward(value * self.accelerator.num_processes)
        sums.add(loss, chunk.decisions.mask)

    def _rescale(self, expected: float, found: float) -> None:
        """The gradient over `found` decisions, of one over `expected`."""
        if found in (0, expected):
            return
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad *= expected / found

    def _step_optimizer(self) -> float:
        """One optimiser update; the gradient's norm before clipping."""
        accelerator = self.accelerator
        norm = float(accelerator.clip_grad_norm_(self.network.parameters(), self.max_grad_norm))
        # A grad scaler (fp16) meets infinities by design: it skips the update and scales down.
        if not norm < float("inf") and accelerator.scaler is None:
            raise NonFiniteError(
                f"the gradient's norm is {norm} although the loss is finite; nothing was updated. "
                "Try compute.mixed_precision=no, or lower optim.lr"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.num_updates += 1
        if self.num_updates % self.ema_every == 0:
            self.policy.weights.update_ema(self.num_updates // self.ema_every)
        return norm

    def _chunks(self, lesson: Lesson, mine: Tensor, least: int) -> list[tuple[Tensor, Chunk]]:
        """(index, chunk) pairs, as many on every rank: a rank with fewer adds masked ones.

        Decisions without an advantage, where the objective needs one, teach nothing: they are left
        out, and stay in the denominator.
        """
        data, advantage, negative = lesson.data, lesson.advantage, lesson.negative_advantage
        teaches = data.mask
        if self.method.objective.needs.advantage:
            has_one = advantage != 0
            if negative is not None:
                # Rewards that cancel teach once the ratio is beyond a bound, which stops one side.
                has_one = has_one | (negative != 0)
            teaches = data.mask & has_one
        live = (mine & teaches.flatten(1).any(1) if teaches.ndim > 1 else mine & teaches).nonzero()
        device = self.accelerator.device
        chunks = []
        for index in self._split(lesson.trajectory, live.flatten()):
            part = data.select(index).to(device)
            weight = None if lesson.weight is None else lesson.weight[index].to(device)
            blame = None if negative is None else negative[index].to(device)
            chunks.append((index, Chunk(part, advantage[index].to(device), weight, blame)))
        missing = int(highest(self.accelerator, max(len(chunks), least))) - len(chunks)
        if missing:
            first = data.select(torch.tensor([0])).to(device)
            masked = replace(first, mask=torch.zeros_like(first.mask))
            filler = Chunk(masked, torch.zeros_like(first.old_log_prob))
            chunks += [(torch.tensor([0]), filler)] * missing
        return chunks

    def _split(self, trajectory: Trajectory, index: Tensor) -> list[Tensor]:
        """The decisions at `index`, ascending, cut between units of the trajectory.

        A part has at most rows_per_chunk rows, unless a single unit has more.
        """
        unit = torch.unique_consecutive(trajectory.unit[index], return_inverse=True)[1]
        row = trajectory.decisions.row[index]
        is_new = torch.ones_like(row, dtype=torch.bool)
        is_new[1:] = row[1:] != row[:-1]
        sizes, rows = torch.bincount(unit).tolist(), torch.bincount(unit[is_new]).tolist()
        parts: list[int] = []
        room = 0
        for size, needed in zip(sizes, rows, strict=True):
            if needed > room:
                parts.append(0)
                room = self.rows_per_chunk
            parts[-1] += size
            room -= needed
        return list(index.split(parts)) if parts else []

    @torch.no_grad()
    def _recomputed(self, trajectory: Trajectory, data: Decisions) -> Decisions:
        """The decisions with log-probs of the current weights, scored in the chunks of training."""
        parts = self._split(trajectory, torch.arange(len(data.row)))
        fresh: list[Any] = [self.policy.evaluate(trajectory, index) for index in parts]
        data = replace(data, old_log_prob=torch.cat([each.log_prob.cpu() for each in fresh]))
        if data.old_mean is None:
            return data
        means = [each.transition_mean.cpu() for each in fresh if each.transition_mean is not None]
        return replace(data, old_mean=torch.cat(means))

    @torch.no_grad()
    def _seen_by(self, name: str, trajectory: Trajectory, index: Tensor) -> View | None:
        """A parameter set's view of the decisions; None where the objective does not need it."""
        if name not in self.method.objective.needs.sets:
            return None
        with self.policy.weights.use(name):
            return self.policy.evaluate(trajectory, index)


def weighted(loss: Loss, weight: Tensor | None) -> Loss:
    """The loss with its values times a weight per decision [E]; what is logged beside stays."""
    if weight is None:
        return loss
    return replace(loss, values=loss.values * like(weight, loss.values))


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sum of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64).to(accelerator.device)
    return accelerator.reduce(tensor, reduction="sum").tolist()  # type: ignore[no-any-return]


def highest(accelerator: Accelerator, value: float) -> float:
    """The highest of a value over all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64).to(accelerator.device)
    return float(accelerator.gather(tensor).max())


def _not_finite(new: View, chunk: Chunk) -> NonFiniteError:
    """Which of the chunk's ingredients is not finite, for the message."""
    mask = chunk.decisions.mask
    parts = {
        **new.scalars,
        "old_log_prob": chunk.decisions.old_log_prob,
        "advantage": chunk.advantage,
    }
    bad = {n: int((~torch.isfinite(v[mask])).sum()) for n, v in parts.items()}
    where = ", ".join(f"{count} of {name}" for name, count in bad.items() if count)
    where = where or "what is compared with another parameter set"
    sigma = chunk.decisions.sigma
    return NonFiniteError(
        f"the loss is not finite; of {int(mask.sum())} decisions at sigma {float(sigma.min()):.3g} "
        f"to {float(sigma.max()):.3g} these are not finite: {where}. Nothing was updated. Try "
        "compute.mixed_precision=no, a lower optim.lr, or fewer trained steps near sigma 0"
    )
