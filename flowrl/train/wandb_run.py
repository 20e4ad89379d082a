"""What a W&B run carries: its identity across restarts, what it is made of, samples, its best.

An identity is kept in the run's folder, so that a resumed run is the same W&B run; the one that a
sweep's agent gives is taken over. Nothing here imports wandb before it is asked for. Reading order:
`arguments`, `about`, `table`, `summary`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.errors import ConfigError
from flowrl.types import PromptBatch

WANDB_ID = "wandb_id.txt"

# Of env.json; the rest says nothing about a result.
_VERSIONS = (
    "flowrl", "commit", "python", "torch", "diffusers", "transformers", "device", "mixed precision",
)  # fmt: skip
# Of an evaluation, but more of them is not better.
_NOT_RANKED = ("eval/diversity", "eval/distance")


@dataclass(frozen=True)
class Sample:
    """One image's row in a table.

    Attributes:
        prompt: what was asked for.
        seed: of the step, or of the evaluation.
        sample: its number in the step or evaluation; with the seed it gives the noise.
        rewards: name -> score; NaN = it could not be scored.
    """

    prompt: str
    seed: int
    sample: int
    rewards: Mapping[str, float]


def batch_samples(batch: PromptBatch, rewards: Mapping[str, Tensor], *, num: int) -> list[Sample]:
    """The first `num` samples of a batch with their scores [N]."""
    return [
        Sample(
            batch.prompts[i].text,
            batch.seed,
            int(batch.sample_id[i]),
            {name: float(values[i]) for name, values in rewards.items()},
        )
        for i in range(min(num, len(batch)))
    ]


def arguments(
    run: Path,
    *,
    name: str,
    entity: str | None,
    mode: str,
    tags: Sequence[str],
    group: str | None,
) -> dict[str, Any]:
    """Arguments of `wandb.init` for the run in a folder.

    Inside a sweep the agent decides on identity and team, and wandb would warn of ours.

    Raises:
        ConfigError: see `identity`.
    """
    own = {"id": identity(run), "entity": entity}
    return {
        **({} if os.environ.get("WANDB_SWEEP_ID") else own),
        "dir": str(run),
        "resume": "allow" if mode == "online" else None,
        "name": name or run.name,
        "mode": mode,
        "tags": list(tags),
        "group": group,
        "settings": {"console": "off"},  # it would come between the progress bar and the terminal
    }


def identity(run: Path) -> str:
    """The W&B id of the run in a folder: kept there, else the agent's, else a new one.

    Raises:
        ConfigError: the folder continues another W&B run than the variable WANDB_RUN_ID names.
    """
    file = run / WANDB_ID
    given = os.environ.get("WANDB_RUN_ID")
    if not file.exists():
        run.mkdir(parents=True, exist_ok=True)
        file.write_text((given or secrets.token_hex(4)) + "\n", encoding="utf-8")
    kept = file.read_text(encoding="utf-8").strip()
    if given and given != kept:
        raise ConfigError(
            f"{file} says that this folder is the W&B run {kept}, but WANDB_RUN_ID={given}; unset "
            "the variable to go on with the folder's run, or choose another run.name"
        )
    return kept


def about(run: Path) -> dict[str, Any]:
    """The method's description, the versions and the commit that `flowrl train` wrote down.

    Returns:
        For the tracker's configuration; what was not written down is left out.
    """
    method, environment = _read(run / "method.json"), _read(run / "env.json")
    found: dict[str, Any] = {name: environment[name] for name in _VERSIONS if name in environment}
    if method:
        found["method"] = {str(label): str(value) for label, value in method.get("rows", [])}
    return found


def table(step: int, pixels: Iterable[Any], samples: Sequence[Sample]) -> Any:
    """A `wandb.Table` with a row per image: step, image, prompt, seed, sample and rewards.

    Args:
        step: training steps done.
        pixels: uint8 [N, H, W, 3].
        samples: [N]. A score that is NaN is an empty cell. A seed is a text: it has 63 bits, of
            which a browser's numbers keep 53.
    """
    import wandb

    names = list(dict.fromkeys(name for sample in samples for name in sample.rewards))
    rows = []
    for image, sample in zip(pixels, samples, strict=True):
        scores = [sample.rewards.get(name, math.nan) for name in names]
        shown = [score if math.isfinite(score) else None for score in scores]
        row = [step, wandb.Image(image.numpy()), sample.prompt, str(sample.seed), sample.sample]
        rows.append([*row, *shown])
    columns: list[str | int] = ["step", "image", "prompt", "seed", "sample", *names]
    return wandb.Table(columns=columns, data=rows)


def summary(run: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A run's best and its end: `best/<metric>` of evaluations, `best/step`, `run/state`.

    W&B itself keeps the last value of every metric, under its own name.

    Args:
        run: the folder.
        rows: of metrics.jsonl; after a resume they are those of the whole run.

    Returns:
        Keys of W&B's summary. `best/step` is that of the best eval/score.
    """
    best: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            is_ranked = key.startswith("eval/") and key not in _NOT_RANKED
            if is_ranked and value is not None and value > best.get(f"best/{key}", -math.inf):
                best[f"best/{key}"] = value
                if key == "eval/score":
                    best["best/step"] = row["step"]
    status = _read(run / "status.json")
    ending = {f"run/{key}": status[key] for key in ("state", "minutes") if key in status}
    return best | ending


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
