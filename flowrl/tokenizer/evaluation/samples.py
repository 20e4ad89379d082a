"""The images or clips that tokenizers are compared on, with what is known of them.

Reading order: `Samples`, `load_samples` (a command's --data), `shapes_samples`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError
from flowrl.tokenizer.files import Shape, kind
from flowrl.tokenizer.images import Files, draw_scene, load_images, shapes_fit, stack
from rewards.shapes.grammar import SKILLS, describe, sample_scene, split
from rewards.shapes.vocabulary import COLORS, IMAGE_SIZE, SHAPES


@dataclass(frozen=True)
class Samples:
    """Images or clips and their labels.

    Attributes:
        images: uint8 [N, 3, H, W], or [N, F, 3, H, W].
        labels: int64 [N] by name, for linear probes.
        objects: the (shape, color) pairs on every canvas, sorted; None = not known.
        about: a sentence for the page.
    """

    images: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)
    objects: tuple[tuple[tuple[str, str], ...], ...] | None = None
    about: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: slice) -> Tensor:
        """Float images in [0, 1]."""
        return self.images[index].float() / 255

    @property
    def fingerprint(self) -> str:
        """The same for the same images: only then do records compare."""
        data = self.images.contiguous().numpy().tobytes()
        return hashlib.sha256(repr(tuple(self.images.shape)).encode() + data).hexdigest()[:16]


def load_samples(
    source: str, shape: Shape, *, num_held_out: int, num_train: int, seed: int = 0
) -> tuple[Samples, Samples]:
    """Held-out images or clips, and others to train probes on.

    Args:
        source: "shapes", a folder of images or clips (sub-folders are classes), or a Hugging Face
            data set of images.
        shape: (3, H, W) of images, (F, 3, H, W) of clips.
        num_held_out: images that are measured. Of a folder or data set they are the first of those
            that `flowrl tokenizer train` holds out, as long as there are no more than its
            `data.held_out`.
        num_train: images for the probes; fewer where there are fewer.
        seed: of the scenes that are rendered.

    Raises:
        ConfigError: the source does not exist, or holds too few images.
    """
    if source == "shapes":
        if not shapes_fit(shape):
            raise ConfigError(
                f"data=shapes renders squares of at most {IMAGE_SIZE} pixels, but the tokenizer "
                f"takes {shape[-2]} x {shape[-1]}; name a folder of {kind(shape)}s"
            )
        held_out = shapes_samples(num_held_out, shape, seed=seed, held_out=True)
        return held_out, shapes_samples(num_train, shape, seed=seed, held_out=False)
    from flowrl.tokenizer.schema import DataSection

    data = DataSection(source=source, held_out=num_held_out, num_images=num_train)
    trained, measured = load_images(
        data, shape, seed=seed, num_held_out=num_held_out, where="--data"
    )
    about = (
        f"{source}: {len(measured)} held-out {kind(shape)}s, {len(trained)} others for the probes"
    )
    labels: list[dict[str, Tensor]] = [{}, {}]
    if isinstance(trained, Files) and isinstance(measured, Files):
        labels = _folder_labels(Path(source), measured.files, trained.files)
    pair = zip((measured, trained), labels, strict=True)
    first, second = (Samples(stack(found, shape), each, about=about) for found, each in pair)
    return first, second


def shapes_samples(
    num: int, shape: Shape = (3, IMAGE_SIZE, IMAGE_SIZE), *, seed: int, held_out: bool
) -> Samples:
    """Rendered scenes of all skills; held-out ones are of combinations that training never shows.

    Labels: shape and color of the largest object, and the number of objects - 1. See
    `flowrl.tokenizer.images.draw_scene`.
    """
    rng = np.random.default_rng(derive_seed(seed, "tokenizer evaluation", str(held_out)))
    pools = [split(skill, held_out=held_out) for skill in SKILLS]
    images = torch.empty(num, *shape, dtype=torch.uint8)
    facts = torch.empty(num, 3, dtype=torch.int64)
    objects = []
    for index, skill in enumerate(rng.integers(len(pools), size=num)):
        scene = sample_scene(pools[skill][rng.integers(len(pools[skill]))], rng)
        images[index] = draw_scene(scene, shape, rng)
        largest = max(scene.objects, key=lambda each: each.radius)
        names = list(SHAPES).index(largest.shape), list(COLORS).index(largest.color)
        facts[index] = torch.tensor([*names, len(scene.objects) - 1])
        objects.append(tuple(describe(scene)))
    labels = dict(zip(("shape", "color", "number"), facts.unbind(1), strict=True))
    side = "combinations that training never shows" if held_out else "train combinations"
    what = "scenes" if len(shape) == 3 else f"clips of {shape[0]} frames"
    about = f"{num} {what} of the Shapes world, {shape[-2]} x {shape[-1]}, of {side}"
    return Samples(images, labels, tuple(objects), about)


def limited(samples: Samples, num: int) -> Samples:
    """The first of them."""
    return replace(
        samples,
        images=samples.images[:num],
        labels={name: each[:num] for name, each in samples.labels.items()},
        objects=None if samples.objects is None else samples.objects[:num],
    )


def _folder_labels(root: Path, *sets: tuple[Path, ...]) -> list[dict[str, Tensor]]:
    """The sub-folder of every file as its class; nothing where there are fewer than two."""
    names = [[file.relative_to(root).parts[0] for file in files] for files in sets]
    is_flat = any(len(file.relative_to(root).parts) < 2 for files in sets for file in files)
    classes = sorted({name for each in names for name in each})
    if is_flat or len(classes) < 2:
        return [{} for _ in sets]
    return [{"class": torch.tensor([classes.index(n) for n in each])} for each in names]
