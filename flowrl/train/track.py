"""Where metrics go: always `metrics.jsonl` in the run's folder, and accelerate's trackers.

One JSON object per line with `step` and `time`, valid whatever the values are. What rewards lost,
and why, stands beside it in `failures.jsonl`. After a resume the rows of the abandoned continuation
are dropped from both. Only the main process writes. The keys are documented in `keys.py`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from flowrl.errors import ConfigError, MissingDependency, ShapeError
from flowrl.train import wandb_run
from flowrl.train.keys import match_key
from flowrl.train.wandb_run import Sample

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS = "metrics.jsonl"
FAILURES = "failures.jsonl"
SAMPLES = "samples"

_INSTALL = {"wandb": "pip install wandb", "tensorboard": "pip install -e '.[tensorboard]'"}


class Tracker:
    """Writes metrics and images of one run.

    The accelerator must have been made with `log_with=trackers` and `project_dir=run`.

    Args:
        accelerator: holds the trackers.
        run: the run's folder.
        config: the resolved configuration, stored with the trackers.
        trackers: names out of "wandb" and "tensorboard"; may be empty.
        name: the run's name.
        project: W&B's project.
        entity: W&B's team or user; None = the account's default.
        mode: W&B's mode, "offline" or "online"; the variable WANDB_MODE goes before it.
        tags: W&B's tags.
        group: W&B's group; None = the variable WANDB_RUN_GROUP, or none.
        resumed_step: the step of the checkpoint that the run goes on from; later rows are dropped.
            None = a new run.

    Raises:
        MissingDependency: the package of a tracker is not installed.
        ConfigError: the folder already holds metrics, and the run is a new one; or it continues
            another W&B run than the variable WANDB_RUN_ID names.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        *,
        config: Mapping[str, Any],
        trackers: Sequence[str] = (),
        name: str = "",
        project: str = "flowrl",
        entity: str | None = None,
        mode: str = "offline",
        tags: Sequence[str] = (),
        group: str | None = None,
        resumed_step: int | None = None,
    ) -> None:
        require_trackers(trackers)
        self.accelerator = accelerator
        self.run = run
        self._stream: TextIO | None = None
        if accelerator.is_main_process:
            self._stream = _open_metrics(run / METRICS, resumed_step)
            _drop_rows(run / FAILURES, after=-1 if resumed_step is None else resumed_step)
        self._is_tracked = bool(trackers)
        if self._is_tracked:
            mode = os.environ.get("WANDB_MODE", mode)
            wandb = {}
            if "wandb" in trackers and accelerator.is_main_process:
                wandb = wandb_run.arguments(
                    run, name=name, entity=entity, mode=mode, tags=tags, group=group
                )
            board = {} if resumed_step is None else {"purge_step": resumed_step + 1}
            config = {**config, "about": wandb_run.about(run)}
            self._start(project, config, {"wandb": wandb, "tensorboard": board})

    def _start(self, project: str, config: Mapping[str, Any], arguments: dict[str, Any]) -> None:
        """Open accelerate's trackers and tell them the configuration."""
        arguments["wandb"]["config"] = dict(config)
        try:
            self.accelerator.init_trackers(project, init_kwargs=arguments)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "wandb":
                raise
            raise ConfigError(
                f"track.trackers: W&B could not start ({error}); run `wandb login`, or set "
                "track.mode=offline"
            ) from error
        if not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                text = json.dumps(dict(config), indent=1, default=str)
                tracker.tracker.add_text("config", f"```json\n{text}\n```")
            else:
                # W&B's own step only grows: after a resume it would drop the rows in between.
                tracker.tracker.define_metric("step")
                tracker.tracker.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row.

        Args:
            step: training steps done.
            metrics: documented key -> value. What is not finite is stored as null and counted in
                `track/nonfinite`.

        Raises:
            ValueError: a key is not in `keys.KEYS`.
        """
        for key in metrics:
            match_key(key)
        if self._stream is None:
            return
        values = {key: float(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        if len(finite) < len(values):
            values["track/nonfinite"] = finite["track/nonfinite"] = len(values) - len(finite)
        row: dict[str, float | None] = {"step": int(step), "time": round(time.time(), 3)}
        row.update({key: finite.get(key) for key in values})
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()
        for tracker in self._trackers():
            if tracker.name == "tensorboard":
                tracker.log(finite, step=step)
            else:
                tracker.log({"step": step, **finite})

    def log_failures(self, step: int, lost: Sequence[Mapping[str, Any]], *, where: str) -> None:
        """Write what rewards lost, a row each; without any there is no file.

        Args:
            step: training steps done, with the one that lost them.
            lost: as `collect.lost` makes them.
            where: "training" or "evaluation".
        """
        if self._stream is None or not lost:
            return
        with (self.run / FAILURES).open("a", encoding="utf-8") as stream:
            for each in lost:
                row = {"step": int(step), "time": round(time.time(), 3), "where": where, **each}
                stream.write(json.dumps(row, allow_nan=False) + "\n")

    def log_images(
        self,
        step: int,
        key: str,
        images: Tensor,
        captions: Sequence[str],
        samples: Sequence[Sample] = (),
        *,
        columns: int | None = None,
    ) -> None:
        """Write images as one grid, `samples/<key>_<step>.png`, and to the trackers.

        Args:
            step: training steps done.
            key: a documented key, e.g. "samples/train".
            images: [N, 3, H, W] in [0, 1]; values outside are clamped. Captions: [N].
            captions: [N] texts; only W&B shows them.
            samples: [N], or none; W&B shows them as a table, `<key>_table`, beside the images.
            columns: of the grid; None = about as many as rows.
        """
        match_key(key)
        is_counted = len(images) == len(captions) and len(samples) in (0, len(images))
        if images.ndim != 4 or images.shape[1] != 3 or not is_counted:
            raise ShapeError(
                f"log_images takes images [N, 3, H, W], N captions and N samples or none, got "
                f"{tuple(images.shape)}, {len(captions)} and {len(samples)}"
            )
        if self._stream is None or not len(images):
            return
        from PIL import Image

        pixels = to_pixels(images)
        folder = self.run / SAMPLES
        folder.mkdir(exist_ok=True)
        file = folder / f"{key.rpartition('/')[2]}_{step:06d}.png"
        Image.fromarray(_grid(pixels, columns).numpy()).save(file)
        for tracker in self._trackers():
            if tracker.name == "tensorboard":
                tracker.log_images({key: pixels.numpy()}, step=step, dataformats="NHWC")
            else:
                import wandb

                pairs = zip(pixels.numpy(), captions, strict=True)
                row = {key: [wandb.Image(image, caption=caption) for image, caption in pairs]}
                if samples:
                    row[f"{key}_table"] = wandb_run.table(step, pixels, samples)
                tracker.log({"step": step, **row})

    def finish(self) -> None:
        """Close everything; safe to call twice."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        for tracker in self._trackers():
            if tracker.name == "wandb":
                summary = wandb_run.summary(self.run, read_metrics(self.run / METRICS))
                tracker.tracker.summary.update(summary)
            tracker.finish()
        self._is_tracked = False

    def _trackers(self) -> list[Any]:
        is_here = self._is_tracked and self.accelerator.is_main_process
        return list(self.accelerator.trackers) if is_here else []


