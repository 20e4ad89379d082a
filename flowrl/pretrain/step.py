"""One training step: micro-batches, backward, adversaries, and the optimisers' updates.

All draws of a micro-batch derive from (seed, step, its number in the step), and gradients are the
mean over micro-batches of all processes: how many processes there are does not change the result,
but for a codebook that moves with every forward. Reading order: `Learner.learn`, `_judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowrl.data.seeds import derive_seed
from flowrl.errors import NonFiniteError
from flowrl.pretrain.batches import Cut
from flowrl.pretrain.weights import TrainingWeights
from flowrl.train.step import total


@dataclass(frozen=True)
class Half:
    """A network with what trains it, all prepared by the accelerator.

    Attributes:
        network: gives losses.
        parameters: that are trained.
        optimizer, schedule: of them.
    """

    network: nn.Module
    parameters: Sequence[nn.Parameter]
    optimizer: Any
    schedule: Any

    def prepared(self, accelerator: Accelerator) -> Half:
        """The same, ready for the processes there are."""
        network, optimizer, schedule = accelerator.prepare(
            self.network, self.optimizer, self.schedule
        )
        return replace(self, network=network, optimizer=optimizer, schedule=schedule)


class Learner:
    """Trains a model with whatever helps it, and against them adversaries, if there are any.

    Args:
        accelerator: that prepared the halves.
        main: (sample, progress, generator) -> its loss, numbers to log by name, and an output for
            adversaries.
        adversary: (sample, output, progress) -> its loss, and losses by name; None = there is none.
        prepare: a micro-batch and the device -> the sample that the networks take.
        weights: whose average follows.
        cut: of a batch.
        seed: the run's.
        max_grad_norm: global norm to which gradients are cut, in each half.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        main: Half,
        adversary: Half | None,
        prepare: Callable[[Any, torch.device], Any],
        weights: TrainingWeights,
        cut: Cut,
        seed: int,
        max_grad_norm: float,
    ) -> None:
        self.accelerator = accelerator
        self.prepare = prepare
        self.main = main
        self.adversary = adversary
        self.weights = weights
        self.cut = cut
        self.seed = seed
        self.max_grad_norm = max_grad_norm

    def learn(self, batch: Iterable[Any], *, step: int, progress: float) -> dict[str, float]:
        """One update on this process's micro-batches.

        Returns:
            Means over the batch, of all processes.

        Raises:
            NonFiniteError: a loss or gradient is not finite; no weight was changed.
        """
        sums: dict[str, float] = {}
        judged = False
        own = self.cut.own
        for number, given in zip(own, batch, strict=True):
            sample = self.prepare(given, self.accelerator.device)
            generator = self._seeded(step, number)
            self._adversary_learns(False)
            with self._last(self.main, number == own[-1]):
                loss, numbers, output = self.main.network(sample, progress, generator)
                self.accelerator.backward(loss / len(own))
            if self.adversary is not None:
                found = self._judge(self.adversary, sample, output, progress, number == own[-1])
                judged = judged or bool(found)
                numbers |= found
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        means = self._mean(sums)
        self._refuse_nonfinite(means, step)
        halves = [self.main] if self.adversary is None else [self.main, self.adversary]
        moved = halves if judged else [self.main]
        norms = [self._clip(half, step) for half in moved]
        means["grad_norm"] = norms[0]
        for half in moved:
            half.optimizer.step()
            half.schedule.step()
        for half in halves:
            half.optimizer.zero_grad(set_to_none=True)
        self.weights.update_ema(step)
        return means

    def _judge(
        self, half: Half, sample: Any, output: Any, progress: float, is_last: bool
    ) -> dict[str, Tensor]:
        """Adds to the adversaries' gradients; the losses by name, none while all rest."""
        self._adversary_learns(True)
        with self._last(half, is_last):
            loss, losses = half.network(sample, output, progress)
            self.accelerator.backward(loss / len(self.cut.own))
        return {f"adversary/{name}": value.detach() for name, value in losses.items()}

    def _adversary_learns(self, flag: bool) -> None:
        """Whether gradients are kept for the adversaries; they always pass through them."""
        if self.adversary is not None:
            for parameter in self.adversary.parameters:
                parameter.requires_grad_(flag)

    def _last(self, half: Half, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes with the last micro-batch of a step."""
        return nullcontext() if is_last else self.accelerator.no_sync(half.network)

    def _seeded(self, step: int, number: int) -> torch.Generator:
        """The generator of a micro-batch; the global one is seeded for libraries that draw from it.

        vector-quantize-pytorch puts dead codes on features that it draws so.
        """
        torch.manual_seed(derive_seed(self.seed, "library", step, number))
        return torch.Generator().manual_seed(derive_seed(self.seed, "training", step, number))

    def _mean(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = sorted(sums)
        totals = total(self.accelerator, [sums[name] for name in names])
        return {name: value / self.cut.total for name, value in zip(names, totals, strict=True)}

    def _refuse_nonfinite(self, means: Mapping[str, float], step: int) -> None:
        losses = {n: v for n, v in means.items() if n.startswith(("loss", "adversary"))}
        bad = [name for name, value in losses.items() if not abs(value) < float("inf")]
        if bad:
            names = ", ".join(name for name in bad if "/" in name) or "their weighted sum"
            raise NonFiniteError(
                f"step {step + 1}: these losses are not finite: {names}. Nothing was updated; the "
                "last checkpoint stands. Try a lower optim.lr, optim.warmup_steps, or "
                "compute.mixed_precision=no"
            )

    def _clip(self, half: Half, step: int) -> float:
        """Cuts a half's gradient; its norm before."""
        norm = float(self.accelerator.clip_grad_norm_(half.parameters, self.max_grad_norm))
        if not abs(norm) < float("inf"):
            raise NonFiniteError(
                f"step {step + 1}: the losses are finite, but the gradient's norm is {norm}. "
                "Nothing was updated; the last checkpoint stands. Try a lower optim.lr, or "
                "compute.mixed_precision=no"
            )
        return norm
