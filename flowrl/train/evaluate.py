"""Evaluation on held-out prompts with fixed noise: the same images every time but for the weights.

Nothing here touches the training's random numbers or weights; noise derives from (eval.seed,
sample), so a curve compares like with like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from flowrl.data.sampler import eval_batch
from flowrl.protocols import Policy
from flowrl.train.collect import lost
from flowrl.train.runfiles import write_json
from flowrl.train.scoring import RewardSet, read_samples
from flowrl.train.wandb_run import Sample
from flowrl.types import Prompt


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: `metrics` under the keys of `keys.py`, and the samples that are shown.

    `lost` is what `collect.lost` says of it.
    """

    metrics: dict[str, float]
    lost: list[dict[str, Any]]
    images: Tensor
    captions: list[str]
    samples: list[Sample]


@dataclass(frozen=True)
class Evaluator:
    """How a run is evaluated; `__call__` does it.

    Attributes:
        prompts: held-out; GenEval rows give scores per skill by their "tag".
        rewards: what is measured; the first one is the score.
        weights: the parameter set that is evaluated.
        num_steps, guidance_scale: of the deterministic sampler; a token model has no num_steps.
        samples_per_prompt, seed: fix the noise.
        num_shown: samples kept as images, spread over the prompts.
        distance: of a parameter set from the base, by its name; None = not measured.
    """

    prompts: Sequence[Prompt]
    rewards: RewardSet
    weights: str
    num_steps: int | None
    guidance_scale: float
    samples_per_prompt: int
    seed: int
    num_shown: int
    distance: Callable[[str], float] | None = None

    def __call__(
        self, policy: Policy, accelerator: Accelerator, *, step: int, folder: Path | None
    ) -> Evaluation:
        """Draws and scores all samples; writes `step_000000.json` and images into `folder`."""
        batch = eval_batch(
            self.prompts,
            samples_per_prompt=self.samples_per_prompt,
            seed=self.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        with policy.weights.use(self.weights):
            drawn = policy.sample(
                batch, num_steps=self.num_steps or 0, guidance_scale=self.guidance_scale
            )
        images = drawn.images
        found = self.rewards.score(batch, **read_samples(drawn, self.rewards.inputs))
        scores, failures = found.rewards, [found.failures]
        shown = self._shown(len(self.prompts) * self.samples_per_prompt)
        rows = [
            {
                "index": int(index),
                "group": int(batch.group_id[i]),
                "prompt": batch.prompts[i].text,
                "tag": str(batch.prompts[i].metadata.get("tag", "")),
                "seed": self.seed,
                "rewards": {name: float(values[i]) for name, values in scores.items()},
                "small": _features(images[i]),
                "image": images[i] if int(index) in shown else None,
            }
            for i, index in enumerate(batch.sample_id)
        ]
        if accelerator.num_processes > 1:
            rows, failures = gather_object(rows), gather_object(failures)
        summary = self._summary(rows, step)
        summary["distance"] = None if self.distance is None else self.distance(self.weights)
        kept = [row for row in rows if row["image"] is not None]
        if folder is not None and accelerator.is_main_process:
            _write(folder, step, summary, kept)
        metrics = {f"eval/{n}/mean": v for n, v in summary["rewards"].items()}
        values = {n: torch.tensor([row["rewards"][n] for row in rows]) for n in self.rewards.names}
        failed = lost(values, failures)
        for each in failed:
            if each["lost"]:
                metrics[f"eval/{each['reward']}/invalid_frac"] = each["lost"] / each["of"]
        metrics |= {f"eval/skill/{tag}": value for tag, value in summary["skills"].items()}
        metrics |= {"eval/score": summary["score"]}
        for name in ("diversity", "distance"):
            if summary[name] is not None:
                metrics[f"eval/{name}"] = summary[name]
        captions = [_caption(row) for row in kept]
        samples = [Sample(r["prompt"], r["seed"], r["index"], r["rewards"]) for r in kept]
        pictures = torch.stack([row["image"] for row in kept])
        return Evaluation(metrics, failed, pictures, captions, samples)

    def _shown(self, num_samples: int) -> set[int]:
        num = min(max(self.num_shown, 1), num_samples)
        return {round(i * (num_samples - 1) / max(num - 1, 1)) for i in range(num)}

    def _summary(self, rows: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """Means of finite values; the score is the mean over skills where prompts have tags."""
        means = {name: _mean([row["rewards"][name] for row in rows]) for name in self.rewards.names}
        first = self.rewards.names[0]
        tags = sorted({row["tag"] for row in rows} - {""})
        skills = {t: _mean([r["rewards"][first] for r in rows if r["tag"] == t]) for t in tags}
        return {
            "step": step,
            "score": _mean(list(skills.values())) if skills else means[first],
            "skills": skills,
            "rewards": means,
            "diversity": _diversity(rows),
            "num_samples": len(rows),
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "weights": self.weights,
        }


def _features(image: Tensor) -> Tensor:
    """An image at 16 x 16, flat: what diversity is measured on."""
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), 16).flatten()


def _diversity(rows: list[dict[str, Any]]) -> float | None:
    """Mean root-mean-square distance between two images of one prompt, over prompts.

    Measured at 16 x 16 pixels; None when no prompt has two samples.
    """
    by_prompt: dict[str, list[Tensor]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row["small"])
    spreads = []
    for images in by_prompt.values():
        if len(images) > 1:
            stacked = torch.stack(images)
            distances = torch.pdist(stacked) / stacked.shape[1] ** 0.5
            spreads.append(float(distances.mean()))
    return sum(spreads) / len(spreads) if spreads else None


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if value == value]
    return sum(finite) / len(finite) if finite else float("nan")


def _caption(row: dict[str, Any]) -> str:
    marks = ", ".join(f"{name} {value:.2f}" for name, value in row["rewards"].items())
    return f"{row['prompt']} ({marks})"


def _write(folder: Path, step: int, summary: dict[str, Any], kept: list[dict[str, Any]]) -> None:
    name = f"step_{step:06d}"
    (folder / name).mkdir(parents=True, exist_ok=True)
    samples = []
    for position, row in enumerate(kept):
        file = f"{name}/{position:03d}.png"
        array = (row["image"].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(folder / file)
        samples.append({k: row[k] for k in ("prompt", "tag", "seed", "rewards")} | {"file": file})
    write_json(folder / f"{name}.json", _without_nan(summary | {"samples": samples}))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: a score that could not be computed is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
