"""How far reconstructions are from their originals, beyond pixels: features, LPIPS, objects.

Each gives a mean or distance with its 95 % interval, as a record {mean, low, high}.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.tokenizer.evaluation.metrics import (
    mean_interval,
    share_interval,
    statistic_interval,
)
from flowrl.tokenizer.evaluation.perceptual import Lpips
from flowrl.tokenizer.evaluation.samples import Samples
from rewards.shapes.detect import detect
from rewards.shapes.quality import frechet_distance
from rewards.shapes.vocabulary import IMAGE_SIZE

Record = dict[str, Any]

_MOST_RESAMPLED = 128  # features; a Frechet distance of more is too slow to be bootstrapped


def frechet(
    rows: Tensor, originals: Tensor, *, frames: int = 1, seed: int = 0, resamples: int = 100
) -> Record:
    """The Frechet distance of reconstructions to their originals; of clips, of their frames.

    Args:
        rows: features [N * F, D] of the reconstructions. The bootstrap resamples images or clips,
            both sides together; features wider than 128 get no interval.
        originals: features [N * F, D] of the originals, in the same order.
        frames: F, rows of one clip; 1 for images.
        seed: of the bootstrap.
        resamples: of it.
    """
    if rows.shape[1] > _MOST_RESAMPLED:
        return {"mean": frechet_distance(rows, originals), "low": None, "high": None}
    pairs = [each.unflatten(0, (-1, frames)) for each in (rows, originals)]

    def distance(index: Tensor) -> float:
        first, second = (each[index].flatten(0, 1) for each in pairs)
        return frechet_distance(first, second)

    return asdict(statistic_interval(distance, len(pairs[0]), seed=seed, num=resamples))


def lpips_mean(
    lpips: Lpips | None, drawn: Tensor, originals: Tensor, batch_size: int
) -> Record | None:
    """LPIPS, of clips the mean over frames; None where its weights are not there."""
    if lpips is None:
        return None
    device = lpips.shift.device
    values = []
    for first, second in zip(drawn.split(batch_size), originals.split(batch_size), strict=True):
        frames = (each.reshape(-1, *each.shape[-3:]).to(device) for each in (first, second))
        values.append(lpips(*frames).view(len(first), -1).mean(1).cpu())
    return asdict(mean_interval(torch.cat(values)))


def strict(images: Tensor, samples: Samples) -> Record | None:
    """Share of scenes of which the detector finds exactly the painted (shape, color) objects.

    Of a clip it has to find them in every frame. None where the objects are not known, or the
    canvas is not the 64 x 64 that the detector reads.
    """
    if samples.objects is None or images.shape[-3:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        return None
    clips: Any = images.reshape(len(images), -1, *images.shape[-3:]).numpy().astype(np.float64)
    hits = [
        all(
            tuple(sorted((each.shape, each.color) for each in detect(frame))) == wanted
            for frame in clip
        )
        for clip, wanted in zip(clips, samples.objects, strict=True)
    ]
    return asdict(share_interval(torch.tensor(hits)))
