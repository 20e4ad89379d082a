"""What a run of training has that is its own: how it measures, and what it exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """What an evaluation found.

    Attributes:
        metrics: key -> value.
        images: [N, 3, H, W] in [0, 1] on the CPU, shown as a grid.
        captions: N of them.
        columns: of the grid.
        name: of the grid.
    """

    metrics: dict[str, float]
    images: Tensor
    captions: Sequence[str]
    columns: int
    name: str


class Task(Protocol):
    """What `PretrainRun` asks of what is trained.

    `measure` is called on the main process with the averaged weights in place; `export` writes the
    model, with them, into an empty folder. `shown` are the metrics that a person sees.
    """

    shown: tuple[str, ...]

    def measure(self, *, progress: float, device: torch.device) -> Measured: ...
    def export(self, folder: Path, *, step: int, metrics: Mapping[str, float]) -> None: ...
