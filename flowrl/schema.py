"""What a run's configuration may hold: frozen records whose descriptions are their documentation.

Read by `flowrl.config`, printed by `flowrl.configdoc`. Reading order: `Config`, at the end, names
the sections; rules that join two keys are its validator's.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from flowrl.strict import Record

Unit = Annotated[float, Field(ge=0, lt=1)]
Args = dict[str, Any]


class RunRecord(Record):
    """What any run is called, where it writes and how long it lasts."""

    name: str = Field(min_length=1, description="name of the run and of its folder in output_dir")
    output_dir: str = Field(
        default="runs", min_length=1, description="folder that holds the run's folder"
    )
    seed: int = Field(default=0, ge=0, description="seed from which every random number is derived")
    steps: int = Field(ge=1, description="optimiser steps")
    resume: str | None = Field(
        default=None, min_length=1, description="checkpoint to go on from: 'latest' or its folder"
    )
    max_minutes: float | None = Field(
        default=None,
        gt=0,
        description="stop, save, evaluate and write the results after this much training, minutes",
    )

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if name in (".", "..") or "/" in name or "\\" in name:
            raise ValueError(
                f"run.name must be a plain folder name, got {name!r}; put the path into "
                "run.output_dir"
            )
        return name


class RunConfig(RunRecord):
    """What the run is called, where it writes and how long it lasts."""

    steps: int = Field(ge=1, description="training steps; one step is one rollout")
    max_evaluations: int | None = Field(
        default=None,
        ge=1,
        description="stop, save, evaluate and report after so many network evaluations, those of "
        "rollout and training together; guidance counts as two",
    )


class LoraConfig(Record):
    """Low-rank adapters; used with `model.tuning: lora`."""

    rank: int = Field(default=32, ge=1, description="rank of the adapters")
    alpha: float = Field(
        default=64.0, gt=0, description="scale of the adapters; they weigh alpha / rank"
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="names of the layers adapted; null = the pipeline's choice",
    )


class SamplingConfig(Record):
    """The law that a token model draws from, beside its network; flow models have none of it."""

    temperature: float = Field(
        default=1.0, gt=0, description="token models: logits are divided by it"
    )
    guidance_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="token models: course of guidance_scale over the steps of a draw, from 1 up",
    )
    log_prob: Literal["guided", "conditional"] = Field(
        default="guided",
        description="token models: the law that is scored; guided = the one drawn from, "
        "conditional = without guidance: half of the network rows, but a biased gradient",
    )


class ModelConfig(Record):
    """The generator, and what of it is trained."""

    pipeline: str = Field(
        default="sd3", min_length=1, description="adapter of the model's architecture"
    )
    id: str = Field(
        min_length=1, description="'shapes' (the embedded model), a Hub id or a diffusers folder"
    )
    revision: str | None = Field(
        default=None, min_length=1, description="the Hub's branch, tag or commit"
    )
    guidance_scale: float = Field(
        default=1.0,
        ge=0,
        description="guidance in rollout and training: classifier-free, 1 = off; or, as with flux, "
        "an input of the network",
    )
    sampling: SamplingConfig = Field(
        default=SamplingConfig(), description="the law that a token model draws from"
    )
    height: int | None = Field(
        default=None, ge=1, description="height of the images, pixels; null = the model's own"
    )
    width: int | None = Field(
        default=None, ge=1, description="width of the images, pixels; null = the model's own"
    )
    max_sequence_length: int = Field(
        default=256,
        ge=1,
        description="length to which the T5 text is padded, tokens: as the model was trained",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="precision in which the network and the frozen parts are held",
    )
    tuning: Literal["full", "lora"] = Field(
        default="full", description="train all weights, or adapters"
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="the adapters")
    gradient_checkpointing: bool = Field(
        default=False,
        description="recompute activations in the backward pass: less memory, more time",
    )
    args: Args = Field(
        default_factory=dict, description="further arguments of the pipeline's constructor"
    )


class MethodConfig(Record):
    """The alignment method."""

    name: str = Field(min_length=1, description="name of the method, e.g. mix_grpo")
    args: Args = Field(
        default_factory=dict, description="arguments of the method; defaults are its paper's"
    )


class DataConfig(Record):
    """The training prompts or pairs, and the geometry of a rollout."""

    train: str = Field(
        min_length=1,
        description="JSONL or text file of prompts, or 'shapes/train'; for a method that learns "
        "from pairs, a JSONL file with a prompt, a chosen and a rejected image per line",
    )
    num_groups: int = Field(ge=1, description="prompts per rollout, over all processes")
    group_size: int = Field(ge=1, description="samples per prompt")
    shuffle: bool = Field(
        default=True, description="draw prompts in a seeded order, not the file's"
    )


class RewardConfig(Record):
    """One reward and its weight in the sum."""

    name: str = Field(min_length=1, description="name of the reward")
    weight: float = Field(default=1.0, description="factor in the weighted sum")
    args: Args = Field(default_factory=dict, description="arguments of the reward's constructor")

    @property
    def label(self) -> str:
        """What metrics call it: of "a/b.py:score", "b.score"; of "a.b:Score", "a.b.Score"."""
        origin, colon, attribute = self.name.rpartition(":")
        if not colon:
            return self.name
        return f"{PurePath(origin).name.removesuffix('.py')}.{attribute}"


class ScoringConfig(Record):
    """How rewards are called, and how much of what they fail at is borne."""

    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="samples per call of a reward that scores them one by one; null = all at once",
    )
    parts: int = Field(
        default=1,
        ge=1,
        description="parts into which the groups of an update are cut; a part is scored while the "
        "next is drawn, and learnt from when it has its scores; 1 = one thing after the other",
    )
    retries: int = Field(default=2, ge=0, description="further tries of a call that failed")
    backoff_s: float = Field(
        default=1.0, ge=0, description="pause before the first of them, seconds; doubles each time"
    )
    timeout_s: float | None = Field(
        default=None, gt=0, description="time that a call may take, seconds; null = any"
    )
    max_invalid: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of the samples of a window that a reward may leave without a score; "
        "above it the run stops",
    )
    window: int = Field(default=20, ge=1, description="training steps of that window")
    min_group_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of a group that must have scores; below it the whole group is left out, "
        "above it the group's statistics are taken over those that have",
    )


class OptimConfig(Record):
    """AdamW, its schedule, and how a rollout is split into updates."""

    lr: float = Field(gt=0, description="learning rate after the warm-up")
    betas: tuple[Unit, Unit] = Field(
        default=(0.9, 0.999), description="AdamW's decay of both moments"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(default=1e-4, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="global norm to which gradients are cut"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="course of the learning rate after the warm-up, down to 0"
    )
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up, optimiser updates")
    updates_per_rollout: int = Field(
        default=1, ge=1, description="optimiser updates into which a rollout's groups are split"
    )
    epochs: int = Field(default=1, ge=1, description="passes over a rollout")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of the moving average of the weights; null = none",
    )
    ema_every: int = Field(default=1, ge=1, description="optimiser updates between two EMA updates")


class ComputeConfig(Record):
    """How the work is cut up; changes speed and memory, never the result."""

    micro_batch_size: int = Field(ge=1, description="network rows per forward and backward")
    rollout_batch_size: int = Field(ge=1, description="network rows per forward without gradient")
    decode_batch_size: int = Field(ge=1, description="images per call of the decoder")
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        default="no",
        description="autocast of the trained network; auto = bf16 where it is native, else no",
    )
    recompute_old_log_prob: bool = Field(
        default=False, description="score a rollout again in training's batches before learning"
    )
    ratio_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="how far from 1 the ratio of the first pass may be; null = a tenth of the clip "
        "range, within 2e-6 and 1e-4",
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads per process; null = torch's choice"
    )


class EvalConfig(Record):
    """The held-out evaluation; it does not disturb training."""

    data: str = Field(
        default="shapes/heldout", min_length=1, description="file of prompts, or 'shapes/heldout'"
    )
    every: int = Field(
        default=0, ge=0, description="training steps between two, 0 = only at both ends"
    )
    num_steps: int | None = Field(
        default=None, ge=1, description="sampler steps; flow models need it, token models have none"
    )
    guidance_scale: float | None = Field(default=None, ge=0, description="guidance; null = model's")
    samples_per_prompt: int = Field(default=1, ge=1, description="images per prompt")
    seed: int = Field(
        default=1234, ge=0, description="seed of the starting noise, the same every time"
    )
    max_prompts: int | None = Field(
        default=None, ge=1, description="use the first so many; null = all"
    )
    rewards: tuple[RewardConfig, ...] | None = Field(
        default=None, min_length=1, description="rewards measured; null = those trained on"
    )
    num_samples_shown: int = Field(
        default=8, ge=0, description="images kept for report and tracker"
    )


class CheckpointConfig(Record):
    """When the run's state is saved."""

    every: int = Field(
        default=10,
        ge=0,
        description="training steps between two, 0 = only at the end; a new best of the monitor is "
        "saved as well",
    )
    keep: int = Field(default=2, ge=1, description="checkpoints kept; older ones are deleted")


