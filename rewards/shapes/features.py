"""What a small network sees in an image of the Shapes world: features to compare sets of images by.

A convolutional classifier of which shapes and colours are there and how many objects, trained on
clean renders (`flowrl/make/shapes_features.py`); the vector before its three heads is the feature.
It stands in for Inception where Inception's weights are not there. Distances by it compare with one
another, and with no published number.
"""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rewards.shapes.vocabulary import COLORS, IMAGE_SIZE, SHAPES

FOLDER = Path(__file__).parents[1] / "weights" / "shapes_features"
MAX_OBJECTS = 4  # on a canvas of the grammar
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


class Seen(NamedTuple):
    """Logits of what is on a canvas: every shape [B, 6], every colour [B, 7], number - 1 [B, 4]."""

    shapes: Tensor
    colors: Tensor
    number: Tensor


class ShapesFeatures(nn.Module):
    """Images float [B, 3, H, W] in [0, 1] -> features [B, dim]; other sizes are resized to 64 x 64.

    Args:
        channels: of the convolutions, each of stride 2.
        dim: of the features.
    """

    def __init__(self, channels: tuple[int, ...] = (24, 48, 64, 96), dim: int = 64) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "dim": dim}
        widths = (3, *channels)
        self.tower = nn.Sequential(*(_layer(a, b) for a, b in itertools.pairwise(widths)))
        # Means tell how much there is, maxima whether at all.
        self.features = nn.Sequential(nn.Linear(2 * channels[-1], dim), nn.SiLU())
        self.shapes = nn.Linear(dim, len(SHAPES))
        self.colors = nn.Linear(dim, len(COLORS))
        self.number = nn.Linear(dim, MAX_OBJECTS)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, dim]."""
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        seen = self.tower(images * 2 - 1)
        return self.features(torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], dim=-1))

    def classify(self, images: Tensor) -> Seen:
        """What is on the canvases."""
        features = self(images)
        return Seen(self.shapes(features), self.colors(features), self.number(features))

    def save(self, folder: Path) -> None:
        """Writes config and weights (float32) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()},
                  folder / _WEIGHTS)  # fmt: skip

    @classmethod
    def load(cls, folder: Path = FOLDER) -> "ShapesFeatures":
        """The frozen network of a folder that `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: the folder lacks a file.
        """
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"there is no {name} in {folder}; expected a folder written by "
                    "`python -m flowrl.make.shapes_features FOLDER`"
                )
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        network = cls(tuple(config["channels"]), config["dim"])
        network.load_state_dict(load_file(folder / _WEIGHTS))
        return network.eval().requires_grad_(False)


def _layer(before: int, after: int) -> nn.Module:
    conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.SiLU())
