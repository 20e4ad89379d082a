"""Captioned pictures of the Shapes world to train generators on, some captions wrong.

Captions from the web are wrong now and then; a model that learnt from such follows a prompt only
part of the time, which is what alignment then has to mend.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rewards.shapes.grammar import SKILLS, sample_scene, split
from rewards.shapes.render import Scene, render

# How often each skill is drawn for training: what is hard to read is drawn more often.
SHARES = {
    "single_object": 1, "colors": 1, "counting": 2, "two_object": 2, "position": 3, "color_attr": 3,
}  # fmt: skip
_TOGETHER = 100


def captioned(
    num: int, rng: np.random.Generator, *, error_rate: float = 0.0, held_out: bool = False
) -> Iterator[tuple[str, Scene, NDArray[np.float32]]]:
    """Prompts, the scenes that are said to show them, and their pictures.

    Args:
        num: of them.
        rng: the only source of randomness.
        error_rate: see `sample_scene`.
        held_out: of combinations that training never shows.

    Yields:
        Prompt, scene, picture float32 [3, 64, 64] in [0, 1].
    """
    pools = {skill: split(skill, held_out=held_out) for skill in SKILLS}
    shares = np.array([SHARES[skill] for skill in SKILLS], float)
    for start in range(0, num, _TOGETHER):
        size = min(_TOGETHER, num - start)
        skills = rng.choice(SKILLS, size=size, p=shares / shares.sum())
        for request in [pools[skill][rng.integers(len(pools[skill]))] for skill in skills]:
            scene = sample_scene(request, rng, error_rate=error_rate)
            yield request.prompt, scene, render(scene, rng)
