"""Methods that guard against over-optimisation, each on the rollout of an older one.

`grpo_guard` and `flow_dppo` change the objective: when a decision has moved far enough. `pref_grpo`
and `flow_gdpo` are about the advantage: differences that are noise, and rewards of unequal scale.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from torch import Tensor

from flowrl.functional.weights import inverse_dt
from flowrl.methods.flow import dance_grpo, flow_grpo, flow_grpo_fast
from flowrl.methods.objectives import (
    KLS,
    AdvantageStd,
    ClippedRatio,
    DivergenceBound,
    KLName,
    decoupled_rewards,
    normalized_log_ratio,
)
from flowrl.methods.several import RewardLosses
from flowrl.methods.spec import KernelName, Method, StepPlan

REVERSE_SDES: tuple[KernelName, ...] = ("flow_sde", "dance_sde")


def grpo_guard(
    *,
    num_steps: int = 10,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 2e-6,
    advantage_std: AdvantageStd = "group",
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    shared_noise: bool = False,
) -> Method:
    """Flow-GRPO with a log-ratio that is centred and equally wide at every step, and 1/dt weights.

    Paper: GRPO-Guard, arXiv:2510.22319: RatioNorm and the reweighting of gradients by -1/dt, on
    Flow-GRPO's rollout without KL. clip_range is that of GenEval and OCR; 4e-6 for PickScore. Its
    log-ratio is std times the plain one, so clip ranges of other methods do not fit. Differs:
    RatioNorm per sample, as in the paper; Flow-GRPO's code takes one bias for the whole batch.

    Use when: the trained reward rises while the images get worse, and the clip hardly ever acts on
    samples with a positive advantage.

    Raises:
        ValueError: a kernel that is not a reverse SDE, besides wrong numbers.
    """
    if kernel not in REVERSE_SDES:
        raise ValueError(
            f"kernel={kernel} does not fit: RatioNorm and 1/dt belong to a step of the reverse SDE "
            "and its density, which cps has not as published; "
            f"use {' or '.join(REVERSE_SDES)}"
        )
    base = flow_grpo(
        num_steps=num_steps,
        kernel=kernel,
        noise_level=noise_level,
        advantage_std=advantage_std,
        advantage_clip=advantage_clip,
        reward_losses=reward_losses,
        shared_noise=shared_noise,
    )
    return replace(
        base,
        name="grpo_guard",
        paper="GRPO-Guard, arXiv:2510.22319",
        plan=lambda step: replace(base.plan(step), store_mean=True),
        objective=ClippedRatio(
            clip_range, clip_range, KLS["paper"], log_ratio=normalized_log_ratio
        ),
        weighting=inverse_dt_steps,
    )


def flow_dppo(
    *,
    num_steps: int = 10,
    window: int = 2,
    window_end: int | None = None,
    window_seed: int = 0,
    kernel: KernelName = "flow_sde",
    noise_level: float = 1.2,
    threshold: float = 1e-5,
    advantage_std: AdvantageStd = "global",
    shared_noise: bool = False,
) -> Method:
    """No clip: a decision is stopped where its exact KL from the behaviour policy passes a bound.

    Paper: Flow-DPPO, arXiv:2606.11025, as implemented in verl-omni, whose recipe for Qwen-Image
    the defaults are: a window of two steps at a random place in the first five, no clip of the
    advantages, no KL to the reference. Unverified: the paper itself, its numbers included, was not
    read. Differs: the std of the rewards is that of all of them (ddof 0), in the code ddof 1.

    Use when: several updates are made per rollout, and a bound on how far each decision moves is
    wanted in place of a clip range.
    """
    base = flow_grpo_fast(
        num_steps=num_steps,
        window=window,
        window_end=window_end,
        window_seed=window_seed,
        kernel=kernel,
        noise_level=noise_level,
        advantage_std=advantage_std,
        advantage_clip=math.inf,
        shared_noise=shared_noise,
    )
    return replace(
        base,
        name="flow_dppo",
        paper="Flow-DPPO, arXiv:2606.11025",
        plan=lambda step: replace(base.plan(step), store_mean=True),
        objective=DivergenceBound(threshold),
    )


def pref_grpo(
    *,
    num_steps: int = 25,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    trained_fraction: float = 0.6,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    shared_noise: bool = True,
) -> Method:
    """For rewards that are win rates in the group: DanceGRPO with Flow-GRPO's kernel.

    Paper: Pref-GRPO, arXiv:2508.20751, section 3. What is new is the reward, `win_rate` in the
    config's rewards; the method normalises it in its group (eps=1e-8, ddof=1) like any other, and
    with several rewards each by itself. The numbers are those of its first FLUX script; a later one
    has 15 steps. Unverified: the tables of the paper. Differs: see `dance_grpo`; here the random
    share of the steps is drawn from all but the last.

    Use when: the scores of a prompt's images differ by less than their own error, and a judge of
    pairs is at hand.
    """
    base = dance_grpo(
        num_steps=num_steps,
        kernel=kernel,
        noise_level=noise_level,
        trained_fraction=trained_fraction,
        clip_range=clip_range,
        advantage_clip=advantage_clip,
        reward_losses=reward_losses,
        shared_noise=shared_noise,
    )
    return replace(base, name="pref_grpo", paper="Pref-GRPO, arXiv:2508.20751")


def flow_gdpo(
    *,
    num_steps: int = 10,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    kl: KLName = "paper",
    kl_coef: float = 0.0,
    shared_noise: bool = False,
) -> Method:
    """Flow-GRPO for several rewards: each normalised in its group, their sum in the whole rollout.

    Paper: GDPO, arXiv:2601.05242, for tokens; on flows as in Flow-Factory and in Pref-GRPO's code,
    whose other numbers are not taken over. With one reward it is `flow_grpo(advantage_std="group")`
    up to one factor, near 1. Unverified: the paper's eps (here 1e-4, ddof 0, as in `flow_grpo`).

    Use when: several rewards of unequal scale are trained at once, and none may drown the others.
    """
    base = flow_grpo(
        num_steps=num_steps,
        kernel=kernel,
        noise_level=noise_level,
        clip_range=clip_range,
        advantage_clip=advantage_clip,
        kl=kl,
        kl_coef=kl_coef,
        shared_noise=shared_noise,
    )
    return replace(
        base,
        name="flow_gdpo",
        paper="GDPO, arXiv:2601.05242",
        advantage=partial(decoupled_rewards, eps=1e-4, ddof=0, clip=advantage_clip),
        compares="rollout",
    )


def inverse_dt_steps(plan: StepPlan, sigmas: Tensor) -> Tensor:
    """Weights -1/dt [T]."""
    return inverse_dt(sigmas)
