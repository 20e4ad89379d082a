"""The words of the Shapes world and what they look like: implicit functions and sRGB colours.

Renderer and detector both read this file, so that "a red star" means one thing. A shape is a set of
points in the unit square [-1, 1]^2 (x to the right, y downwards); a colour is three numbers in
[0, 1].
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Inside = Callable[[Points, Points], NDArray[np.bool_]]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.87, 0.15),
    "green": (0.13, 0.62, 0.25),
    "cyan": (0.15, 0.80, 0.86),
    "blue": (0.13, 0.30, 0.86),
    "purple": (0.56, 0.17, 0.70),
}
BACKGROUND_RANGE = (0.84, 0.96)  # grey levels of the canvas
IMAGE_SIZE = 64
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")


def _circle(x: Points, y: Points) -> NDArray[np.bool_]:
    return x**2 + y**2 <= 1


def _square(x: Points, y: Points) -> NDArray[np.bool_]:
    return np.maximum(np.abs(x), np.abs(y)) <= 0.88


def _triangle(x: Points, y: Points) -> NDArray[np.bool_]:
    return (y <= 0.85) & (2 * np.abs(x) - (y + 0.95) * 1.1 <= 0)


def _star(x: Points, y: Points) -> NDArray[np.bool_]:
    """Five points: a point is inside when it lies in the kite of its nearest tip."""
    angle = np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5
    radius = np.hypot(x, y)
    tip, notch = 1.08, 0.45
    # The edge from (tip, angle 0) to (notch, angle pi/5), as a line a*u + b*v = c.
    u, v = radius * np.cos(angle), radius * np.abs(np.sin(angle))
    notch_u, notch_v = notch * np.cos(np.pi / 5), notch * np.sin(np.pi / 5)
    return np.asarray((u - tip) * notch_v + v * (tip - notch_u) <= 0)


def _cross(x: Points, y: Points) -> NDArray[np.bool_]:
    across = (np.abs(x) <= 0.98) & (np.abs(y) <= 0.34)
    return across | ((np.abs(y) <= 0.98) & (np.abs(x) <= 0.34))


def _ring(x: Points, y: Points) -> NDArray[np.bool_]:
    radius = np.hypot(x, y)
    return (radius <= 1) & (radius >= 0.52)


SHAPES: dict[str, Inside] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}
PLURALS = {name: name + ("es" if name.endswith("s") else "s") for name in SHAPES}


def coverage(
    shape: str, size: int, *, center: tuple[float, float], radius: float
) -> NDArray[np.float64]:
    """Share of every pixel of a square canvas that a shape covers: its anti-aliased mask.

    Args:
        shape: a key of `SHAPES`.
        size: side of the canvas in pixels.
        center: (x, y) in pixels; pixel (0, 0) spans [0, 1] x [0, 1].
        radius: half the side of the shape's unit square, in pixels.

    Returns:
        [size, size] in [0, 1], indexed [y, x]; 4 x 4 samples per pixel.
    """
    samples = 4
    left, right = (
        int(np.clip(f(c + s * (1.1 * radius)), 0, size))
        for f, c, s in ((np.floor, center[0], -1), (np.ceil, center[0], 1))
    )
    top, bottom = (
        int(np.clip(f(c + s * (1.1 * radius)), 0, size))
        for f, c, s in ((np.floor, center[1], -1), (np.ceil, center[1], 1))
    )
    mask = np.zeros((size, size))
    if right <= left or bottom <= top:
        return mask
    xs = (left + (np.arange((right - left) * samples) + 0.5) / samples - center[0]) / radius
    ys = (top + (np.arange((bottom - top) * samples) + 0.5) / samples - center[1]) / radius
    inside = SHAPES[shape](xs[None, :], ys[:, None])
    blocks = inside.reshape(bottom - top, samples, right - left, samples)
    mask[top:bottom, left:right] = blocks.mean(axis=(1, 3))
    return mask