def require_trackers(trackers: Sequence[str]) -> None:
    """Raise `MissingDependency` unless the package of every tracker is there."""
    for name in trackers:
        if name not in _INSTALL:
            known = ", ".join(_INSTALL)
            raise ConfigError(f"track.trackers: {name!r} is not a tracker; one of: {known}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin it is W&B's own output folder
            raise MissingDependency(
                f"track.trackers names {name}, which is not installed; run {_INSTALL[name]}, or "
                "remove it there (metrics.jsonl is always written)"
            )


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file in order; a last line cut off by a kill is left out.

    Raises:
        ValueError: a line before the last is not a JSON object.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("it is not an object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{file}: line {number}: {error}; remove the line") from error
        rows.append(row)
    return rows


def to_pixels(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] as uint8 [N, H, W, 3] on the CPU; NaN becomes black."""
    finite = torch.nan_to_num(images.detach().float().cpu(), nan=0.0)
    return (finite.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _open_metrics(file: Path, resumed_step: int | None) -> TextIO:
    """The metrics file for appending, without the rows after the step that the run goes on from."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if resumed_step is None and file.exists() and file.stat().st_size:
        raise ConfigError(
            f"{file} already holds the metrics of a run; set run.resume=latest to go on with it, "
            "choose another run.name, or delete the folder"
        )
    if resumed_step is not None:
        _drop_rows(file, after=resumed_step)
    return file.open("a", encoding="utf-8", buffering=1)


def _drop_rows(file: Path, *, after: int) -> None:
    """Leaves out the rows of later steps; a file that is not there stays so."""
    if not file.exists():
        return
    rows = [row for row in read_metrics(file) if row["step"] <= after]
    partial = file.with_name(f".{file.name}.tmp")
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def _grid(pixels: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Images uint8 [N, H, W, 3] side by side, about as many in a row as rows, on white."""
    num, height, width, _ = pixels.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    grid = torch.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8
    )
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
