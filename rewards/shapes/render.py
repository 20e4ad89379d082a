"""Draws scenes of the Shapes world: 64 x 64, anti-aliased, objects that never touch.

A `Scene` says exactly what is on the canvas. `lay_out` draws positions and sizes for a list of
objects and an optional relation; `render` paints. All randomness comes from the `rng` passed in.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewards.shapes.vocabulary import BACKGROUND_RANGE, COLORS, IMAGE_SIZE, coverage

_MARGIN = 1.5  # least distance of an object from the canvas's edge, in pixels
_GAP = 2.5  # least distance between two objects' bounding circles, in pixels


@dataclass(frozen=True)
class Object:
    """One painted object: names from the vocabulary, centre and radius in pixels."""

    shape: str
    color: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0


@dataclass(frozen=True)
class Scene:
    """A canvas of one grey level and the objects on it, none of which touch."""

    objects: tuple[Object, ...]
    background: float


def room(radius: float) -> tuple[float, float]:
    """The least and the largest coordinate of an object's centre on the canvas, along both axes."""
    edge = radius * 1.08 + _MARGIN
    return edge, IMAGE_SIZE - edge


def least_distance(first: float, second: float) -> float:
    """Of the centres of two objects of these radii that do not touch."""
    return 1.12 * (first + second) + _GAP


def holds(relation: str, first: Object, second: Object) -> bool:
    """Whether `first` is clearly `relation` of `second`: along the axis more than across it."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = {"left of": (-dx, dy), "right of": (dx, dy),
                     "above": (-dy, dx), "below": (dy, dx)}[relation]  # fmt: skip
    return along > 1.2 * abs(across) and along > 1.1 * (first.radius + second.radius)


def lay_out(
    objects: list[tuple[str, str]], rng: np.random.Generator, *, relation: str | None = None
) -> Scene:
    """Draws sizes and positions for (shape, color) pairs by rejection.

    Args:
        objects: what to paint; at most six fit.
        rng: the only source of randomness.
        relation: if given, the first object stands in this relation to the second.

    Returns:
        A scene whose objects lie inside the canvas without touching.
    """
    low, high = (9.0, 15.0) if len(objects) == 1 else (6.5, 9.5)
    if len(objects) == 2:
        low, high = 7.0, 11.0
    while True:
        placed: list[Object] = []
        for shape, color in objects:
            radius = rng.uniform(low, high)
            for _ in range(20):
                x, y = rng.uniform(*room(radius), size=2)
                clear = all(
                    np.hypot(x - o.x, y - o.y) > least_distance(radius, o.radius) for o in placed
                )
                if clear:
                    placed.append(Object(shape, color, float(x), float(y), float(radius)))
                    break
        complete = len(placed) == len(objects)
        if complete and (relation is None or holds(relation, placed[0], placed[1])):
            return Scene(tuple(placed), float(rng.uniform(*BACKGROUND_RANGE)))


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:
    """Paints a scene; every object's colour varies a little in brightness.

    Returns:
        float32 [3, 64, 64] in [0, 1].
    """
    image = np.full((3, IMAGE_SIZE, IMAGE_SIZE), scene.background)
    for item in scene.objects:
        mask = coverage(item.shape, IMAGE_SIZE, center=(item.x, item.y), radius=item.radius)
        paint = np.clip(np.array(COLORS[item.color]) * rng.uniform(0.93, 1.05), 0, 1)
        image += mask * (paint[:, None, None] - image)
    return image.astype(np.float32)
