"""What the config of `flowrl tokenizer train` may hold; descriptions are its documentation.

Read by `load_tokenizer_config`, as strictly as a run's config; `TokenizerConfig`, at the end, names
the sections. docs/tokenizer_config.md is made from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from flowrl.config import read_record
from flowrl.schema import Args, CheckpointConfig, RunRecord, TrackRecord, Unit
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


class TokenizerSection(Record):
    """What is trained: a new tokenizer, or one that there is already."""

    name: str | None = Field(
        default=None,
        min_length=1,
        description="name of the tokenizer, e.g. flextok, or package.module:Class",
    )
    args: Args = Field(
        default_factory=dict,
        description="numbers of the tokenizer; where it takes an autoencoder, this may be 'shapes' "
        "(the embedded one), a diffusers AutoencoderKL folder or a Hub id, whose weights are then "
        "loaded and frozen",
    )
    start_from: str | None = Field(
        default=None, min_length=1, description="folder or Hub id of a tokenizer to train further"
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizerSection:
        if (self.name is None) == (self.start_from is None):
            raise ValueError("give either tokenizer.name or tokenizer.start_from")
        if self.start_from is not None and self.args:
            raise ValueError(
                "tokenizer.args would do nothing: tokenizer.start_from brings its own; leave them "
                "out"
            )
        return self


class DropoutSection(Record):
    """How many tokens a training image keeps, for tokenizers that can keep fewer than all."""

    mode: Literal["none", "uniform", "pow2", "pow2_ceil"] = Field(
        default="none",
        description="none = every image keeps all; uniform = any count; pow2 = a power of two or "
        "all, equally often; pow2_ceil = uniform, rounded up to the next power of two",
    )
    full: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of images that keep all tokens whatever is drawn",
    )

    @model_validator(mode="after")
    def _does_something(self) -> DropoutSection:
        if self.mode == "none" and self.full:
            raise ValueError(
                f"dropout.full={self.full} would do nothing with dropout.mode=none; set the mode"
            )
        return self


class AddOnSection(Record):
    """Further losses."""

    name: str = Field(
        min_length=1, description="name of the add-on, e.g. prior, or package.module:Class"
    )
    args: Args = Field(default_factory=dict, description="arguments of the add-on's constructor")


class DataSection(Record):
    """The images, resized to the tokenizer's size; for a tokenizer of clips, clips."""

    source: str = Field(
        min_length=1,
        description="'shapes' (rendered scenes), a folder of images, or a Hugging Face dataset: a "
        "Hub id or a local folder. For a tokenizer of clips 'shapes' (scenes in motion) or a "
        "folder of animated GIF, PNG or WebP files, videos (extra video) or folders of numbered "
        "stills; of N frames those in the middle of F equal parts are taken",
    )
    split: str = Field(default="train", min_length=1, description="split of a dataset")
    image_column: str = Field(default="image", min_length=1, description="column of a dataset")
    num_images: int | None = Field(
        default=None,
        ge=1,
        description="train on so many; null = all there are, of 'shapes' 20000",
    )
    held_out: int = Field(
        default=256,
        ge=1,
        description="images of a folder or dataset that are never trained on, the same for every "
        "seed; 'shapes' holds out combinations instead",
    )
    crop: Literal["center", "random"] = Field(
        default="center",
        description="what is cut to the tokenizer's shape after the shorter side was resized to "
        "it, of a clip in all frames alike; held-out images are always cut at the centre",
    )
    flip: bool = Field(
        default=False, description="mirror half of the training images or clips, drawn at random"
    )
    workers: int = Field(default=0, ge=0, description="processes that read images; 0 = this one")


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


class TokenizerConfig(Record):
    """Everything that defines a tokenizer's training."""

    run: RunSection = Field(description="the run")
    tokenizer: TokenizerSection = Field(description="what is trained")
    dropout: DropoutSection = Field(default=DropoutSection(), description="token dropout")
    addons: tuple[AddOnSection, ...] = Field(default=(), description="further losses")
    data: DataSection = Field(description="the images or clips")
    optim: OptimSection = Field(description="the optimiser")
    compute: ComputeSection = Field(default=ComputeSection(), description="how the work is cut up")
    eval: EvalSection = Field(default=EvalSection(), description="the held-out evaluation")
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="when the state is saved"
    )
    track: TrackSection = Field(default=TrackSection(), description="where metrics go")

    @model_validator(mode="after")
    def _fits_together(self) -> TokenizerConfig:
        if self.optim.warmup_steps > self.run.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} exceeds run.steps={self.run.steps}; "
                "lower it"
            )
        names = [addon.name for addon in self.addons]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"addons names '{name}' {names.count(name)} times; keep one of them"
                )
        total, micro = self.compute.batch_size, self.compute.micro_batch_size
        if micro is not None and total % micro:
            raise ValueError(
                f"compute.batch_size={total} does not divide into compute.micro_batch_size={micro}"
            )
        return self


def load_tokenizer_config(path: str | Path, overrides: Iterable[str] = ()) -> TokenizerConfig:
    """The configuration in a YAML file, with dotted overrides laid over it.

    Raises:
        ConfigError: with all problems, a line each, that name file, key and closest match.
    """
    return read_record(TokenizerConfig, path, overrides)[0]


def run_folder(config: TokenizerConfig) -> Path:
    """Where the run writes."""
    return Path(config.run.output_dir) / config.run.name
