"""Measures the detector on fresh renders, through a VAE, and on pictures wrong on purpose.

`python -m rewards.shapes.verify [--renders 2000] [--vae FOLDER] [--seed 1]` prints the figures and
the confusion tables; it writes nothing. The tests assert the same functions.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from rewards.shapes.detect import UNKNOWN, Detection, detect
from rewards.shapes.grammar import SKILLS, Request, change, describe, requests, sample_scene
from rewards.shapes.render import Object, Scene, render
from rewards.shapes.score import per_skill, score_detections
from rewards.shapes.vocabulary import COLORS, IMAGE_SIZE, SHAPES, coverage

Image = NDArray[np.float32]
MISSED = "missed"
NEAR = 6.0  # pixels within which a detection is taken for an object, in the confusion tables


@dataclass(frozen=True)
class Sample:
    """A request, the scene that was painted for it, and the picture [3, 64, 64]."""

    request: Request
    scene: Scene
    image: Image


@dataclass(frozen=True)
class Confusions:
    """Counts of (true, found) names.

    An object that was not found counts as found "missed"; a find where no object is, as a true
    "nothing". Colours are counted for the objects that were found.
    """

    shapes: Counter[tuple[str, str]]
    colors: Counter[tuple[str, str]]


def ground_truth(scene: Scene) -> list[Detection]:
    """What a perfect detector finds on a scene, from the masks that painted it."""
    found = []
    for item in scene.objects:
        mask = coverage(item.shape, IMAGE_SIZE, center=(item.x, item.y), radius=item.radius)
        ys, xs = np.nonzero(mask > 0.5)
        edges = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        area = float(mask.sum())
        centers = np.arange(IMAGE_SIZE) + 0.5
        center = (float(mask.sum(0) @ centers) / area, float(mask.sum(1) @ centers) / area)
        found.append(Detection(item.shape, item.color, edges, center, area, 1.0))
    return found


def renders(num: int, seed: int) -> Iterator[Sample]:
    """`num` right pictures of random requests, the six skills in turn."""
    rng = np.random.default_rng([seed, 0])
    pools = {skill: list(requests(skill)) for skill in SKILLS}
    for index in range(num):
        pool = pools[SKILLS[index % len(SKILLS)]]
        request = pool[int(rng.integers(len(pool)))]
        scene = sample_scene(request, rng)
        yield Sample(request, scene, render(scene, rng))


def is_right(sample: Sample, detections: Sequence[Detection]) -> bool:
    """Whether exactly the painted (shape, color) objects were found, and the metadata hold."""
    found = sorted((item.shape, item.color) for item in detections)
    right = found == describe(sample.scene)
    return right and score_detections(detections, sample.request.metadata).correct


def confusions(samples: Sequence[Sample], found: Sequence[Sequence[Detection]]) -> Confusions:
    """Pairs every painted object with the nearest detection and counts what it was taken for."""
    shapes: Counter[tuple[str, str]] = Counter()
    colors: Counter[tuple[str, str]] = Counter()
    for sample, detections in zip(samples, found, strict=True):
        free = list(detections)
        for true in ground_truth(sample.scene):
            nearest = min(free, key=lambda d: _distance(d, true), default=None)
            if nearest is None or _distance(nearest, true) > NEAR:
                shapes[true.shape, MISSED] += 1
                continue
            free.remove(nearest)
            shapes[true.shape, nearest.shape] += 1
            colors[true.color, nearest.color] += 1
        shapes.update(("nothing", extra.shape) for extra in free)
    return Confusions(shapes, colors)


def _distance(a: Detection, b: Detection) -> float:
    return float(np.hypot(a.center[0] - b.center[0], a.center[1] - b.center[1]))


# --- pictures that are wrong on purpose ---

_SKILLS_OF = {
    "wrong colour": ("colors", "color_attr"),
    "wrong count": ("single_object", "two_object", "counting"),
    "wrong relation": ("position",),
}
WRONG_KINDS = ("wrong colour", "wrong shape", "wrong count", "wrong relation", "blank", "noise",
               "half-painted", "blurred")  # fmt: skip


def wrong_pictures(kind: str, num: int, seed: int) -> Iterator[Sample]:
    """`num` pictures that must not pass the metadata of their request.

    Args:
        kind: one of `WRONG_KINDS`.
        num: how many.
        seed: of everything random.

    Raises:
        ValueError: for another kind.
    """
    if kind not in WRONG_KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(WRONG_KINDS)}")
    rng = np.random.default_rng([seed, 1 + WRONG_KINDS.index(kind)])
    skills = _SKILLS_OF.get(kind, SKILLS)
    pools = [list(requests(skill)) for skill in skills]
    for index in range(num):
        pool = pools[index % len(pools)]
        request = pool[int(rng.integers(len(pool)))]
        scene = _scene(kind, request, rng)
        yield Sample(request, scene, _picture(kind, scene, rng))


def _scene(kind: str, request: Request, rng: np.random.Generator) -> Scene:
    """A scene that differs from the request if the kind is one of content, else one that fits."""
    word = {"wrong colour": "color", "wrong shape": "shape", "wrong count": "count",
            "wrong relation": "relation"}.get(kind)  # fmt: skip
    if kind == "blank":
        return Scene((), sample_scene(request, rng).background)
    if word is None:
        return sample_scene(request, rng)
    if request.skill == "color_attr" and word == "color" and rng.random() < 0.5:
        word = "swap"
    which = int(rng.integers(len(request.objects)))
    while True:
        scene = sample_scene(change(request, word, which, rng), rng)
        # An object far to the left and as far above is both "left of" and "above" to GenEval: a
        # picture of another relation that happens to show this one as well is not a wrong one.
        if not score_detections(ground_truth(scene), request.metadata).correct:
            return scene


def _picture(kind: str, scene: Scene, rng: np.random.Generator) -> Image:
    image = render(scene, rng).astype(np.float64)
    if kind == "blurred":
        width = rng.uniform(2.0, 4.0)
        image = ndimage.gaussian_filter(image, (0, width, width))
    elif kind == "noise":
        # Pure noise, or a picture drowned in it.
        drowned = image + rng.normal(0, rng.uniform(0.15, 0.5), image.shape)
        image = rng.random(image.shape) if rng.random() < 0.5 else drowned
    elif kind == "half-painted":
        target = scene.objects[int(rng.integers(len(scene.objects)))]
        image = _half_paint(image, target, scene.background, rng)
    return np.clip(image, 0, 1).astype(np.float32)


def _half_paint(
    image: NDArray[np.float64], target: Object, background: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Erases one side of an object, or paints it in another colour."""
    mask = coverage(target.shape, IMAGE_SIZE, center=(target.x, target.y), radius=target.radius)
    side = (np.arange(IMAGE_SIZE) + 0.5 > target.x) != (rng.random() < 0.5)
    others = [color for color in COLORS if color != target.color]
    fill = np.full(3, background)
    if rng.random() < 0.5:
        fill = np.array(COLORS[str(rng.choice(others))])
    return np.asarray(image + (mask * side) * (fill[:, None, None] - image))


