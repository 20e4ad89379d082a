"""Finds the objects on a canvas of the Shapes world: what, which colour, where, and how well drawn.

Everything that differs visibly from the canvas belongs to a connected component. A component is
written as one paint laid over the canvas with some opacity per pixel; the opacity is compared with
the six shapes of the vocabulary at its own area and centroid, and the paint with the seven colours.
A component that no shape and no single colour explains is "unknown", never the nearest guess: a
reward that guesses pays for smears. Read `detect`, then `_fit`, then `_is_clean`.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2lab

from rewards.shapes.vocabulary import BACKGROUND_RANGE, COLORS, IMAGE_SIZE, SHAPES

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

UNKNOWN = "unknown"
VISIBLE = 0.15  # distance from the canvas, in RGB, from which a pixel counts as painted
SOLID = 0.35  # distance from which it belongs to an object's body: a third to half of full paint
MIN_AREA = 12  # pixels; smaller specks are ignored
MIN_SHAPE_AREA = 30  # pixels; between the two something is there, but nothing tells a shape
MAX_OBJECTS = 16  # the largest are looked at, as in GenEval; bounds the time spent on noise
# Least soft IoU with the shape: between what the likeliest other shape shares with it (0.84, 0.84,
# 0.69, 0.65, 0.70, 0.48) and the worst of 2,700 pictures from a VAE (.96, .95, .91, .81, .87, .88).
MIN_OVERLAP = {"circle": 0.90, "square": 0.90, "triangle": 0.82, "star": 0.75, "cross": 0.80,
               "ring": 0.78}  # fmt: skip
MAX_SOFTNESS = 3.0  # width of the edge in pixels; 1 anti-aliased, 1.9 at a blur of 0.5, 3.6 at 2.0
MAX_UNEVENNESS = 0.15  # rms of the paint inside, as a share of its distance from the canvas
MAX_COLOR_DISTANCE = 24.0  # CIE76 from the nearest colour of the vocabulary
_AROUND = np.ones((3, 3), bool)
_EXTENT, _GRID = 1.25, 640  # the templates: half a side in units of the radius, and its samples


@dataclass(frozen=True)
class Detection:
    """One object found on a canvas.

    Attributes:
        shape: a shape of the vocabulary, or "unknown" for what is not a clean shape of one colour.
        color: the nearest colour of the vocabulary, also for unknown objects.
        box: (x0, y0, x1, y1) in pixels, ends excluded.
        center: (x, y) of the painted area, in pixels.
        area: painted area in pixels.
        score: overlap with the best shape, in [0, 1].
    """

    shape: str
    color: str
    box: tuple[int, int, int, int]
    center: tuple[float, float]
    area: float
    score: float


@dataclass(frozen=True)
class _Templates:
    """The shapes at radius 1.

    Attributes:
        distance: to the edge, positive inside, [S, G, G].
        area: [S].
        perimeter: [S], of all edges.
        centroid: (x, y), [S, 2].
    """

    distance: NDArray[np.float32]
    area: Array
    perimeter: Array
    centroid: Array


@dataclass(frozen=True)
class _Fit:
    """A component and its best shape; `paint` is the RGB colour, the rest as in `Detection`."""

    shape: str
    paint: Array
    box: tuple[int, int, int, int]
    center: tuple[float, float]
    area: float
    overlap: float
    softness: float
    unevenness: float


def detect(image: NDArray[np.floating]) -> list[Detection]:
    """The objects of one image, best drawn first.

    Args:
        image: float [3, 64, 64] in [0, 1].

    Returns:
        One `Detection` per visible component of at least `MIN_AREA` pixels, `MAX_OBJECTS` at most.

    Raises:
        ValueError: for another shape, or for values that are not finite.
    """
    if image.shape != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"expected one image [3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(image.shape)}; "
            "the Shapes detector reads no other size"
        )
    if not np.isfinite(image).all():
        raise ValueError("expected finite pixels in [0, 1], got NaN or infinity")
    canvas = np.moveaxis(image, 0, -1).astype(np.float64)
    background = background_color(canvas)
    difference = canvas - background
    labels = _components(np.linalg.norm(difference, axis=-1))
    areas = np.bincount(labels.ravel())
    boxes = ndimage.find_objects(labels)
    largest = [i for i in 1 + np.argsort(-areas[1:]) if areas[i] >= MIN_AREA][:MAX_OBJECTS]
    fits = [_fit(difference, labels, int(i), boxes[i - 1], background) for i in largest]
    if not fits:
        return []
    found = [_name(fit, color) for fit, color in zip(fits, _nearest_colors(fits), strict=True)]
    return sorted(found, key=lambda detection: -detection.score)


def background_color(canvas: Array) -> Array:
    """The canvas's colour: the median of its border, held near the greys of the vocabulary.

    A border of another colour therefore becomes a component, and an unknown one.
    """
    border = np.concatenate([canvas[0], canvas[-1], canvas[:, 0], canvas[:, -1]])
    median = np.median(border, axis=0)
    grey = np.clip(median.mean(), *BACKGROUND_RANGE)
    return np.asarray(grey + np.clip(median - grey, -0.06, 0.06))


def _components(strength: Array) -> NDArray[np.int32]:
    """Labels [H, W] of the painted components, 0 for the canvas, from the distances to the canvas.

    A component is a connected body with the visible pixels up to two away from it, so that two
    squares whose corners all but meet stay two. Visible pixels without a body are components too.
    """
    visible = strength > VISIBLE
    labels, count = ndimage.label(strength > SOLID)
    labels = np.where(visible & (labels == 0), ndimage.maximum_filter(labels, 5), labels)
    faint, _ = ndimage.label(visible & (labels == 0), structure=_AROUND)
    return np.asarray(np.where(faint > 0, faint + count, labels), dtype=np.int32)


def _fit(
    difference: Array,
    labels: NDArray[np.int32],
    index: int,
    where: tuple[slice, slice],
    background: Array,
) -> _Fit:
    """Explains component `index` by one paint and one shape.

    Args:
        difference: [H, W, 3], image minus canvas colour.
        labels: [H, W] component of every pixel, 0 for the canvas.
        index: the component.
        where: its bounding box.
        background: [3], the canvas's colour.
    """
    rows, columns = (slice(max(s.start - 2, 0), min(s.stop + 2, IMAGE_SIZE)) for s in where)
    label, offset = labels[rows, columns], difference[rows, columns]
    own = label == index
    # Half-covered edge pixels may lie under the threshold: look one pixel further.
    near = ndimage.binary_dilation(own, _AROUND) & (own | (label == 0))
    paint = _paint(offset[own])
    energy = float(paint @ paint)
    opacity = (offset @ paint) / energy * near
    area = max(float(opacity.sum()), 1.0)
    ys, xs = np.arange(rows.start, rows.stop) + 0.5, np.arange(columns.start, columns.stop) + 0.5
    center = (float(opacity.sum(0) @ xs) / area, float(opacity.sum(1) @ ys) / area)
    solid = np.argwhere(opacity > 0.5)
    low, high = (solid.min(0), solid.max(0) + 1) if len(solid) else ((0, 0), own.shape)
    box = (columns.start + int(low[1]), rows.start + int(low[0]),
           columns.start + int(high[1]), rows.start + int(high[0]))  # fmt: skip
    if own.sum() < MIN_SHAPE_AREA:
        return _Fit(UNKNOWN, background + paint, box, center, area, 0.0, 0.0, 0.0)

    overlaps, softnesses, depth = _overlaps(np.clip(opacity, 0, 1), near, area, center, xs, ys)
    best = int(overlaps.argmax())
    inside = depth[best] > 1.2
    residual = ((offset[inside] - paint) ** 2).sum(-1) / energy
    unevenness = float(np.sqrt(residual.mean())) if residual.size else 1.0
    name = list(SHAPES)[best]
    return _Fit(name, background + paint, box, center, area, float(overlaps[best]),
                float(softnesses[best]), unevenness)  # fmt: skip


def _paint(offsets: Array) -> Array:
    """The colour of a component, relative to the canvas: the median of its most opaque pixels."""
    strength = np.linalg.norm(offsets, axis=-1)
    opaque = strength > 0.75 * np.percentile(strength, 80)
    return np.asarray(np.median(offsets[opaque], axis=0))


def _overlaps(
    opacity: Array, near: Mask, area: float, center: tuple[float, float], xs: Array, ys: Array
) -> tuple[Array, Array, Array]:
    """Compares an opacity mask with every shape of the same area and centroid.

    Returns:
        soft IoU [S]; width of the edge in pixels [S], if this were the shape; depth of every pixel
        below the shape's edge, in pixels [S, h, w].
    """
    templates = _templates()
    radius = np.sqrt(area / templates.area)
    origin = np.array(center) - radius[:, None] * templates.centroid
    scale = _GRID / (2 * _EXTENT)
    # [S, w] and [S, h]: where the template has the pixel centres.
    columns, rows = (
        np.clip(((t - origin[:, [axis]]) / radius[:, None] + _EXTENT) * scale, 0, _GRID - 1).astype(
            np.intp
        )
        for axis, t in enumerate((xs, ys))
    )
    shapes = np.arange(len(radius))[:, None, None]
    unscaled = templates.distance[shapes, rows[:, :, None], columns[:, None, :]]
    depth = np.asarray(unscaled * radius[:, None, None], dtype=np.float64)
    # An edge of width w crosses all opacities o evenly: the mean of 4 o (1 - o) over it is 2/3.
    fuzz = float((4 * opacity * (1 - opacity))[near].sum())
    softness = 1.5 * fuzz / (templates.perimeter * radius)
    expected = np.clip(0.5 + depth / np.clip(softness, 1.0, 3.0)[:, None, None], 0, 1)
    shared = np.minimum(expected, opacity).sum((1, 2))
    either = np.maximum(expected, opacity).sum((1, 2))
    return np.asarray(shared / either), softness, depth


def _is_clean(fit: _Fit, color_distance: float) -> bool:
    """Whether a component is one shape of one colour of the vocabulary with a sharp edge."""
    return (
        fit.overlap >= MIN_OVERLAP.get(fit.shape, 1.0)
        and fit.softness <= MAX_SOFTNESS
        and fit.unevenness <= MAX_UNEVENNESS
        and color_distance <= MAX_COLOR_DISTANCE
    )


def _name(fit: _Fit, color: tuple[str, float]) -> Detection:
    shape = fit.shape if _is_clean(fit, color[1]) else UNKNOWN
    return Detection(shape, color[0], fit.box, fit.center, fit.area, fit.overlap)


def _nearest_colors(fits: list[_Fit]) -> list[tuple[str, float]]:
    """The nearest colour of the vocabulary to each paint and its distance in CIE Lab (CIE76)."""
    paints = np.clip([fit.paint for fit in fits], 0, 1)
    distances = np.linalg.norm(rgb2lab(paints)[:, None] - _palette(), axis=-1)
    names = list(COLORS)
    return [(names[int(row.argmin())], float(row.min())) for row in distances]


@cache
def _palette() -> Array:
    """The vocabulary's colours in CIE Lab, [C, 3]."""
    return np.asarray(rgb2lab(np.array(list(COLORS.values()))))


@cache
def _templates() -> _Templates:
    """Tabulates the shapes of the vocabulary at radius 1, once per process (0.2 s)."""
    pixel = 2 * _EXTENT / _GRID
    t = np.asarray((np.arange(_GRID) + 0.5) * pixel - _EXTENT, dtype=np.float64)
    distances, areas, perimeters, centroids = [], [], [], []
    for is_inside in SHAPES.values():
        mask = is_inside(t[None, :], t[:, None])
        inner, outer = (ndimage.distance_transform_edt(m) * pixel for m in (mask, ~mask))
        distance = np.where(mask, inner - pixel / 2, pixel / 2 - outer)
        area = mask.sum() * pixel**2
        distances.append(distance.astype(np.float32))
        areas.append(area)
        # Points within h of a curve of length L fill 2 h L.
        perimeters.append((np.abs(distance) < 0.05).sum() * pixel**2 / 0.1)
        centroids.append(((mask * t).sum() * pixel**2 / area,
                          (mask * t[:, None]).sum() * pixel**2 / area))  # fmt: skip
    return _Templates(
        np.stack(distances),
        np.array(areas, np.float64),
        np.array(perimeters, np.float64),
        np.array(centroids, np.float64),
    )
