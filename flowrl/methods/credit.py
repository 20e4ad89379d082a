"""Methods that say which step earned the reward.

A reward of the finished image praises all steps of its trajectory alike. Here only one step drew
noise (`flash_grpo`, `g2rpo`), or every step has the reward that it gained itself (`dense_grpo`), or
no step draws any, and samples differ by their start alone (`neighbor_grpo`).
Completions of a trajectory are samples of their own: leaves that share its states (`spec.StepPlan`
on keys), so what a reward sees, and what it costs, is the same as everywhere.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flowrl.functional.advantages import clip_advantages, dense_gains, weighted_sum
from flowrl.functional.neighbors import quasi_norm_weighted
from flowrl.functional.weights import inverse_sensitivity
from flowrl.methods.flow import flow_grpo
from flowrl.methods.forward_plan import SOLVERS, NeighborPlan, SolverName
from flowrl.methods.objectives import (
    KLS,
    AdvantageStd,
    ClippedRatio,
    KLName,
    normalized_rewards,
)
from flowrl.methods.spec import (
    KERNELS,
    KernelName,
    Method,
    StepPlan,
    require_positive,
    transition_scales,
)
from flowrl.methods.tails import Granularities
from flowrl.methods.trees import require_members
from flowrl.types import PromptBatch, Scores, Tree


def flash_grpo(
    *,
    num_steps: int = 20,
    window_end: int | None = None,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-3,
    advantage_std: AdvantageStd = "global",
    advantage_clip: float = 5.0,
    kl: KLName = "paper",
    kl_coef: float = 0.0,
) -> Method:
    """One stochastic step per prompt, the same for all its samples, weighted by 1 / lambda.

    Paper: Flash-GRPO, arXiv:2605.15980: iso-temporal grouping and temporal gradient rectification,
    with the numbers of its code for Wan2.1. The step is drawn from those before window_end, None =
    the first half. Differs: the kernel (there Wan's, whose noise is linear in sigma); the weights
    have mean 1 over these steps, in the code over those that a batch happened to draw; lambda is
    that of the schedule in use, where the code has a table for one. Unverified: the paper's text.

    Use when: training costs more than sampling, as in video: one step per image is trained, and all
    steps of the first half get their turn in one batch.

    Raises:
        ValueError: numbers that leave no step to draw from.
    """
    base = flow_grpo(
        num_steps=num_steps,
        kernel=kernel,
        noise_level=noise_level,
        clip_range=clip_range,
        advantage_std=advantage_std,
        advantage_clip=advantage_clip,
        kl=kl,
        kl_coef=kl_coef,
    )
    steps = _steps_before(window_end, num_steps // 2, num_steps - 1)
    plan = replace(base.plan(0), stochastic=steps, trained=steps, keys=step_of_group)
    return replace(
        base,
        name="flash_grpo",
        paper="Flash-GRPO, arXiv:2605.15980",
        plan=lambda step: plan,
        weighting=rectified_steps,
        numbers=base.numbers
        | {
            "stochastic steps": f"one per prompt, random before step {len(steps)}",
            "trained steps": "that one",
        },
    )


def g2rpo(
    *,
    num_steps: int = 16,
    window_end: int | None = None,
    granularities: tuple[int, ...] = (1, 2),
    num_branches: int = 12,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
) -> Method:
    """One stochastic step on the group's trunk; each of its results is finished more than once.

    Paper: Granular-GRPO, arXiv:2510.01982, with the numbers of its code for FLUX: singular
    stochastic sampling at the steps before window_end (None = the first half) and multi-granularity
    advantage integration: of every granularity, each reward is normalised in the group (eps=1e-8,
    ddof=1), and the sum over rewards and granularities is the advantage, clamped. A group has
    num_branches samples per granularity. Differs: a training step takes one step of the sampler,
    the next one in turn, on new prompts; the code rolls out all of them at once and then makes an
    update per step, all but the first off-policy. Unverified: the paper's text.

    Use when: a reward judges details that depend on how finely an image was sampled, and decoding
    and scoring each perturbed state several times is cheap beside the network.

    Raises:
        ValueError: numbers that leave no step to perturb, or none to finish in.
    """
    require_positive(noise_level=noise_level, advantage_clip=advantage_clip)
    require_positive(num_branches=num_branches)
    tail, num_ends = Granularities(granularities), len(granularities)
    size = num_branches * num_ends
    steps = _steps_before(window_end, num_steps // 2, num_steps - 1)
    make_kernel, keys = KERNELS[kernel](noise_level), partial(perturbed, num_ends=num_ends)
    plans = [
        StepPlan(num_steps, make_kernel, (k,), (k,), keys=keys, tail=tail, group_size=size)
        for k in steps
    ]
    return Method(
        name="g2rpo",
        paper="Granular-GRPO, arXiv:2510.01982",
        policy="flow",
        plan=lambda step: plans[step % len(plans)],
        compares="group",
        advantage=partial(
            granular_advantages, num_ends=num_ends, eps=1e-8, ddof=1, clip=advantage_clip
        ),
        objective=ClippedRatio(clip_range, clip_range, KLS["paper"]),
        numbers={
            "sampler steps": num_steps,
            "kernel": f"{kernel}(noise_level={noise_level})",
            "stochastic steps": f"one, in turn before step {len(steps)}",
            "trained steps": "that one",
            "tree": f"a trunk, {num_branches} branches, each finished with strides "
            f"{granularities}: {size} samples per prompt",
        },
    )


def dense_grpo(
    *,
    num_steps: int = 10,
    num_trajectories: int = 24,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    kl: KLName = "paper",
    kl_coef: float = 0.0,
) -> Method:
    """A step's reward is what it gained: that of its state, completed by the ODE, less the last.

    Paper: DenseGRPO, arXiv:2601.20218, section 4.1, eq. 7 to 10 with n = t, on Flow-GRPO's setting.
    A trajectory is num_steps samples: its completions from every state before a step. Gains are
    normalised in the group step by step. Differs: the noise is not calibrated by step (section
    4.2), which is the row "a = 0.7" of its ablation; the last step is neither stochastic nor
    trained; kl_coef as in `flow_grpo` (published: 0.04, PickScore 0.01). Unverified: eps of the std
    (here 1e-4, ddof 0, as in `flow_grpo`). The mean reward that is logged is over completions.

    Use when: images go wrong at particular steps, and num_steps completions of every trajectory are
    affordable.

    Raises:
        ValueError: numbers that leave nothing to train.
    """
    require_positive(num_trajectories=num_trajectories)
    base = flow_grpo(
        num_steps=num_steps,
        kernel=kernel,
        noise_level=noise_level,
        clip_range=clip_range,
        advantage_clip=advantage_clip,
        kl=kl,
        kl_coef=kl_coef,
    )
    steps, size = tuple(range(num_steps - 1)), num_trajectories * num_steps
    plan = replace(base.plan(0), stochastic=steps, trained=steps, keys=completions, group_size=size)
    return replace(
        base,
        name="dense_grpo",
        paper="DenseGRPO, arXiv:2601.20218",
        plan=lambda step: plan,
        compares="group",
        advantage=partial(gain_advantages, eps=1e-4, ddof=0, clip=advantage_clip),
        numbers=base.numbers
        | {
            "stochastic steps": "all but the last",
            "tree": f"{num_trajectories} trajectories, each completed from {num_steps} states: "
            f"{size} samples per prompt",
        },
    )


def neighbor_grpo(
    *,
    num_steps: int = 8,
    solver: SolverName = "dpmpp_2m",
    group_size: int = 12,
    num_anchors: int = 4,
    num_trained: int = 4,
    step_seed: int = 0,
    spread: float = 0.3,
    temperature: float = 1.0,
    power: float = 0.8,
    clip_range: float = 1e-4,
) -> Method:
    """Neighbouring starts, an ODE, and a ratio of how near an anchor comes to every candidate.

    Paper: Neighbor GRPO, arXiv:2511.16955, eq. 7 to 9 and 11: a softmax over the squared distances
    between the anchor's one-step prediction and the next states of its group, and advantages over
    their quasi-norm. num_trained of the steps are trained, drawn in every training step. Differs:
    the distance is a mean over dims, as every log_prob here; the loss is a mean over candidates,
    there a sum. Unverified: the paper was not read, but an abridgement of it: which steps it
    trains, its clip_range, its scale of the distance and how it sums several rewards (here each
    is normalised in its group, eps=1e-8, ddof=1).

    Use when: the sampler must stay deterministic, as one of high order or of few steps.

    Raises:
        ValueError: numbers that leave nothing to train or to compare.
    """
    require_positive(clip_range=clip_range)
    if not 1 <= num_trained <= num_steps:
        raise ValueError(f"num_trained={num_trained} must be 1 to num_steps={num_steps}")
    if not 0 < power <= 1:
        raise ValueError(f"power={power} of the quasi-norm must be in (0, 1]")

    def plan(step: int) -> NeighborPlan:
        steps = random.Random(f"{step_seed}:{step}").sample(range(num_steps), num_trained)
        trained = tuple(sorted(steps))
        return NeighborPlan(
            num_steps, SOLVERS[solver], group_size, num_anchors, trained, spread, temperature
        )

    plan(0)
    return Method(
        name="neighbor_grpo",
        paper="Neighbor GRPO, arXiv:2511.16955",
        policy="neighbor",
        plan=plan,
        compares="group",
        advantage=partial(quasi_normed, eps=1e-8, ddof=1, power=power),
        objective=ClippedRatio(clip_range, clip_range, KLS["paper"]),
        numbers={
            "sampler steps": num_steps,
            "solver": SOLVERS[solver],
            "starting noise of a group": f"neighbours of spread {spread}",
            "trained steps": f"{num_trained} of them, random in every training step, seed "
            f"{step_seed}",
            "trained samples": f"{num_anchors} anchors of {group_size}, with all as candidates",
            "distance": f"mean over dims / {temperature}",
        },
    )


def step_of_group(batch: PromptBatch, plan: StepPlan) -> Tensor:
    """Keys [N, T+1]: own starts; one of the plan's stochastic steps, drawn per group."""
    ids = batch.group_id.tolist()
    # A function of seed and group alone, so that a group on several ranks has one step.
    drawn = {g: random.Random(f"{batch.seed}:{g}").choice(plan.stochastic) for g in set(ids)}
    keys = torch.full((len(batch), plan.num_steps + 1), -1)
    keys[:, 0] = batch.sample_id
    keys[torch.arange(len(batch)), torch.tensor([1 + drawn[g] for g in ids])] = batch.sample_id
    return keys


def perturbed(batch: PromptBatch, plan: StepPlan, *, num_ends: int) -> Tensor:
    """Keys [N, T+1]: one start per group; num_ends samples in a row share their noise.

    Raises:
        ConfigError: a group has more samples than the plan's size.
    """
    require_members(batch, plan.group_size)
    keys = torch.full((len(batch), plan.num_steps + 1), -1)
    keys[:, 0] = batch.group_id
    for step in plan.stochastic:
        keys[:, 1 + step] = batch.sample_id - batch.member % num_ends
    return keys


def completions(batch: PromptBatch, plan: StepPlan) -> Tensor:
    """Keys [N, T+1]: of T samples in a row, the j-th draws their common noise before step j only.

    Raises:
        ConfigError: a group has more samples than the plan's size.
    """
    require_members(batch, plan.group_size)
    leaf = batch.member % plan.num_steps
    first = (batch.sample_id - leaf)[:, None]
    is_noisy = torch.arange(plan.num_steps) < leaf[:, None]
    return torch.cat([first, torch.where(is_noisy, first, -1)], dim=1)


def granular_advantages(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None,
    *,
    num_ends: int,
    eps: float,
    ddof: int,
    clip: float,
) -> Tensor:
    """Advantage [N] of a perturbed state: the sum over its ends, each normalised among its kind.

    An end whose reward failed adds nothing.

    Raises:
        ValueError: no tree, or ends of one state that are not together.
    """
    state = _require_tree(tree).node[:, -1]
    column = group_id * num_ends + torch.arange(len(group_id)) % num_ends
    each = normalized_rewards(scores, column, eps=eps, ddof=ddof, clip=math.inf)
    total = _together(each, state, num_ends).sum(1)
    return clip_advantages(total, clip).repeat_interleave(num_ends)


def gain_advantages(
    scores: Scores, group_id: Tensor, tree: Tree | None, *, eps: float, ddof: int, clip: float
) -> Tensor:
    """Advantage [N, T]: what a stochastic step gained, normalised in the group; 0 without noise.

    A gain of which one of the two rewards failed is 0, and not in the group's statistics.

    Raises:
        ValueError: no tree, or completions of one trajectory that are not together.
    """
    total = weighted_sum(scores.trained, scores.weights)
    keys, num = _require_tree(tree).keys, _require_tree(tree).log_prob.shape[1]
    rewards, valid, groups = (
        _together(values, keys[:, 0], num) for values in (total, scores.valid, group_id)
    )
    gains = [
        dense_gains(
            rewards[:, i : i + 2], groups[:, 0], valid[:, i : i + 2].all(1), eps=eps, ddof=ddof
        )
        for i in range(num - 1)
    ]
    trunk = torch.cat([*gains, torch.zeros_like(rewards[:, :1])], dim=1).repeat_interleave(num, 0)
    return clip_advantages(torch.where(keys[:, 1:] >= 0, trunk, 0.0), clip)


def quasi_normed(
    scores: Scores,
    group_id: Tensor,
    tree: Tree | None = None,
    *,
    eps: float,
    ddof: int,
    power: float,
) -> Tensor:
    """Advantage [N]: `normalized_rewards` over the quasi-norm of their group; no tree is read."""
    total = normalized_rewards(scores, group_id, eps=eps, ddof=ddof, clip=math.inf)
    return quasi_norm_weighted(total, group_id, power=power)


def rectified_steps(plan: StepPlan, sigmas: Tensor) -> Tensor:
    """Weights [T] proportional to 1 / lambda of the plan's kernel, with mean 1 where trained."""
    slope, std = transition_scales(plan, sigmas)
    return inverse_sensitivity(slope, std, plan.trained)


def _steps_before(given: int | None, default: int, most: int) -> tuple[int, ...]:
    """The steps that may be stochastic."""
    end = default if given is None else given
    if not 1 <= end <= most:
        raise ValueError(
            f"window_end={end} must be 1 to {most}: the last step is never trained; with more "
            "num_steps there are more"
        )
    return tuple(range(end))


def _require_tree(tree: Tree | None) -> Tree:
    if tree is None:
        raise ValueError("there is no tree, so no completions of a state; use a flow policy")
    return tree


def _together(values: Tensor, state: Tensor, num: int) -> Tensor:
    """Values [N] as [N / num, num], a row per state (int64 [N]), in the order of its samples."""
    if len(state) % num or (state.reshape(-1, num) != state.reshape(-1, num)[:, :1]).any():
        raise ValueError(
            f"the {num} samples of a state must stand together, whole and in the order of "
            "batch.member, as they come from ranks that hold whole groups"
        )
    return values.reshape(-1, num)
