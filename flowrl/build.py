"""The composition root: a config becomes live objects. The only module that knows every package.

Reading order: `build_parts` (everything, in the order in which it can fail cheaply) and what it
calls; what the config names is found and loaded by `flowrl.sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from flowrl.calls import check_call
from flowrl.config import Config
from flowrl.data.pairs import load_pairs
from flowrl.data.sampler import GroupSampler, eval_batch
from flowrl.errors import ConfigError
from flowrl.fits import (
    check_compute,
    check_groups,
    check_model,
    check_parts,
    check_teacher,
    measured_rewards,
    ratio_tolerance,
)
from flowrl.methods import METHODS, Method
from flowrl.plugins import find_plugin
from flowrl.policies.distance import MAX_SAMPLES, TokenDistance, VelocityDistance
from flowrl.policies.flow import FlowPolicy, guidance_rows
from flowrl.policies.forward import ForwardPolicy
from flowrl.policies.neighbors import NeighborPolicy
from flowrl.policies.token import Sampling, TokenPolicy
from flowrl.policies.weights import FullWeights, LoraWeights
from flowrl.precision import resolve_precision
from flowrl.sources import (
    build_pipeline,
    build_rewards,
    check_size,
    find_adapter,
    load_named_prompts,
    require_ours,
)
from flowrl.train.evaluate import Evaluator
from flowrl.train.loop import Trainer
from flowrl.train.schedule import LearningRate
from flowrl.train.scoring import RewardSet
from flowrl.train.step import Learner
from flowrl.train.track import require_trackers
from flowrl.types import Prompt


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before anything is written: `flowrl check` stops here."""

    config: Config
    accelerator: Accelerator
    method: Method
    policy: FlowPolicy | ForwardPolicy | NeighborPolicy | TokenPolicy
    rewards: RewardSet
    eval_rewards: RewardSet
    train_prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    sampler: GroupSampler

    @property
    def guidance_rows(self) -> int:
        """Network rows per row of a trajectory."""
        if isinstance(self.policy, TokenPolicy):
            return self.policy.rows_per_score
        return guidance_rows(self.policy.pipeline, self.config.model.guidance_scale)


def build_parts(config: Config, where: str) -> Parts:
    """Everything but the optimiser, checked; loads the model, writes nothing.

    Args:
        config: the run's.
        where: the config file's name, for error messages.

    Raises:
        ConfigError: something named in the config does not exist or does not fit.
        DataError: a prompt file cannot be read.
    """
    require_ours("rewards", "pipelines")
    if config.compute.threads is not None:
        torch.set_num_threads(config.compute.threads)
    require_trackers(config.track.trackers)
    method = build_method(config, where)
    adapter = find_adapter(config.model, where)
    check_model(method, adapter, config, where)
    rows = guidance_rows(adapter, config.model.guidance_scale)
    check_teacher(method, config, where, rows)
    load_train = load_pairs if method.takes_pairs else load_named_prompts
    train_prompts = load_train(config.data.train, where=f"{where}: data.train")
    eval_prompts = load_named_prompts(config.eval.data, where=f"{where}: eval.data")
    eval_prompts = eval_prompts[: config.eval.max_prompts]
    rewards = build_rewards(config.rewards, config.scoring, where=f"{where}: rewards")
    measured = measured_rewards(config, rewards.group_scope, where)
    eval_rewards = build_rewards(measured, config.scoring, where=f"{where}: eval.rewards")
    accelerator = build_accelerator(config)
    sampler = build_sampler(config, train_prompts, accelerator)
    if rewards.group_scope and not sampler.has_whole_groups:
        raise ConfigError(
            f"{where}: a reward compares the samples of a group, but groups of "
            f"{config.data.group_size} span {accelerator.num_processes} ranks; use a number of "
            "groups per update that the ranks divide"
        )
    check_parts(config, sampler, where)
    check_groups(method, sampler, where)
    check_compute(method, config, where, rows)
    policy = build_policy(config, where, method, accelerator.device)
    if method.takes_pairs:
        check_size(policy.pipeline, train_prompts, where)
    return Parts(
        config, accelerator, method, policy, rewards, eval_rewards, train_prompts, eval_prompts,
        sampler,
    )  # fmt: skip


