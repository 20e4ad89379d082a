"""Which checkpoint a run goes on from, and what may have changed since.

Reading order: `find_checkpoint`, `check_same_run`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl.config import to_dict
from flowrl.errors import CheckpointError, ConfigError
from flowrl.train import statefiles
from flowrl.train.checkpoint import Checkpoints
from flowrl.train.track import METRICS

# What a resumed run may change: where, how long and how fast it runs, and what is observed.
FREE = (
    "run.name", "run.output_dir", "run.steps", "run.resume", "run.max_minutes",
    "run.max_evaluations",
    "checkpoint", "track", "eval", "monitor",
    "compute.micro_batch_size", "compute.rollout_batch_size", "compute.decode_batch_size",
    "compute.threads", "compute.ratio_tolerance", "model.gradient_checkpointing",
    "scoring.batch_size", "scoring.parts", "scoring.retries", "scoring.backoff_s",
    "scoring.timeout_s", "scoring.max_invalid", "scoring.window",
)  # fmt: skip


def find_checkpoint(config: Any, run: Path, *, free: Sequence[str] = FREE) -> Path | None:
    """The checkpoint that the run goes on from, None for a new run; changes nothing.

    Args:
        config: a record with the sections `run`, `checkpoint` and perhaps `optim`.
        run: the run's folder.
        free: keys and sections that may have changed since.

    Raises:
        ConfigError: the folder holds a run already, or the checkpoint is of another run.
        CheckpointError: there is no such checkpoint, or it is beyond run.steps.
    """
    path = Checkpoints(run / "checkpoints", keep=config.checkpoint.keep).find(config.run.resume)
    metrics = run / METRICS
    if path is None:
        if metrics.exists() and metrics.stat().st_size:
            raise ConfigError(
                f"{run} already holds a run; set run.resume=latest to go on with it, or another "
                "run.name"
            )
        return None
    extra = statefiles.read_extra(path)
    check_same_run(extra["config"], to_dict(config), free=free)
    if extra["step"] > config.run.steps:
        raise CheckpointError(
            f"{path} is at step {extra['step']}, beyond run.steps={config.run.steps}; "
            "raise run.steps"
        )
    return path


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], *, free: Sequence[str] = FREE
) -> None:
    """Refuse to go on with a configuration that would make it another run.

    Free are the keys that say where, how long and how fast the run goes and what is observed of
    it: `run.*` but the seed, `checkpoint.*`, `track.*`, `eval.*`, `monitor.*`, `compute.*` but the
    precision, `scoring.*` but `min_group_share`, and gradient checkpointing. `run.steps` is free
    only while the learning rate does not depend on it (`optim.schedule: constant`).

    Args:
        old: the configuration stored in the checkpoint, as plain data.
        new: the present one.
        free: keys and sections that may differ.

    Raises:
        ConfigError: lists every other key that differs, with both values.
    """
    may_differ = set(free)
    if new.get("optim", {}).get("schedule", "constant") != "constant":
        may_differ.discard("run.steps")
    lines = []
    for key, before, after in differences(old, new, ""):
        parts = key.split(".")
        if not any(".".join(parts[:length]) in may_differ for length in range(1, len(parts) + 1)):
            lines.append(f"  {key}: {before} in the checkpoint, {after} now")
    if lines:
        raise ConfigError(
            "run.resume: the configuration differs from the checkpoint's where it changes the "
            "result:\n" + "\n".join(lines) + "\nset these back, or drop run.resume and choose "
            "another run.name for a new run"
        )


def differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """(dotted key, old value, new value) of every leaf in which two plain values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            below = f"{key}.{name}" if key else str(name)
            if name in old and name in new:
                yield from differences(old[name], new[name], below)
            else:
                before, after = (
                    _show(side[name]) if name in side else "not set" for side in (old, new)
                )
                yield below, before, after
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{key}.{index}")
    elif old != new:
        yield key, _show(old), _show(new)


def _show(value: Any) -> str:
    return json.dumps(value, default=str)