def rejection_rates(num: int, seed: int) -> dict[str, float]:
    """For each kind of wrong picture, the share that the scoring refuses."""
    rates = {}
    for kind in WRONG_KINDS:
        passed = [score_detections(detect(sample.image), sample.request.metadata).correct
                  for sample in wrong_pictures(kind, num, seed)]  # fmt: skip
        rates[kind] = 1 - sum(passed) / num
    return rates


# --- the VAE ---


def through_vae(images: Sequence[Image], folder: Path, *, batch: int = 50) -> list[Image]:
    """Encodes (mode of the posterior) and decodes pictures with a diffusers AutoencoderKL.

    Raises:
        FileNotFoundError: if the folder holds no model; diffusers would look for it on the Hub.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no VAE in {folder}; expected an AutoencoderKL folder")
    import torch
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(folder).eval()  # type: ignore[no-untyped-call]
    decoded: list[Image] = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            pixels = torch.from_numpy(np.stack(images[start : start + batch])) * 2 - 1
            output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
            decoded += list((output / 2 + 0.5).clamp(0, 1).numpy())
    return decoded


# --- the report ---


def report(
    console: Console, title: str, samples: Sequence[Sample], images: Sequence[Image]
) -> None:
    """Prints accuracy per skill, time and the confusion tables for pictures of right scenes."""
    start = time.process_time()
    found = [detect(image) for image in images]
    spent = (time.process_time() - start) / max(len(images), 1)
    right = [is_right(sample, items) for sample, items in zip(samples, found, strict=True)]
    skills = per_skill([sample.request.skill for sample in samples], right)
    table = Table("skill", "right", title=f"{title}: {len(samples)} pictures, "
                                          f"{spent * 1000:.2f} ms each")  # fmt: skip
    for skill, value in skills.items():
        table.add_row(skill, f"{value:.2%}")
    table.add_row("all", f"{np.mean(right):.2%} ({len(right) - sum(right)} wrong)")
    console.print(table)
    counts = confusions(samples, found)
    shape_names, color_names = list(SHAPES), list(COLORS)
    console.print(_matrix("shapes", counts.shapes, [*shape_names, "nothing"],
                          [*shape_names, UNKNOWN, MISSED]))  # fmt: skip
    console.print(_matrix("colours", counts.colors, color_names, color_names))


def _matrix(
    title: str, counts: Counter[tuple[str, str]], rows: list[str], columns: list[str]
) -> Table:
    table = Table("painted", *columns, title=f"{title} found", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(row, *(str(counts[row, column]) for column in columns))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all measurements and prints them."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--renders", type=int, default=2000, help="fresh pictures to detect")
    parser.add_argument("--wrong", type=int, default=1000, help="wrong pictures of each kind")
    parser.add_argument("--vae", type=Path, help="folder of a diffusers AutoencoderKL")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures")
    args = parser.parse_args(argv)
    console = Console()
    samples = list(renders(args.renders, args.seed))
    detect(samples[0].image)  # makes the templates, so that they are not timed
    report(console, "renders", samples, [sample.image for sample in samples])
    if args.vae:
        decoded = through_vae([sample.image for sample in samples], args.vae)
        report(console, "through the VAE", samples, decoded)
    table = Table("wrong picture", "rejected", title=f"{args.wrong} of each kind")
    for kind, rate in rejection_rates(args.wrong, args.seed).items():
        table.add_row(kind, f"{rate:.2%}")
    console.print(table)


if __name__ == "__main__":
    main()
