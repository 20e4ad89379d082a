"""Micro-batches of images or clips, cut and mirrored as a config says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowrl.data.seeds import derive_seed
from flowrl.pretrain.batches import Batches, Cut
from flowrl.tokenizer.files import Shape
from flowrl.tokenizer.images import ImageSource, Tensors


class ImageBatches(Batches):
    """Micro-batches by (step, number in the step), uint8 [B, *shape].

    Args:
        source: of the images.
        shape: of a sample.
        cut: of a batch.
        seed: the run's.
        random_crop: else the centre is cut.
        flip: mirror every other image, or clip.
        workers: processes that read them; 0 = this one.
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
        workers: int = 0,
    ) -> None:
        self.source = source
        self.shape = shape
        self.cut = cut
        self.seed = seed
        self.random_crop = random_crop
        self.flip = flip
        self.workers = workers

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        numbers, places = self.numbers(key)
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
