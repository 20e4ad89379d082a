"""How clean a picture of the Shapes world is, and gold: right and clean at once.

A clean render is a grey canvas with flat objects of the palette and sharp edges. Four numbers say
how far an image is from that (`artefacts`), and `quality` is exp(-their excess over clean renders).
Both read pixels only, never the prompt. `frechet_distance` compares two sets of images instead.
Reading order: `artefacts`, `quality`, `ShapesQuality`, `ShapesGold`.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import label, perimeter
from torch import Tensor

from rewards.base import Metadata
from rewards.shapes.detect import MIN_SHAPE_AREA, SOLID, VISIBLE, background_color
from rewards.shapes.reward import ShapesReward, check_canvases
from rewards.shapes.vocabulary import COLORS

Array = NDArray[np.float64]
_BRIGHTNESS = (0.93, 0.99, 1.05)  # the renderer's range, in steps finer than `_CLEAN.palette`


@dataclass(frozen=True)
class Artefacts:
    """What an image has that a clean render has not; all are 0 on a blank canvas.

    Attributes:
        palette: mean distance in RGB of painted pixels from any mix of the canvas and one colour of
            the palette.
        canvas: rms distance in RGB of the other pixels from the canvas's colour.
        softness: width of the edges in pixels: sum of 1.5 * 4 o (1 - o), with o the opacity, over
            the length of the outline; about 1 where anti-aliased.
        leftovers: share of painted pixels in components without the body of a shape.
    """

    palette: float
    canvas: float
    softness: float
    leftovers: float


# The 99.5th percentile of 400 renders (`verify.renders`, seed 7): up to there as good as clean.
_CLEAN = Artefacts(palette=0.031, canvas=0.013, softness=1.55, leftovers=0.0)
# The excess that costs a factor e.
_SCALE = Artefacts(palette=0.10, canvas=0.05, softness=1.2, leftovers=0.25)


def artefacts(image: NDArray[np.floating]) -> Artefacts:
    """Measures one image float [3, H, W] in [0, 1], all values finite."""
    pixels = np.moveaxis(image, 0, -1).astype(np.float64)
    canvas = background_color(pixels)
    offset = pixels - canvas
    strength = np.linalg.norm(offset, axis=-1)
    visible = strength > VISIBLE
    rest = float(np.sqrt((strength[~visible] ** 2).mean())) if not visible.all() else 0.0
    if not visible.any():
        return Artefacts(0.0, rest, 0.0, 0.0)
    opacity, distance = _nearest_mix(offset, _paints() - canvas)
    fuzz = float((4 * opacity * (1 - opacity))[visible].sum())
    # A canvas of haze has no outline: one pixel of it, so that its softness is large, not infinite.
    outline = max(float(perimeter(visible & (opacity > 0.5))), 1.0)
    return Artefacts(
        palette=float(distance[visible].mean()),
        canvas=rest,
        softness=1.5 * fuzz / outline,
        leftovers=_leftovers(visible, strength > SOLID),
    )


def quality(image: NDArray[np.floating]) -> float:
    """exp(-sum of the artefacts beyond a clean render's, each over its scale), in (0, 1].

    Measured, mean of 400 renders (seed 7): 0.999 as they are, 0.978 after the embedded VAE; blurred
    by 1 pixel 0.27; with noise of 0.02 and 0.05 0.64 and 0.10; saturation times 1.2 and 1.8 0.67
    and 0.26, times 0.6 0.16. A blank canvas is clean: 1.
    """
    excess = (
        max(0.0, value - clean) / scale
        for value, clean, scale in zip(
            astuple(artefacts(image)), astuple(_CLEAN), astuple(_SCALE), strict=True
        )
    )
    return float(np.exp(-sum(excess)))


def _nearest_mix(offset: Array, paints: Array) -> tuple[Array, Array]:
    """The nearest mix t * paint of any of `paints` [P, 3] to every `offset` [H, W, 3].

    Returns:
        t [H, W] in [0, 1], and the distance to the mix [H, W].
    """
    energy = (paints**2).sum(-1)
    mix = np.clip(offset @ paints.T / energy, 0, 1)
    # |offset - t paint|^2, with t clipped.
    squared = (offset**2).sum(-1, keepdims=True) - 2 * mix * (offset @ paints.T) + mix**2 * energy
    best = squared.argmin(-1)[..., None]
    nearest = np.take_along_axis(squared, best, -1)[..., 0]
    return np.take_along_axis(mix, best, -1)[..., 0], np.sqrt(np.maximum(nearest, 0))


def _leftovers(visible: NDArray[np.bool_], solid: NDArray[np.bool_]) -> float:
    """Share of visible pixels in components with less than `MIN_SHAPE_AREA` of solid paint."""
    labels = label(visible, connectivity=2).ravel()
    sizes = np.bincount(labels)[1:]
    bodies = np.bincount(labels, weights=solid.ravel())[1:]
    return float(sizes[bodies < MIN_SHAPE_AREA].sum() / sizes.sum())


@cache
def _paints() -> Array:
    """The palette at the renderer's levels of brightness, RGB [P, 3]."""
    colors = np.array(list(COLORS.values()))
    return np.concatenate([np.clip(colors * level, 0, 1) for level in _BRIGHTNESS])


class ShapesQuality:
    """How clean a 64 x 64 image is: `quality`, whatever its prompt. Made to be a monitor."""

    inputs = ("images",)
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True

    def score(self, *, images: Tensor) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, 64, 64] in [0, 1]; NaN where not finite.

        Raises:
            ValueError: for images of another size.
        """
        check_canvases(images)
        arrays = images.detach().cpu().float().numpy()
        scores = [quality(each) if np.isfinite(each).all() else float("nan") for each in arrays]
        return torch.tensor(scores, dtype=torch.float32)


class ShapesGold:
    """Strict score times quality: what an honest judge wants, to be set against a proxy."""

    inputs = ("images", "metadata")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self) -> None:
        self._strict, self._quality = ShapesReward(graded=False), ShapesQuality()

    def score(self, *, images: Tensor, metadata: Sequence[Metadata]) -> Tensor:
        """Scores, float32 [B]; NaN where not finite. Args and Raises: as `ShapesReward.score`."""
        strict = self._strict.score(images=images, metadata=metadata)
        return strict * self._quality.score(images=images)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of feature vectors.

    Paper: FID, arXiv:1706.08500, eq. 6. Differs: the features are the caller's. For the Shapes
    world they are the posterior means of the embedded VAE's encoder (4 x 16 x 16, averaged over
    cells of 4 x 4 to 64 numbers), which the caller computes: rewards load no pipeline.

    Args:
        features_a: float [N, D]; take N well above D, or the covariance is singular and biased.
        features_b: float [M, D].

    Returns:
        The distance, 0 for equal sets; computed in float64, covariances over N - 1.

    Raises:
        ValueError: shapes that do not match, fewer than two rows, or values that are not finite.
    """
    shapes = f"{list(features_a.shape)} and {list(features_b.shape)}"
    if features_a.ndim != 2 or features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"expected features [N, D] and [M, D], got {shapes}")
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(f"expected two rows or more on each side, got {shapes}")
    sets = [features.detach().double() for features in (features_a, features_b)]
    if not all(features.isfinite().all() for features in sets):
        raise ValueError("expected finite features, got NaN or infinity")
    (mean_a, mean_b), (cov_a, cov_b) = zip(*((f.mean(0), f.T.cov()) for f in sets), strict=True)
    cov_a, cov_b = (cov.reshape(len(mean_a), len(mean_a)) for cov in (cov_a, cov_b))
    # (C_a C_b)^(1/2) has the trace of (A C_b A)^(1/2) with A = C_a^(1/2), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(0.0, float(distance))  # rounding leaves about -1e-15 for equal sets
