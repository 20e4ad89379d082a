"""A run of training: steps, evaluations, checkpoints, and the exported weights.

Reading order: `PretrainRun.run`, `_train_step`, `_evaluate`, `_export`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowrl.config import to_dict
from flowrl.pretrain.batches import Batches, batches_of
from flowrl.pretrain.schema import FREE
from flowrl.pretrain.step import Learner
from flowrl.pretrain.task import Task
from flowrl.pretrain.weights import TrainingWeights
from flowrl.train.checkpoint import Checkpoints, Together
from flowrl.train.control import Clock
from flowrl.train.lifecycle import Life, running
from flowrl.train.machine import max_memory_gb
from flowrl.train.resume import find_checkpoint
from flowrl.train.runfiles import replaced

FINAL = "final"


class PretrainRun:
    """One run. Build it with `flowrl.tokenizer.build.build_run` or `flowrl.ar.build.build_run`.

    Args:
        config: a record with the sections of `flowrl.pretrain.schema`.
        folder: the run's.
        accelerator: that prepared the learner's parts.
        learner: trains.
        weights: everything that training changes.
        batches: of what is trained on.
        task: measures and exports.
    """

    def __init__(
        self,
        *,
        config: Any,
        folder: Path,
        accelerator: Accelerator,
        learner: Learner,
        weights: TrainingWeights,
        batches: Batches,
        task: Task,
    ) -> None:
        self.config = config
        self.folder = folder
        self.accelerator = accelerator
        self.learner = learner
        self.weights = weights
        self.batches = batches
        self.task = task
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
        self.train_seconds = 0.0
        self._step = 0
        self._last_saved: int | None = None
        self._evaluated: int | None = None
        self._measured: dict[str, float] = {}  # by the last evaluation

    def run(self) -> str:
        """Trains to the end, or until stopped; returns "finished", "stopped" or "interrupted".

        Raises:
            ConfigError: the folder holds another run.
            NonFiniteError: see the message; the last checkpoint stands.
        """
        resumed = self._resume()
        with running(
            self.config,
            self.accelerator,
            self.folder,
            resumed_step=resumed,
            where=lambda: (self._step, self.train_seconds),
        ) as life:
            self.tracker, self.progress = life.tracker, life.progress
            return self._run(life)

    def _run(self, life: Life) -> str:
        settings = self.config
        self.learner.main.network.train()
        batches = batches_of(self.batches, start=self._step, steps=settings.run.steps)
        how = None
        while how is None and self._step < settings.run.steps:
            self._train_step(batches)
            if settings.eval.every and self._step % settings.eval.every == 0:
                self._evaluate()
            if settings.checkpoint.every and self._step % settings.checkpoint.every == 0:
                self._save()
            how = life.must_end(self._limit_reached())
        how = how or "finished"
        self._save()
        if how != "interrupted":
            self._evaluate()
            self._export()
        life.ended(how, self._limit_reached())
        return how

    def _limit_reached(self) -> str:
        limit = self.config.run.max_minutes
        is_reached = limit is not None and self.train_seconds / 60 >= limit
        return f"run.max_minutes={limit}" if is_reached else ""

    def _train_step(self, batches: Iterator[list[Any]]) -> None:
        clock = Clock.started()
        batch = next(batches)
        data_s = clock.lap()
        steps = self.config.run.steps
        lr = float(self.learner.main.optimizer.param_groups[0]["lr"])
        found = self.learner.learn(batch, step=self._step, progress=self._step / steps)
        step_s = time.perf_counter() - clock.start
        self.train_seconds += step_s
        self._step += 1
        metrics = {f"train/{name}": value for name, value in found.items()}
        metrics |= {
            "train/lr": lr,
            "perf/step_time_s": step_s,
            "perf/data_s": data_s,
            "perf/images_per_s": self.config.compute.batch_size / step_s,
            "perf/max_memory_gb": max_memory_gb(self.accelerator.device),
        }
        self.progress.update(self._step, metrics)
        if self._step % self.config.track.log_every == 0 or self._step in (1, steps):
            self.tracker.log(self._step, metrics)

    def _evaluate(self) -> None:
        """On the main process, with the averaged weights; the others wait."""
        if self._evaluated == self._step:
            return
        self._evaluated = self._step
        if self.accelerator.is_main_process:
            progress = self._step / self.config.run.steps
            with self.weights.averaged():
                found = self.task.measure(progress=progress, device=self.accelerator.device)
            self._measured = found.metrics
            self.tracker.log(self._step, found.metrics)
            self.tracker.log_images(
                self._step,
                f"samples/{found.name}",
                found.images,
                found.captions,
                columns=found.columns,
            )
            shown = {k: found.metrics[k] for k in self.task.shown if k in found.metrics}
            self.progress.evaluated(self._step, shown)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------- around the steps

    def _save(self) -> None:
        if self._last_saved == self._step:
            return
        extra = {
            "step": self._step,
            "train_seconds": self.train_seconds,
            "evaluated": self._evaluated,
            "measured": self._measured,
            "config": to_dict(self.config),
        }
        self.checkpoints.save(self.accelerator, self._step, extra, self.weights)
        self._last_saved = self._step

    def _resume(self) -> int | None:
        """Puts a checkpoint's state in place; returns its step, None for a new run."""
        path = find_checkpoint(self.config, self.folder, free=FREE)
        if path is None:
            return None
        extra = self.checkpoints.load(self.accelerator, path, self.weights)
        self._step = self._last_saved = extra["step"]
        self.train_seconds = extra["train_seconds"]
        self._evaluated, self._measured = extra["evaluated"], extra["measured"]
        return self._step

    def _export(self) -> None:
        """The model as it is loaded again: the weights that were evaluated."""
        with Together(self.accelerator, self.folder / FINAL):
            if self.accelerator.is_main_process:
                with replaced(self.folder / FINAL) as folder, self.weights.averaged():
                    self.task.export(folder, step=self._step, metrics=self._measured)