def build_trainer(parts: Parts, run: Path) -> Trainer:
    """The trainer over the parts; encodes all prompts into `run/prompts` and frees the encoders."""
    config, accelerator, policy = parts.config, parts.accelerator, parts.policy
    texts = [prompt.text for prompt in (*parts.train_prompts, *parts.eval_prompts)]
    with accelerator.main_process_first():
        policy.precompute(texts, run / "prompts")
    optim = config.optim
    optimizer = torch.optim.AdamW(
        list(policy.weights.trainable()),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    updates = config.run.steps * optim.updates_per_rollout * optim.epochs
    factor = LearningRate(optim.schedule, optim.warmup_steps, updates)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    network, optimizer, schedule = accelerator.prepare(policy.weights.network, optimizer, schedule)
    policy.training_network = network
    learner = Learner(
        accelerator=accelerator,
        network=network,
        policy=policy,
        method=parts.method,
        optimizer=optimizer,
        schedule=schedule,
        rows_per_chunk=max(1, config.compute.micro_batch_size // parts.guidance_rows),
        max_grad_norm=optim.max_grad_norm,
        epochs=optim.epochs,
        ema_every=optim.ema_every,
        recompute_old_log_prob=config.compute.recompute_old_log_prob,
    )
    return Trainer(
        config=config,
        run=run,
        accelerator=accelerator,
        policy=policy,
        method=parts.method,
        rewards=parts.rewards,
        sampler=parts.sampler,
        evaluator=build_evaluator(parts),
        learner=learner,
        ratio_tolerance=ratio_tolerance(config, parts.method),
        guidance_rows=parts.guidance_rows,
    )


def build_method(config: Config, where: str) -> Method:
    """The method named in the config, with its arguments checked against its signature."""
    name, make = config.method.name, METHODS.get(config.method.name)
    here = f"{where}: method.name={name}"
    if make is None:
        make = find_plugin(name, "method", METHODS, where=here)
    args = check_call(make, config.method.args, where=f"{where}: method.args")
    try:
        method = make(**args)
    except ValueError as error:
        raise ConfigError(f"{where}: method.args: {error}") from error
    if not isinstance(method, Method):
        raise ConfigError(
            f"{here} makes {type(method).__name__}; expected a function that returns a "
            "flowrl.methods.Method"
        )
    return method


def build_policy(
    config: Config, where: str, method: Method, device: torch.device
) -> FlowPolicy | ForwardPolicy | NeighborPolicy | TokenPolicy:
    """The model with its trainable weights."""
    model, compute = config.model, config.compute
    pipeline = build_pipeline(model, where, device)
    if model.gradient_checkpointing:
        pipeline.network.enable_gradient_checkpointing()
    weights = build_weights(config, method, pipeline)
    sizes: dict[str, Any] = {
        "rollout_batch_size": compute.rollout_batch_size,
        "decode_batch_size": compute.decode_batch_size,
        "device": device,
    }
    if method.policy == "token":
        sampling = Sampling(guidance_scale=model.guidance_scale, **dict(model.sampling))
        return TokenPolicy(pipeline, weights, sampling=sampling, **sizes)
    policy = FlowPolicy(pipeline, weights, guidance_scale=model.guidance_scale, **sizes)
    if method.policy == "neighbor":
        return NeighborPolicy(policy)
    return ForwardPolicy(policy) if method.policy == "forward" else policy


def build_weights(config: Config, method: Method, pipeline: Any) -> FullWeights | LoraWeights:
    """The parameter sets of a pipeline's network."""
    model, with_old = config.model, method.old_decay is not None
    if model.tuning == "lora":
        return LoraWeights(
            pipeline.network,
            rank=model.lora.rank,
            alpha=model.lora.alpha,
            target_modules=list(model.lora.target_modules or pipeline.lora_targets()),
            seed=config.run.seed,
            ema_decay=config.optim.ema_decay,
            with_old=with_old,
        )
    return FullWeights(
        pipeline.network,
        with_reference=needs_reference(config, method),
        ema_decay=config.optim.ema_decay,
        with_old=with_old,
    )


def build_accelerator(config: Config) -> Accelerator:
    """The distributed engine; schedules are stepped once per update, whatever the world size.

    `cpu` is said where there is nothing else: accelerate would otherwise take the processes that
    torchrun starts there for runs of their own.
    """
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=resolve_precision(config.compute.mixed_precision),
        log_with=list(config.track.trackers) or None,
        project_dir=str(run_folder(config)),
        step_scheduler_with_optimizer=False,
    )


def build_sampler(
    config: Config, prompts: Sequence[Prompt], accelerator: Accelerator
) -> GroupSampler:
    """The batches of this rank."""
    return GroupSampler(
        prompts,
        num_groups=config.data.num_groups,
        group_size=config.data.group_size,
        updates_per_rollout=config.optim.updates_per_rollout,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def needs_reference(config: Config, method: Method) -> bool:
    """Whether full tuning must keep a copy of the base: for the method, or for the distance."""
    return "reference" in method.objective.needs.sets or config.monitor.reward is not None


def build_distance(parts: Parts) -> VelocityDistance | TokenDistance | None:
    """The distance from the base, on samples spread over the held-out prompts.

    None where no monitor guards the run: full tuning keeps no copy of the base then.
    """
    config, prompts = parts.config, parts.eval_prompts
    if config.monitor.reward is None:
        return None
    num = min(len(prompts), MAX_SAMPLES)
    batch = eval_batch(
        [prompts[i * len(prompts) // num] for i in range(num)],
        samples_per_prompt=MAX_SAMPLES // num,
        seed=config.eval.seed,
        rank=0,
        world_size=1,
    )
    policy = parts.policy
    if isinstance(policy, TokenPolicy):
        return TokenDistance(policy, batch)
    sampler = policy if isinstance(policy, FlowPolicy) else policy.sampler
    assert config.eval.num_steps is not None  # a flow model has them
    return VelocityDistance(sampler, batch, num_steps=config.eval.num_steps)


def build_evaluator(parts: Parts) -> Evaluator:
    """The held-out evaluation; of the averaged weights where the run keeps them."""
    config, settings = parts.config, parts.config.eval
    guidance = settings.guidance_scale
    return Evaluator(
        prompts=parts.eval_prompts,
        rewards=parts.eval_rewards,
        weights="current" if config.optim.ema_decay is None else "ema",
        num_steps=settings.num_steps,
        guidance_scale=config.model.guidance_scale if guidance is None else guidance,
        samples_per_prompt=settings.samples_per_prompt,
        seed=settings.seed,
        num_shown=settings.num_samples_shown,
        distance=build_distance(parts),
    )


def run_folder(config: Config) -> Path:
    """Where the run writes."""
    return Path(config.run.output_dir) / config.run.name