class MonitorConfig(Record):
    """A held-out reward that guards the run: the weights of its best evaluation are kept."""

    reward: str | None = Field(
        default=None,
        min_length=1,
        description="reward by whose held-out mean the best weights are kept in the run's best/; "
        "one of eval.rewards or rewards, all of which are then measured; null = none",
    )
    proxy: str | None = Field(
        default=None,
        min_length=1,
        description="held-out reward that stands for what is trained on in the report's plots; "
        "null = the weighted sum of the rewards trained on",
    )
    early_stop: int | None = Field(
        default=None,
        ge=1,
        description="evaluations without a new best after which the run ends; null = it goes on",
    )


class TrackRecord(Record):
    """Where metrics of any run go besides metrics.jsonl."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = Field(
        default=(), description="accelerate's trackers to write to"
    )
    project: str = Field(default="flowrl", min_length=1, description="project in the tracker")
    entity: str | None = Field(default=None, min_length=1, description="W&B's team or user")
    mode: Literal["offline", "online"] = Field(default="offline", description="W&B's mode")
    tags: tuple[str, ...] = Field(default=(), description="W&B's tags")
    group: str | None = Field(
        default=None,
        min_length=1,
        description="W&B's group of runs, e.g. of one method over several seeds",
    )
    log_every: int = Field(
        default=1, ge=1, description="training steps between two lines of metrics"
    )


class TrackConfig(TrackRecord):
    """Where metrics go besides metrics.jsonl."""

    image_every: int = Field(
        default=0, ge=0, description="training steps between two grids of rollouts, 0 = none"
    )


class Config(Record):
    """Everything that defines a run."""

    run: RunConfig = Field(description="the run")
    model: ModelConfig = Field(description="the generator")
    method: MethodConfig = Field(description="the alignment method")
    data: DataConfig = Field(description="the training prompts")
    rewards: tuple[RewardConfig, ...] = Field(
        default=(),
        description="rewards that are summed; none for a method that learns from pairs",
    )
    scoring: ScoringConfig = Field(default=ScoringConfig(), description="how rewards are called")
    optim: OptimConfig = Field(description="the optimiser")
    compute: ComputeConfig = Field(description="how the work is cut up")
    eval: EvalConfig = Field(description="the held-out evaluation")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="when the state is saved"
    )
    monitor: MonitorConfig = Field(
        default=MonitorConfig(), description="a reward that guards the run"
    )
    track: TrackConfig = Field(default=TrackConfig(), description="where metrics go")

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        groups, updates = self.data.num_groups, self.optim.updates_per_rollout
        if groups % updates:
            low = groups // updates * updates
            fitting = " or ".join(str(each) for each in (low, low + updates) if each)
            raise ValueError(
                f"data.num_groups={groups} groups do not divide into "
                f"optim.updates_per_rollout={updates} updates; use {fitting} groups"
            )
        total = self.run.steps * updates * self.optim.epochs
        if self.optim.warmup_steps > total:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} exceeds the run's {total} updates "
                f"({self.run.steps} steps x {updates} x {self.optim.epochs} epochs); lower it"
            )
        self._check_monitor()
        for key, rewards in (("rewards", self.rewards), ("eval.rewards", self.eval.rewards or ())):
            names = [reward.label for reward in rewards]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(
                        f"{key} names '{name}' {names.count(name)} times, so their metrics would "
                        "overwrite each other; keep one"
                    )
        return self

    def _check_monitor(self) -> None:
        for key in ("proxy", "early_stop"):
            value = getattr(self.monitor, key)
            if self.monitor.reward is None and value is not None:
                raise ValueError(
                    f"monitor.{key}={value} would do nothing without monitor.reward; name the "
                    "reward to watch there"
                )
        if self.monitor.early_stop is not None and not self.eval.every:
            raise ValueError(
                f"monitor.early_stop={self.monitor.early_stop} counts evaluations, but "
                "eval.every=0 evaluates at both ends only; set eval.every"
            )
