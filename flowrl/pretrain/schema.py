"""What the configs of trainings from data have in common; descriptions are their documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from flowrl.schema import CheckpointConfig, RunRecord, TrackRecord, Unit
from flowrl.strict import Record

# What a resumed run may change: where and how fast it runs, and what is observed.
FREE = (
    "run.name", "run.output_dir", "run.resume", "run.max_minutes",
    "checkpoint", "track", "eval", "compute.threads", "data.workers",
)  # fmt: skip


class RunSection(RunRecord):
    """What the run is called, where it writes and how long it lasts."""

    steps: int = Field(
        ge=1, description="optimiser steps; all schedules, also the losses', run over them"
    )


class OptimSection(Record):
    """AdamW, its schedule, and the moving average that is evaluated and exported."""

    lr: float = Field(gt=0, description="learning rate after the warm-up")
    muon_lr: float | None = Field(
        default=None,
        gt=0,
        description="learning rate of Muon for matrices of transformer blocks, which then learn "
        "in about half of the steps; null = AdamW trains everything",
    )
    betas: tuple[Unit, Unit] = Field(
        default=(0.9, 0.95), description="AdamW's decay of both moments"
    )
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay, of matrices and kernels only"
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="global norm to which gradients are cut"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="course of the learning rate after the warm-up, down to 0"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up, optimiser steps")
    ema_decay: float | None = Field(
        default=0.999,
        gt=0,
        lt=1,
        description="decay of the moving average of the weights; null = the weights themselves are "
        "evaluated and exported",
    )
    adversary_lr: float | None = Field(
        default=None, gt=0, description="learning rate of adversaries; null = lr"
    )
    adversary_betas: tuple[Unit, Unit] = Field(
        default=(0.5, 0.9), description="AdamW's decay of both moments, for adversaries"
    )


class ComputeSection(Record):
    """How the work is cut up."""

    batch_size: int = Field(default=64, ge=1, description="images per step, over all processes")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="images per forward and backward; statistics such as a code's frequency are "
        "taken over it, so it is part of the result; null = the batch's share of a process",
    )
    mixed_precision: Literal["auto", "no", "bf16"] = Field(
        default="no", description="autocast; auto = bf16 where it is native, else no"
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per process; null = torch's choice"
    )


class EvalSection(Record):
    """The held-out evaluation; it does not disturb training."""

    every: int = Field(
        default=0, ge=0, description="steps between two, 0 = only at the end; there is always one"
    )
    num_images: int = Field(default=64, ge=1, description="held-out images measured")
    num_shown: int = Field(default=8, ge=1, description="of these, shown in the grid")
    batch_size: int = Field(default=32, ge=1, description="images per forward")
    seed: int = Field(
        default=1234, ge=0, description="seed of whatever is drawn, the same every time"
    )


class CheckpointSection(CheckpointConfig):
    """When the run's state is saved."""

    every: int = Field(default=500, ge=0, description="steps between two, 0 = only at the end")


class TrackSection(TrackRecord):
    """Where metrics go besides metrics.jsonl."""

    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics")


def check_sections(run: RunSection, optim: OptimSection, compute: ComputeSection) -> None:
    """Refuses (ValueError) a warm-up beyond the run, and a batch of no whole micro-batches."""
    if optim.warmup_steps > run.steps:
        raise ValueError(
            f"optim.warmup_steps={optim.warmup_steps} exceeds run.steps={run.steps}; lower it"
        )
    total, micro = compute.batch_size, compute.micro_batch_size
    if micro is not None and total % micro:
        raise ValueError(
            f"compute.batch_size={total} does not divide into compute.micro_batch_size={micro}"
        )


def run_folder(config: Any) -> Path:
    """Where the run writes."""
    return Path(config.run.output_dir) / config.run.name
