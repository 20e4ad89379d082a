"""What the claims of the tokenizers' papers are tried with: scenes, a short training, statistics.

Every claim is a script beside this file, `python benchmarks/tokenizers/NAME.py [--seeds 0 1 2]`,
that trains small tokenizers on the Shapes world at 32 x 32, one torch thread, prints its table and
writes it to docs/tokenizers/NAME.json. A training that was finished is not repeated: its numbers
are kept in runs/tokenizers/NAME.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.shapes.grammar import SKILLS, sample_scene, split
from rewards.shapes.render import render
from rewards.shapes.vocabulary import COLORS, SHAPES
from tokenizers_vis.training import TokenizerTraining

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs/tokenizers"
CACHE = ROOT / "runs/tokenizers"


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes with what is known of them.

    Attributes:
        images: [N, 3, size, size] in [0, 1].
        shape, color: int64 [N], of the largest object.
        num_objects: int64 [N].
    """

    images: Tensor
    shape: Tensor
    color: Tensor
    num_objects: Tensor


def scenes(num: int, *, seed: int, size: int = 32, held_out: bool = False) -> Scenes:
    """Scenes of all skills; held-out ones are of combinations that training never shows."""
    rng = np.random.default_rng((seed, int(held_out)))
    pools = [split(skill, held_out=held_out) for skill in SKILLS]
    images, facts = [], []
    for skill in rng.integers(len(pools), size=num):
        scene = sample_scene(pools[skill][rng.integers(len(pools[skill]))], rng)
        images.append(render(scene, rng))
        largest = max(scene.objects, key=lambda each: each.radius)
        facts.append((list(SHAPES).index(largest.shape), list(COLORS).index(largest.color),
                      len(scene.objects)))  # fmt: skip
    pixels = torch.from_numpy(np.stack(images))
    small = F.interpolate(pixels, size=(size, size), mode="area")
    shape, color, number = torch.tensor(facts).unbind(1)
    return Scenes(small, shape, color, number)


def fit(
    training: TokenizerTraining,
    images: Tensor,
    *,
    steps: int,
    seed: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    say: Callable[[str], None] = print,
) -> None:
    """AdamW on a one-cycle schedule; all draws derive from the seed."""
    torch.manual_seed(seed)
    training.train()
    parameters = [p for p in training.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        output = training(images[chosen], progress=step / steps, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            losses = "  ".join(
                f"{k} {float(v.value.detach()):.4f}" for k, v in output.losses.items()
            )
            say(f"  step {step}/{steps}  {losses}  {time.perf_counter() - started:.0f} s")
    training.eval()


def confidence(differences: Sequence[float] | Tensor, *, num: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of paired differences."""
    values = torch.as_tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (num, len(values)), generator=generator)
    means = values[index].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def once(name: str, key: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns for this key (plain numbers): computed once, then read from its file."""
    text = json.dumps(key, sort_keys=True)
    file = CACHE / name / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if file.exists():
        return json.loads(file.read_text())["result"]  # type: ignore[no-any-return]
    result = run()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": dict(key), "result": result}, indent=1) + "\n")
    return result


def write_result(name: str, result: Mapping[str, Any]) -> None:
    """Into docs/tokenizers/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def arguments(description: str, *, steps: int) -> argparse.Namespace:
    """`--seeds` and `--steps` of a claim's script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help="of every training")
    torch.set_num_threads(1)
    return parser.parse_args()


def spread(values: Sequence[float]) -> str:
    """Mean +- standard deviation over seeds."""
    array = np.asarray(values, dtype=float)
    return f"{array.mean():.4g} +- {array.std(ddof=1) if len(array) > 1 else 0:.2g}"


def claim(text: str, shows: bool, **numbers: Any) -> dict[str, Any]:
    """A sentence, whether the numbers show it, and the numbers."""
    return {"claim": text, "shows": bool(shows), "numbers": numbers}
