"""The rewards of a run, called together: each gets what it declared, and what it gives is checked.

A sample that a reward could not score is invalid: counted, masked, never a zero. A call that fails
is tried again and then halved (`attempts.py`); a reward that breaks its promise stops the run
(`border.py`), as does one that fails too often (`collect.py`); `probe` finds most of that before
the first step. How rewards are summed is the method's affair (`functional.advantages`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import ConfigError, RewardError
from flowrl.protocols import Reward
from flowrl.train.attempts import Patience, joined, scored, tried
from flowrl.train.border import (
    SCORE,
    check_declaration,
    check_output,
    check_samples,
    show_inputs,
)
from flowrl.train.workers import Worker
from flowrl.types import Failures, Prompt, PromptBatch, Rollout, Scores


@dataclass(frozen=True)
class Found:
    """What one reward says of N samples.

    Attributes:
        values: "score" and the names of its components -> [N], NaN where not finite or lost.
        failures: what failed on the way.
        seconds: that it took.
    """

    values: dict[str, Tensor]
    failures: Failures
    seconds: float


class RewardSet:
    """The rewards of a run, called together.

    Args:
        rewards: (name, reward, weight) each. Weight 0 makes a monitor: measured, absent from
            `Scores.weights`, and never a reason for a sample to be invalid. There may be none at
            all, where pairs of a data set teach.
        batch_size: samples per call of a reward of scope "sample"; None = all at once. A reward of
            scope "group" is called once per group, with all samples of it that the batch has.
        patience: with calls that fail.
        provides: what the model makes, of `border.INPUTS`.

    Raises:
        ConfigError: a name used twice, a weight that is not finite.
        RewardError: a reward that declares something that does not exist, or is not made.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, Reward, float]],
        *,
        batch_size: int | None = None,
        patience: Patience | None = None,
        provides: Sequence[str] = ("images", "latents"),
    ) -> None:
        names = [name for name, _, _ in rewards]
        for name, reward, weight in rewards:
            if names.count(name) > 1:
                raise ConfigError(f"the reward '{name}' is given twice; keep one")
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of reward '{name}' must be finite, got {weight}")
            check_declaration(name, reward, provides)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size of the rewards must be at least 1, got {batch_size}")
        self.names = tuple(names)
        self.weights = {name: float(weight) for name, _, weight in rewards if weight}
        self._rewards = {name: reward for name, reward, _ in rewards}
        self._batch_size = batch_size
        self._patience = patience or Patience()
        self._workers: dict[str, Worker] = {}

    @property
    def inputs(self) -> frozenset[str]:
        """What some reward reads."""
        return frozenset(name for reward in self._rewards.values() for name in reward.inputs)

    @property
    def group_scope(self) -> tuple[str, ...]:
        """The rewards that compare the samples of a group, which must lie on one rank."""
        return tuple(name for name, reward in self._rewards.items() if reward.scope == "group")

    def score(self, batch: PromptBatch, **samples: Any) -> Scores:
        """Every reward of every sample; float32 on the CPU, detached.

        Args:
            batch: the prompts.
            samples: what was made for them, by name: images float32 [N, 3, H, W] in [0, 1] and so
                on (`border.check_samples`), on the CPU.

        Returns:
            Scores with NaN where a reward gave NaN or infinity, or could not be called; `valid` is
            False where a reward with a weight is NaN.

        Raises:
            ShapeError: samples of another shape, dtype, device or range than stated.
            RewardError: a reward returned what is not float [n], on the CPU, within its range.
        """
        check_samples(samples, len(batch))
        found = {name: self._score_one(name, samples, batch) for name in self.names}
        return self._scores(found, len(batch))

    def start(self, batch: PromptBatch, **samples: Any) -> Callable[[], Scores]:
        """As `score`, in the background, every reward beside the others; the result waits for it.

        Calls of one reward keep their order, and none begins before the one before has ended.
        """
        check_samples(samples, len(batch))
        answers = {}
        for name in self.names:
            if name not in self._workers:
                self._workers[name] = Worker(name)
            answers[name] = self._workers[name].submit(
                partial(self._score_one, name, samples, batch)
            )

        def wait() -> Scores:
            found = {name: answer.result() for name, answer in answers.items()}
            return self._scores(found, len(batch))

        return wait

    def _scores(self, found: Mapping[str, Found], num: int) -> Scores:
        """What every reward found, together."""
        rewards = {name: each.values[SCORE] for name, each in found.items()}
        valid = torch.ones(num, dtype=torch.bool)
        for name in self.weights:
            valid &= rewards[name].isfinite()
        return Scores(
            rewards,
            dict(self.weights),
            valid,
            {
                f"{name}/{key}": values
                for name, each in found.items()
                for key, values in each.values.items()
                if key != SCORE
            },
            {name: each.failures for name, each in found.items() if each.failures.calls},
            {name: each.seconds for name, each in found.items()},
        )

    def probe(self, prompt: Prompt, **samples: Any) -> dict[str, Tensor]:
        """Call every reward on two samples of one group, before anything is trained.

        Loads the rewards' models and finds wrong counts, dtypes, shapes, devices and ranges.

        Args:
            prompt: of both; a training prompt, with the metadata that rewards will meet.
            samples: as `score`'s, N = 2, e.g. two samples of the model.

        Returns:
            name -> [2]; NaN where a reward could not score the sample, which is allowed.

        Raises:
            ShapeError, RewardError: as `score`; a reward that raised, with the original chained.
        """
        batch = pair_of(prompt)
        check_samples(samples, len(batch))
        return {name: self._probe_one(name, samples, batch) for name in self.names}

    def _probe_one(self, name: str, samples: Mapping[str, Any], batch: PromptBatch) -> Tensor:
        """The scores [N] of one call; what it raises says with what it was called."""
        everyone = torch.arange(len(batch))

        def call() -> dict[str, Tensor]:
            return self._call(name, samples, batch, everyone)

        try:
            return tried(call, self._patience, Failures())[SCORE]
        except RewardError:
            raise
        except Exception as error:
            given = show_inputs(self._inputs(name, samples, batch, everyone))
            raise RewardError(
                f"reward '{name}' raised {type(error).__name__}: {error} (called with {given}); "
                "correct the reward or the prompts' metadata"
            ) from error

    def describe(self) -> list[tuple[str, str]]:
        """Rows (name, what it is), for printing before step 0."""
        rows = []
        for name, reward in self._rewards.items():
            role = f"weight {self.weights[name]:g}" if name in self.weights else "monitor"
            low, high = reward.range
            takes = " + ".join(reward.inputs)
            rows.append((name, f"{role}; {takes}, per {reward.scope}, in [{low:g}, {high:g}]"))
        return rows

    def _score_one(self, name: str, samples: Mapping[str, Any], batch: PromptBatch) -> Found:
        """What one reward says of all samples."""
        started = time.perf_counter()
        reward, failures = self._rewards[name], Failures()
        parts, order = [], []
        for index in self._calls(reward, batch):
            order.append(index)
            parts.append(
                scored(
                    lambda chosen: self._call(name, samples, batch, chosen),
                    index,
                    is_divisible=reward.scope == "sample",
                    patience=self._patience,
                    failures=failures,
                )
            )
        back = torch.argsort(torch.cat(order))
        together = joined(parts, [len(index) for index in order])
        values = {key: values[back] for key, values in together.items()}
        return Found(values, failures, time.perf_counter() - started)

    def _call(
        self, name: str, samples: Mapping[str, Any], batch: PromptBatch, index: Tensor
    ) -> dict[str, Tensor]:
        """One call, checked."""
        reward = self._rewards[name]
        inputs = self._inputs(name, samples, batch, index)
        with torch.no_grad():  # of this thread
            return check_output(name, reward, reward.score(**inputs), len(index))

    def _inputs(
        self, name: str, samples: Mapping[str, Any], batch: PromptBatch, index: Tensor
    ) -> dict[str, Any]:
        """What the reward declared, of the samples at `index`."""
        chosen = index.tolist()
        available: dict[str, Any] = {
            "prompts": [batch.prompts[i].text for i in chosen],
            "metadata": [batch.prompts[i].metadata for i in chosen],
        }
        for key, values in samples.items():
            # A copy: what a reward does to it stays there.
            available[key] = (
                values[index] if isinstance(values, Tensor) else [values[i] for i in chosen]
            )
        return {key: available[key] for key in self._rewards[name].inputs}

    def _calls(self, reward: Reward, batch: PromptBatch) -> Iterator[Tensor]:
        """The samples of each call, int64 [n]."""
        if reward.scope == "group":
            for group in sorted(set(batch.group_id.tolist())):
                yield (batch.group_id == group).nonzero().flatten()
        else:
            size = self._batch_size or max(len(batch), 1)
            for start in range(0, len(batch), size):
                yield torch.arange(start, min(start + size, len(batch)))


def read_samples(rollout: Rollout, inputs: Collection[str]) -> dict[str, Tensor]:
    """What was drawn as rewards read it, on the CPU; images are decoded only if one does."""
    samples = {}
    if "images" in inputs:
        samples["images"] = rollout.images
    if "latents" in inputs:
        samples["latents"] = rollout.latents.float().cpu()
    return samples


def pair_of(prompt: Prompt) -> PromptBatch:
    """Two samples of one group, for the prompt."""
    return PromptBatch.one_group((prompt, prompt))
