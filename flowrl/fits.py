"""Whether a method fits what the config puts around it, answered before anything is loaded.

An impossible combination is a `ConfigError` with the config's file and key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flowrl.data.sampler import GroupSampler
from flowrl.errors import ConfigError, closest
from flowrl.methods import METHODS, Method
from flowrl.schema import Config, RewardConfig, SamplingConfig


def check_model(method: Method, adapter: Any, config: Config, where: str) -> None:
    """Refuses a method, or settings, that are of another kind of model than the adapter's.

    Args:
        method: the run's.
        adapter: the pipeline's class.
        config: the run's.
        where: the config file's name, for error messages.

    Raises:
        ConfigError: a method of tokens on a flow model or the reverse; `model.sampling` on a flow
            model, or one without eval.num_steps; adapters that a token model cannot save.
    """
    model, is_token = config.model, hasattr(adapter, "logits")
    if is_token != (method.policy == "token"):
        kinds = ("flow", "token")
        fitting = [n for n, make in METHODS.items() if (make().policy == "token") == is_token]
        raise ConfigError(
            f"{where}: {method.name} trains {kinds[not is_token]} models, but model.pipeline="
            f"{model.pipeline} is a {kinds[is_token]} model; use one of " + ", ".join(fitting)
        )
    if is_token and model.tuning == "lora":
        raise ConfigError(
            f"{where}: model.tuning=lora is of diffusers' models; set model.tuning=full"
        )
    if is_token and config.eval.num_steps is not None:
        raise ConfigError(
            f"{where}: eval.num_steps={config.eval.num_steps} would do nothing: a token model "
            "takes a step per group of its order; leave it out"
        )
    if is_token:
        return
    if config.eval.num_steps is None:
        raise ConfigError(f"{where}: eval.num_steps is missing: the sampler steps of a flow model")
    changed = [key for key, value in model.sampling if value != getattr(SamplingConfig(), key)]
    if changed:
        raise ConfigError(
            f"{where}: model.sampling.{changed[0]} would do nothing: it is of token models, and "
            f"model.pipeline={model.pipeline} is a flow model; leave it out"
        )


def check_groups(method: Method, sampler: GroupSampler, where: str) -> None:
    """Refuses groups that the method's plan does not fit.

    Raises:
        ConfigError: another group size than the plan's, too few samples to compare, or groups that
            span ranks.
    """
    plan, size = method.plan(0), sampler.group_size
    if plan.group_size is not None and size != plan.group_size:
        raise ConfigError(
            f"{where}: {method.name} takes {plan.group_size} samples of a prompt, but "
            f"data.group_size={size}; set data.group_size={plan.group_size}, or change method.args"
        )
    if plan.needs_whole_groups and size < 2:
        raise ConfigError(
            f"{where}: {method.name} compares the samples of a prompt, but data.group_size={size}; "
            "use at least 2"
        )
    if plan.needs_whole_groups and not sampler.has_whole_groups:
        raise ConfigError(
            f"{where}: {method.name} takes the samples of a prompt together, but groups of {size} "
            f"span {sampler.world_size} ranks; use a number of groups per update that the ranks "
            "divide"
        )


def check_parts(config: Config, sampler: GroupSampler, where: str) -> None:
    """Refuses parts of a rollout whose groups have samples on several ranks (ConfigError)."""
    if config.scoring.parts > 1 and not sampler.has_whole_groups:
        raise ConfigError(
            f"{where}: scoring.parts={config.scoring.parts} cuts the rollout between groups, but "
            f"groups of {config.data.group_size} span {sampler.world_size} ranks; use a number of "
            "groups per update that the ranks divide, or scoring.parts=1"
        )


def check_teacher(method: Method, config: Config, where: str, guidance_rows: int) -> None:
    """Refuses a method without its teacher: rewards, or pairs of a data set and no rewards.

    Args:
        method: the run's.
        config: the run's.
        where: the config file's name, for error messages.
        guidance_rows: network rows per state, 2 with classifier-free guidance.

    Raises:
        ConfigError: no reward with a weight, or one beside pairs; one clipped loss per reward where
            none differs from one for all; a named set of prompts for pairs; pairs and
            classifier-free guidance, which would be trained on what was not guided.
    """
    weighed = [reward.label for reward in config.rewards if reward.weight]
    if not method.takes_pairs:
        if not weighed:
            raise ConfigError(
                f"{where}: {method.name} has nothing to train on: rewards names no reward with a "
                "weight other than 0; name one"
            )
        _check_separate_losses(method, config, weighed, where)
        return
    if weighed:
        raise ConfigError(
            f"{where}: {method.name} learns from the pairs of data.train and from no reward; move "
            f"{' and '.join(weighed)} from rewards to eval.rewards, or set the weight to 0"
        )
    if config.data.train.startswith("shapes/"):
        raise ConfigError(
            f"{where}: data.train={config.data.train} holds prompts alone, but {method.name} "
            "learns from pairs of images; give a .jsonl file of pairs, such as "
            "flowrl.make.shapes_pairs writes"
        )
    if guidance_rows > 1:
        raise ConfigError(
            f"{where}: {method.name} trains the velocity without guidance, so "
            f"model.guidance_scale={config.model.guidance_scale:g} does not fit; set it to 1, and "
            "eval.guidance_scale to the scale of sampling"
        )


def _check_separate_losses(
    method: Method, config: Config, weighed: Sequence[str], where: str
) -> None:
    """Refuses (ConfigError) one clipped loss per reward where it trains what one for all does."""
    if method.negative_advantage is None:
        return
    here = f"{where}: method.args: reward_losses=separate clips the loss of every reward by itself"
    if len(weighed) == 1:
        raise ConfigError(
            f"{here}, but {weighed[0]} is the only reward with a weight other than 0; leave "
            "reward_losses out, or add a reward"
        )
    if config.optim.updates_per_rollout * config.optim.epochs == 1:
        raise ConfigError(
            f"{here}, but with one update per rollout all ratios are 1 and nothing is clipped; "
            "leave reward_losses out, or set optim.updates_per_rollout or optim.epochs to 2 or more"
        )


def check_compute(method: Method, config: Config, where: str, guidance_rows: int) -> None:
    """Refuses settings of `compute` that the method's objective cannot use.

    Args:
        method: the run's.
        config: the run's.
        where: the config file's name, for error messages.
        guidance_rows: network rows per state, 2 with classifier-free guidance.

    Raises:
        ConfigError: what is compared does not fit into a chunk, a ratio is asked for of a method
            that has none, or fp16 without a GPU, which accelerate would drop without a word.
    """
    needs, compute = method.objective.needs, config.compute
    if compute.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ConfigError(
            f"{where}: compute.mixed_precision=fp16 needs a GPU, and there is none here; use bf16, "
            "or auto"
        )
    rows = needs.together * guidance_rows
    if needs.together > 1 and rows > compute.micro_batch_size:
        guided = "" if rows == needs.together else ", guided"
        raise ConfigError(
            f"{where}: {method.name} compares {needs.together} samples{guided} in one forward and "
            f"backward, but compute.micro_batch_size={compute.micro_batch_size}; use {rows} or more"
        )
    if needs.ratio_clip is not None:
        return
    for key in ("recompute_old_log_prob", "ratio_tolerance"):
        if getattr(compute, key):
            raise ConfigError(
                f"{where}: compute.{key} is about the ratio of log-probs, and {method.name} has "
                "none; leave it out"
            )


def measured_rewards(
    config: Config, group_scope: Sequence[str], where: str
) -> tuple[RewardConfig, ...]:
    """The rewards of the held-out evaluation; the first one is its score.

    They are `eval.rewards`, or those of the run. Where a monitor guards the run, the run's rewards
    that `eval.rewards` leaves out are measured too, so that there is a proxy to set against the
    monitor; but not those that compare the samples of a group: the mean of a group's win rates is
    one half, however good they are.

    Args:
        config: the run's.
        group_scope: labels of the run's rewards that compare the samples of a group.
        where: the config file's name.

    Raises:
        ConfigError: there is none; `monitor` names a reward that is not measured, or nothing that
            is measured stands for what is trained on.
    """
    given, monitor = config.eval.rewards or config.rewards, config.monitor
    if not given:
        raise ConfigError(f"{where}: no reward measures the run; name one in eval.rewards")
    if monitor.reward is None:
        return given
    labels = {reward.label for reward in given}
    more = [r for r in config.rewards if r.label not in {*labels, *group_scope}]
    measured = (*given, *more)
    known = [reward.label for reward in measured if reward.label not in group_scope]
    for key, name in (("reward", monitor.reward), ("proxy", monitor.proxy)):
        if name is not None and name not in known:
            raise ConfigError(
                f"{where}: monitor.{key}={name} is not measured on the held-out prompts by itself; "
                f"{closest(name, known)}, or add it to eval.rewards"
            )
    trained = [reward.label for reward in config.rewards if reward.weight]
    if monitor.proxy is None and trained and not set(trained) & set(known):
        raise ConfigError(
            f"{where}: {' and '.join(trained)} compares the samples of a group, so its held-out "
            "mean shows no progress; add a reward that stands for it, such as its judge, to "
            "eval.rewards and name it in monitor.proxy"
        )
    return measured


def ratio_tolerance(config: Config, method: Method) -> float | None:
    """How far from 1 the first pass may be: a tenth of the clip range, within [2e-6, 1e-4].

    None where the method has no ratio.
    """
    clip = method.objective.needs.ratio_clip
    if clip is None or config.compute.ratio_tolerance is not None:
        return config.compute.ratio_tolerance
    return float(min(1e-4, max(2e-6, 0.1 * clip)))
