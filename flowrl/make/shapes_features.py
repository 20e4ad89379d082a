"""Trains the small network whose features stand in for Inception's in the Shapes world.

`python -m flowrl.make.shapes_features FOLDER` trains `rewards.shapes.features.ShapesFeatures` on
renders of train combinations, writes it into FOLDER and prints what it measures on held-out ones:
how often it is right, and how the Frechet distance by its features grows as images get worse.
A training that was stopped goes on; `--measure` only measures the network of FOLDER.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from rewards.shapes.features import ShapesFeatures
from rewards.shapes.grammar import SKILLS, describe, sample_scene, split
from rewards.shapes.quality import frechet_distance
from rewards.shapes.render import render
from rewards.shapes.vocabulary import COLORS, SHAPES


@dataclass(frozen=True)
class Labelled:
    """Renders, uint8 [N, 3, 64, 64], and what is on them.

    Attributes:
        shapes, colors: float [N, 6] and [N, 7], 1 = is there.
        number: int64 [N], objects - 1.
    """

    images: Tensor
    shapes: Tensor
    colors: Tensor
    number: Tensor


def draw(num: int, *, seed: int, held_out: bool) -> Labelled:
    """Renders of all skills' combinations on one side of the split."""
    rng = np.random.default_rng((seed, int(held_out)))
    pools = [split(skill, held_out=held_out) for skill in SKILLS]
    images = torch.empty(num, 3, 64, 64, dtype=torch.uint8)
    shapes, colors = torch.zeros(num, len(SHAPES)), torch.zeros(num, len(COLORS))
    number = torch.empty(num, dtype=torch.int64)
    for index, skill in enumerate(rng.integers(len(pools), size=num)):
        scene = sample_scene(pools[skill][rng.integers(len(pools[skill]))], rng)
        images[index] = torch.from_numpy(render(scene, rng)).mul(255).round().to(torch.uint8)
        for shape, color in describe(scene):
            shapes[index, list(SHAPES).index(shape)] = 1
            colors[index, list(COLORS).index(color)] = 1
        number[index] = len(scene.objects) - 1
    return Labelled(images, shapes, colors, number)


def train(
    data: Labelled, state: Path, *, steps: int, seed: int, batch: int = 64, lr: float = 3e-3
) -> ShapesFeatures:
    """AdamW on a one-cycle schedule, by the sum of the three cross-entropies.

    Args:
        data: what it is trained on.
        state: the file from which it resumes.
        steps: of the optimiser.
        seed: of weights and batches.
        batch: images per step.
        lr: the largest.
    """
    from flowrl.make.shapes_base import resume_state, save_state  # which loads diffusers

    torch.manual_seed(seed)
    network = ShapesFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    started = time.perf_counter()
    for step in range(resume_state(state, **parts), steps):
        picks = np.random.default_rng((seed, step)).integers(len(data.images), size=batch)
        images = data.images[picks].float() / 255
        if step % 2:  # every shape is its own mirror image
            images = images.flip(-1)
        seen = network.classify(images)
        loss = (
            F.binary_cross_entropy_with_logits(seen.shapes, data.shapes[picks])
            + F.binary_cross_entropy_with_logits(seen.colors, data.colors[picks])
            + F.cross_entropy(seen.number, data.number[picks])
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            save_state(state, step + 1, **parts)
            spent = time.perf_counter() - started
            print(f"step {step + 1} loss {loss.item():.4f} {spent:.0f} s", flush=True)
    return network.eval()


@torch.no_grad()
def measure(network: ShapesFeatures, *, num: int = 1024, seed: int = 1) -> dict[str, float]:
    """On renders of held-out combinations: shares that it sees all of right, and distances.

    Returns:
        shapes, colors, number: share of images; distance/NAME: Frechet distance of `num` images
        made worse to `num` other clean ones, "clean" of two clean sets.
    """
    data, others = (draw(num, seed=seed + i, held_out=True) for i in (0, 1))
    images = data.images.float() / 255
    parts = [network.classify(part) for part in images.split(128)]
    shapes, colors, number = (torch.cat(each) for each in zip(*parts, strict=True))
    found = {
        "shapes": float(((shapes > 0) == data.shapes.bool()).all(1).float().mean()),
        "colors": float(((colors > 0) == data.colors.bool()).all(1).float().mean()),
        "number": float((number.argmax(1) == data.number).float().mean()),
    }
    clean = _features(network, others.images.float() / 255)
    for name, worse in made_worse(images).items():
        found[f"distance/{name}"] = frechet_distance(_features(network, worse), clean)
    return found


def made_worse(images: Tensor) -> dict[str, Tensor]:
    """Copies that are blurred (sigma in pixels), noisy (rms), or shifted to grey, by name."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    worse = {"clean": images}
    worse |= {f"blur {s}": gaussian_blur(images, [13, 13], [s, s]) for s in (0.5, 1.0, 2.0, 4.0)}
    worse |= {f"noise {s}": (images + s * noise).clamp(0, 1) for s in (0.02, 0.05, 0.1, 0.2)}
    grey = images.mean(1, keepdim=True)
    return worse | {f"grey {s}": images + s * (grey - images) for s in (0.25, 0.5, 1.0)}


def _features(network: ShapesFeatures, images: Tensor) -> Tensor:
    return torch.cat([network(part) for part in images.split(128)])


def main() -> None:
    """Trains unless told only to measure, and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", action="store_true", help="train nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--num-images", type=int, default=8000)
    args = parser.parse_args()
    if not args.measure:
        data = draw(args.num_images, seed=args.seed, held_out=False)
        args.folder.mkdir(parents=True, exist_ok=True)
        state = args.folder / "state.pt"
        train(data, state, steps=args.steps, seed=args.seed).save(args.folder)
        state.unlink()
    for name, value in measure(ShapesFeatures.load(args.folder)).items():
        print(f"{name:20} {value:.4f}")


if __name__ == "__main__":
    main()
