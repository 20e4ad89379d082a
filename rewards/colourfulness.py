"""Colourfulness: how much colour people see in an image, from the spread of two opponent axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.base import Metadata, check_images, finite_images
from rewards.cards import Card


def colourfulness(images: Tensor) -> Tensor:
    """The metric M3, float32 [B]: sigma_rgyb + 0.3 * mu_rgyb.

    Paper: Hasler and Suesstrunk, Measuring colourfulness in natural images, Proc. SPIE 5007, 2003,
    the third metric. rg = R - G, yb = (R + G) / 2 - B; sigma and mu are the lengths of the two
    axes' standard deviations and means over the pixels. On the paper's scale, 0 to 255: 15 is
    slightly colourful, 33 moderately, 45 averagely, 59 quite, 82 highly, 109 extremely. A common
    script takes absolute values of the axes first, which the paper does not: it says 206.5 of one
    red, one green and one blue pixel, M3 is 275.4.

    Args:
        images: float [B, 3, H, W] in [0, 1], sRGB.
    """
    red, green, blue = (255 * images.float()).unbind(1)
    axes = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)
    deviation = axes.std(dim=2, correction=0).norm(dim=1)
    score: Tensor = deviation + 0.3 * axes.mean(dim=2).norm(dim=1)
    return score


class Colourfulness:
    """Hasler and Suesstrunk's M3 of every image: 0 is grey, photographs are mostly below 110.

    It is easily raised by saturation alone: a monitor, or one of several rewards.
    """

    inputs = ("images",)
    scope = "sample"
    range = (0.0, float("inf"))
    higher_is_better = True
    differentiable = True
    card = Card(
        name="colourfulness",
        model="none",
        licence="none needed",
        paper="Hasler and Suesstrunk, Measuring colourfulness in natural images, SPIE 5007, 2003",
        inputs=inputs,
        range=range,
        parameters=0,
        preprocessing="none; values of 0 to 255, not rounded",
        verified="numbers by hand, and numpy on random images",
    )

    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind.
        """
        check_images(images)
        return colourfulness(images).where(finite_images(images), torch.nan)
