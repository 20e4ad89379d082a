"""Which samples a step trains on: a function of (seed, step, place in the batch) alone.

Samples are drawn without replacement, epoch after epoch, so a resumed run and one on more processes
see the same ones. Reading order: `numbers_of`, `Batches`, `batches_of`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from flowrl.data.seeds import derive_seed


@dataclass(frozen=True)
class Cut:
    """How a batch is cut up.

    Attributes:
        batch_size: samples per step, over all processes.
        micro_batch_size: samples per forward.
        rank, world_size: of this process, which takes every world_size-th micro-batch.
    """

    batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def total(self) -> int:
        """Micro-batches of a step."""
        return self.batch_size // self.micro_batch_size

    @property
    def own(self) -> range:
        """The micro-batches of this process, by their number in the step."""
        return range(self.rank, self.total, self.world_size)


def numbers_of(
    step: int, micro_batch: int, *, num_samples: int, cut: Cut, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Int64 [micro_batch_size]: the samples of a micro-batch, and their places in the whole run."""
    first = step * cut.batch_size + micro_batch * cut.micro_batch_size
    places = np.arange(first, first + cut.micro_batch_size)
    epochs, within = np.divmod(places, num_samples)
    numbers = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        numbers[chosen] = _order(num_samples, seed, int(epoch))[within[chosen]]
    return numbers, places


@lru_cache(maxsize=2)  # a micro-batch lies in one epoch or two
def _order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num_samples)


class Batches(Dataset[Any], ABC):
    """Micro-batches by (step, number in the step); a subclass says what a sample is.

    Attributes:
        cut: of a batch.
        seed: the run's.
        workers: processes that make them; 0 = this one.
    """

    cut: Cut
    seed: int
    workers: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """Samples there are."""

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The micro-batch, of which `numbers` says the samples."""

    def numbers(self, key: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Int64 [micro_batch_size]: a micro-batch's samples, and their places in the whole run."""
        return numbers_of(*key, num_samples=len(self), cut=self.cut, seed=self.seed)


def batches_of(batches: Batches, *, start: int, steps: int) -> Iterator[list[Any]]:
    """This process's micro-batches of every step from `start` on."""
    own = batches.cut.own
    keys = [(step, number) for step in range(start, steps) for number in own]
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,  # type: ignore[arg-type]
        num_workers=batches.workers,
        generator=torch.Generator(),  # it would otherwise draw from the global one
    )
    samples = iter(loader)
    for _ in range(start, steps):
        yield [next(samples) for _ in own]
