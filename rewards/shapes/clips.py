"""Clips of the Shapes world: the objects of a scene drift, each at a constant speed of its own.

Every frame is a scene as `render.lay_out` makes them: objects lie on the canvas and do not touch.
All randomness comes from the `rng` passed in. Reading order: `render_clip`, `drift`.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from rewards.shapes.render import Scene, least_distance, render, room

_MAX_SPEED = 5.0  # pixels per frame, along each axis
_TRIES = 40
_SLOWER = 0.9  # the speeds of a try over those of the try before: the last ones all but rest


def render_clip(scene: Scene, num_frames: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Float32 [F, 3, 64, 64] in [0, 1]: the scene, and how it goes on."""
    return render_frames(scene, drift(scene, num_frames, rng), rng)


def drift(scene: Scene, num_frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Centres [F, N, 2] of a scene's objects, which move at constant speeds from where they are.

    Speeds are drawn so that objects stay on the canvas, by rejection so that none touch: slower
    ones from try to try.
    """
    start = np.array([(item.x, item.y) for item in scene.objects])
    radius = np.array([item.radius for item in scene.objects])
    low, high = (np.array(side)[:, None] for side in zip(*map(room, radius), strict=True))
    last = max(1, num_frames - 1)
    first, second = np.triu_indices(len(radius), 1)
    pairs = zip(radius[first], radius[second], strict=True)
    needed = np.array([least_distance(a, b) for a, b in pairs])
    places: NDArray[np.float64]
    for attempt in range(_TRIES):
        limit = _MAX_SPEED * _SLOWER**attempt
        slowest = np.clip((low - start) / last, -limit, 0)
        fastest = np.clip((high - start) / last, 0, limit)
        speed = rng.uniform(slowest, fastest)
        places = start + np.arange(num_frames)[:, None, None] * speed
        if (np.linalg.norm(places[:, first] - places[:, second], axis=-1) > needed).all():
            break
    return places


def render_frames(
    scene: Scene, places: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Float32 [F, 3, 64, 64]: a scene's objects at centres [F, N, 2], equally bright throughout."""
    shade = int(rng.integers(2**31))
    frames = []
    for centres in places.tolist():
        pairs = zip(scene.objects, centres, strict=True)
        moved = replace(scene, objects=tuple(replace(item, x=x, y=y) for item, (x, y) in pairs))
        frames.append(render(moved, np.random.default_rng(shade)))
    return np.stack(frames)
