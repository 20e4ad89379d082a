"""Which images a step trains on: a function of (seed, step, place in the batch) alone.

Images are drawn without replacement, epoch after epoch, so a resumed run and one on more processes
see the same ones. Reading order: `numbers_of`, `Batches`, `batches_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowrl.data.seeds import derive_seed
from flowrl.tokenizer.files import Shape
from flowrl.tokenizer.images import ImageSource, Tensors


@dataclass(frozen=True)
class Cut:
    """How a batch is cut up.

    Attributes:
        batch_size: images per step, over all processes.
        micro_batch_size: images per forward.
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
    step: int, micro_batch: int, *, num_images: int, cut: Cut, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Int64 [micro_batch_size]: the images of a micro-batch, and their places in the whole run."""
    first = step * cut.batch_size + micro_batch * cut.micro_batch_size
    places = np.arange(first, first + cut.micro_batch_size)
    epochs, within = np.divmod(places, num_images)
    numbers = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        numbers[chosen] = _order(num_images, seed, int(epoch))[within[chosen]]
    return numbers, places


@lru_cache(maxsize=2)  # a micro-batch lies in one epoch or two
def _order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(num_images)


class Batches(Dataset[Tensor]):
    """Micro-batches by (step, number in the step), uint8 [B, *shape].

    Args:
        source: of the images.
        shape: of a sample.
        cut: of a batch.
        seed: the run's.
        random_crop: else the centre is cut.
        flip: mirror every other image, or clip.
    """

    def __init__(
        self,
        source: ImageSource,
        shape: Shape,
        cut: Cut,
        *,
        seed: int,
        random_crop: bool = False,
        flip: bool = False,
    ) -> None:
        self.source = source
        self.shape = shape
        self.cut = cut
        self.seed = seed
        self.random_crop = random_crop
        self.flip = flip

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        numbers, places = numbers_of(
            *key, num_images=len(self.source), cut=self.cut, seed=self.seed
        )
        draws = np.random.default_rng(derive_seed(self.seed, "crop", int(places[0])))
        cuts = draws.random((len(numbers), 2)) if self.random_crop else None
        mirrored = draws.random(len(numbers)) < 0.5 if self.flip else None
        if isinstance(self.source, Tensors):
            images = self.source.images[torch.from_numpy(numbers)]
        else:
            at = [(0.5, 0.5)] * len(numbers) if cuts is None else [(r, c) for r, c in cuts]
            images = torch.stack(
                [
                    self.source.read(int(number), self.shape, place)
                    for number, place in zip(numbers, at, strict=True)
                ]
            )
        if mirrored is not None:
            chosen = torch.from_numpy(mirrored)
            images[chosen] = images[chosen].flip(-1)
        return images


def batches_of(batches: Batches, *, start: int, steps: int, workers: int) -> Iterator[list[Tensor]]:
    """This process's micro-batches of every step from `start` on."""
    own = batches.cut.own
    keys = [(step, number) for step in range(start, steps) for number in own]
    loader: DataLoader[Tensor] = DataLoader(
        batches,
        batch_size=None,
        sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        generator=torch.Generator(),  # it would otherwise draw from the global one
    )
    images = iter(loader)
    for _ in range(start, steps):
        yield [next(images) for _ in own]
