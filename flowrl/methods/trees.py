"""Methods whose groups are trees that branch more than once, or at a step of each sample's own.

What a tree is, is said by its keys (`spec.StepPlan.keys`): a noise that several samples share is
named by the first of them. Reading order: `branch_grpo`, `Branching`, `branch_keys`;
`tempflow_grpo`, `own_step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flowrl.errors import ConfigError
from flowrl.functional.advantages import clip_advantages, group_normalized, weighted_sum
from flowrl.functional.selection import best_of_n
from flowrl.functional.trees import (
    depthwise_normalized,
    fused_rewards,
    keep_best_children,
)
from flowrl.functional.weights import noise_aware
from flowrl.methods.objectives import KLS, ClippedRatio, KLName
from flowrl.methods.spec import (
    KERNELS,
    Kernel,
    KernelName,
    Method,
    NoiseMix,
    Prune,
    StepPlan,
    require_positive,
    transition_scales,
)
from flowrl.methods.windows import SlidingWindow
from flowrl.types import PromptBatch, Scores, Tree

Fusion = Literal["uniform", "path_prob"]
WidthPruning = Literal["none", "parent_top1", "extreme"]

PATH_COEF: dict[Fusion, float] = {"uniform": 0.0, "path_prob": 1.0}


def branch_grpo(
    *,
    num_steps: int = 20,
    splits: tuple[int, ...] = (0, 3, 6, 9),
    factor: int = 2,
    noise_scale: float = 4.0,
    kernel: KernelName = "dance_sde",
    noise_level: float = 0.3,
    fusion: Fusion = "uniform",
    width_pruning: WidthPruning = "none",
    num_extremes: int = 4,
    depth_pruning: bool = False,
    depth_window: int = 4,
    depth_interval: int = 30,
    depth_stop: int | None = None,
    mix: bool = False,
    mix_window: int = 4,
    mix_interval: int = 25,
    clip_range: float = 1e-3,
    advantage_clip: float = 5.0,
) -> Method:
    """A group is the leaves of one tree; an edge has the fused reward of its child, by depth.

    Paper: BranchGRPO, arXiv:2509.06040, sections 3.1 to 3.4. Every step is stochastic; at `splits`
    each state has `factor` children, whose noise correlates by 1 / (1 + noise_scale^2). Pruning
    leaves edges out of the backward alone: `width_pruning` keeps paths to the best leaf of every
    last split or to the num_extremes best and worst, `depth_pruning` skips depth_window steps from
    the last split on, one step later every depth_interval updates until they begin at depth_stop.
    `mix` is the paper's hybrid: stochastic at the splits and in a sliding window only, all of it
    trained. Differs from the public code: the last step (sigma_next = 0) is never trained, which
    the code does; branch noise has unit variance; path fusion is one softmax over whole paths; a
    depth window moves later, as the paper says, and the mix window over training.

    Use when: you want more samples of a prompt for fewer evaluations, and advantages that differ
    along the way although the reward is given at the end.

    Raises:
        ValueError: numbers that make no tree, or leave nothing to train.
    """
    require_positive(noise_level=noise_level, clip_range=clip_range, advantage_clip=advantage_clip)
    leaves, pruned = _num_leaves(num_steps, splits, factor), None
    if depth_pruning:
        pruned = _depth_window(num_steps, splits, depth_window, depth_interval, depth_stop)
    window = SlidingWindow(num_steps - 1, mix_window, 1, mix_interval) if mix else None
    make_kernel = KERNELS[kernel](noise_level)
    plan = Branching(num_steps, make_kernel, splits, factor, noise_scale, leaves, window, pruned)
    return Method(
        name="branch_grpo",
        paper="BranchGRPO, arXiv:2509.06040",
        policy="flow",
        plan=plan,
        compares="group",
        advantage=partial(fused_advantages, path_coef=PATH_COEF[fusion], clip=advantage_clip),
        objective=ClippedRatio(clip_range, clip_range, KLS["paper"]),
        prune=_prune(width_pruning, num_extremes),
        numbers=_numbers(plan, f"{kernel}(noise_level={noise_level})", fusion, width_pruning),
    )


def tempflow_grpo(
    *,
    num_steps: int = 10,
    num_seeds: int = 4,
    num_branches: int = 6,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    kl: KLName = "paper",
    kl_coef: float = 0.004,
) -> Method:
    """One stochastic step per sample, on a deterministic trunk, so a reward has one cause.

    Paper: TempFlow-GRPO, arXiv:2508.04324, sections 4.1 and 4.2. From every state of the trunk but
    the last, num_branches samples branch off, and go on without noise. They are compared with the
    samples of their prompt that branched at the same step, num_seeds * num_branches of them. The
    loss of a step is weighted by its noise, with mean 1. kl_coef is GenEval's; 0.001 elsewhere.
    Differs: the mean of the weights is exact, in the code a constant.

    Use when: you want to know which step a reward is due to, and decoding and scoring many images
    per prompt is cheap beside the network.

    Raises:
        ValueError: numbers that make no tree.
    """
    require_positive(noise_level=noise_level, clip_range=clip_range, advantage_clip=advantage_clip)
    require_positive(num_seeds=num_seeds, num_branches=num_branches)
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps} leaves no step to branch at; use at least 2")
    steps = tuple(range(num_steps - 1))
    size = num_seeds * num_branches * len(steps)
    plan = StepPlan(
        num_steps=num_steps,
        kernel=KERNELS[kernel](noise_level),
        stochastic=steps,
        trained=steps,
        keys=partial(own_step, num_branches=num_branches),
        group_size=size,
    )
    return Method(
        name="tempflow_grpo",
        paper="TempFlow-GRPO, arXiv:2508.04324",
        policy="flow",
        plan=lambda step: plan,
        compares="group",
        advantage=partial(advantages_by_step, eps=1e-4, ddof=0, clip=advantage_clip),
        objective=ClippedRatio(clip_range, clip_range, KLS[kl], kl_coef),
        weighting=noise_aware_steps,
        numbers={
            "sampler steps": num_steps,
            "kernel": f"{kernel}(noise_level={noise_level})",
            "tree": f"{num_seeds} trunks, {num_branches} branches from each of steps 0 to "
            f"{num_steps - 2}: {size} samples per prompt",
            "trained steps": "the one at which a sample branches",
        },
    )


@dataclass(frozen=True)
class Branching:
    """The plans of `branch_grpo`: what is stochastic and what is trained at a training step.

    Attributes:
        num_steps: of the sampler.
        kernel: of the stochastic steps.
        splits: steps at which a state has `factor` children.
        factor: at least 2.
        noise_scale: of what siblings do not share of their noise, beside what they do.
        leaves: samples of a prompt.
        window: of steps that are stochastic beside the splits; None = all are.
        pruned: of depths, counted from the last split, that are not trained; None = no depth.
    """

    num_steps: int
    kernel: Kernel
    splits: tuple[int, ...]
    factor: int
    noise_scale: float
    leaves: int
    window: SlidingWindow | None = None
    pruned: SlidingWindow | None = None

    def __post_init__(self) -> None:
        require_positive(noise_scale=self.noise_scale)

    def __call__(self, step: int) -> StepPlan:
        """The plan of training step `step`."""
        splits, factor, window, pruned = self.splits, self.factor, self.window, self.pruned
        inside = {*range(self.num_steps)} if window is None else {*splits, *window.steps(step)}
        skipped = {splits[-1] + depth for depth in pruned.steps(step)} if pruned else set()
        return StepPlan(
            num_steps=self.num_steps,
            kernel=self.kernel,
            stochastic=tuple(sorted(inside)),
            trained=tuple(sorted(inside - skipped - {self.num_steps - 1})),
            keys=partial(branch_keys, splits=splits, factor=factor),
            mix=NoiseMix(partial(parent_keys, splits=splits, factor=factor), self.noise_scale),
            group_size=self.leaves,
        )


def branch_keys(
    batch: PromptBatch, plan: StepPlan, *, splits: tuple[int, ...], factor: int
) -> Tensor:
    """Keys [N, T+1] of a tree: a state is named by the sample_id of its first leaf.

    Raises:
        ConfigError: a group has more samples than the tree has leaves.
    """
    return _branch_table(batch, plan, splits, factor)[0]


def parent_keys(
    batch: PromptBatch, plan: StepPlan, *, splits: tuple[int, ...], factor: int
) -> Tensor:
    """Keys [N, T+1] of the noise that siblings share: the first leaf of their parent; else -1."""
    return _branch_table(batch, plan, splits, factor)[1]


def own_step(batch: PromptBatch, plan: StepPlan, *, num_branches: int) -> Tensor:
    """Keys [N, T+1]: samples of a seed share its start, and each draws noise in one step only."""
    per_seed = num_branches * len(plan.stochastic)
    require_members(batch, plan.group_size)
    keys = torch.full((len(batch), plan.num_steps + 1), -1)
    keys[:, 0] = batch.sample_id - batch.member % per_seed
    step = torch.tensor(plan.stochastic)[batch.member % per_seed // num_branches]
    keys[torch.arange(len(batch)), 1 + step] = batch.sample_id
    return keys


def fused_advantages(
    scores: Scores, group_id: Tensor, tree: Tree | None, *, path_coef: float, clip: float
) -> Tensor:
    """Advantage [N, T] of every edge: the fused reward of its child, normalised in its depth.

    Raises:
        ValueError: no tree.
    """
    if tree is None:
        raise ValueError("rewards can be fused in a flow's tree only")
    total = weighted_sum(scores.trained, scores.weights)
    node = tree.node
    fused = fused_rewards(total, node, tree.log_prob, scores.valid, path_coef=path_coef)
    return clip_advantages(depthwise_normalized(fused, node, group_id), clip)


def advantages_by_step(
    scores: Scores, group_id: Tensor, tree: Tree | None, *, eps: float, ddof: int, clip: float
) -> Tensor:
    """Advantage [N]: normalised over the samples of a group that drew noise in the same step.

    Raises:
        ValueError: no tree.
    """
    if tree is None:
        raise ValueError("samples without a tree have no step of their own")
    step = (tree.keys[:, 1:] >= 0).int().argmax(1)
    column = torch.unique(torch.stack([group_id, step], 1), dim=0, return_inverse=True)[1]
    total = weighted_sum(scores.trained, scores.weights)
    return clip_advantages(group_normalized(total, column, scores.valid, eps=eps, ddof=ddof), clip)


def best_children(advantages: Tensor, group_id: Tensor, tree: Tree) -> Tensor:
    """Bool [N]: the best leaf below every last split, by the advantage of its last step."""
    return keep_best_children(advantages[:, -1], tree.node)


def extremes(advantages: Tensor, group_id: Tensor, tree: Tree, *, num: int) -> Tensor:
    """Bool [N]: the `num` best and worst leaves of a group, by the advantage of the last step."""
    return best_of_n(advantages[:, -1], group_id, top=num, bottom=num)


def noise_aware_steps(plan: StepPlan, sigmas: Tensor) -> Tensor:
    """Weights [T] proportional to the noise of the plan's kernel, with mean 1 where trained."""
    return noise_aware(transition_scales(plan, sigmas)[1], plan.trained)


def _branch_table(
    batch: PromptBatch, plan: StepPlan, splits: tuple[int, ...], factor: int
) -> tuple[Tensor, Tensor]:
    """(own keys, shared keys), [N, T+1] each."""
    stride: int = factor ** len(splits)
    require_members(batch, stride)
    own = torch.full((len(batch), plan.num_steps + 1), -1)
    shared = own.clone()
    own[:, 0] = batch.group_id
    for step in plan.stochastic:
        if step in splits:
            shared[:, 1 + step] = batch.sample_id - batch.member % stride
            stride //= factor
        own[:, 1 + step] = batch.sample_id - batch.member % stride
    return own, shared


def require_members(batch: PromptBatch, size: int | None) -> None:
    """Refuses (ConfigError) a group with more samples than its tree has leaves; None = any."""
    if size is not None and len(batch) and int(batch.member.max()) >= size:
        raise ConfigError(
            f"the tree of a prompt has {size} leaves, but a group has sample "
            f"{int(batch.member.max())}; set data.group_size={size}"
        )


def _prune(how: WidthPruning, num_extremes: int) -> Prune | None:
    """Which leaves are kept; None = all."""
    require_positive(num_extremes=num_extremes)
    rules: dict[WidthPruning, Prune | None] = {
        "none": None,
        "parent_top1": best_children,
        "extreme": partial(extremes, num=num_extremes),
    }
    return rules[how]


def _numbers(
    plan: Branching, kernel: str, fusion: Fusion, width_pruning: WidthPruning
) -> dict[str, object]:
    """What `branch_grpo` says of itself."""
    window, pruned, scale = plan.window, plan.pruned, plan.noise_scale
    return {
        "sampler steps": plan.num_steps,
        "kernel": kernel,
        "tree": f"{plan.factor} children at steps {plan.splits}: {plan.leaves} samples per prompt",
        "noise of siblings": f"(shared + {scale} own) / sqrt(1 + {scale}^2)",
        "stochastic steps": f"splits and a window of {window.width}: {window.words}"
        if window
        else "all",
        "trained steps": f"stochastic ones in 0 to {plan.num_steps - 2}",
        "reward fusion": fusion,
        "width pruning": width_pruning,
        "depth pruning": f"{pruned.width} steps from {plan.splits[-1]} on; {pruned.words}"
        f"; begins at {plan.splits[-1] + pruned.last_start} at the end"
        if pruned
        else "none",
    }


def _num_leaves(num_steps: int, splits: tuple[int, ...], factor: int) -> int:
    last = num_steps - 2
    if not splits or list(splits) != sorted(set(splits)) or splits[0] < 0 or splits[-1] > last:
        raise ValueError(
            f"splits={splits} must be ascending steps in [0, {last}] (the last step is never "
            "trained), one at least"
        )
    if factor < 2:
        raise ValueError(f"factor={factor} does not branch; use at least 2")
    return int(factor ** len(splits))


def _depth_window(
    num_steps: int, splits: tuple[int, ...], width: int, interval: int, stop: int | None
) -> SlidingWindow:
    """The pruned depths, counted from the last split."""
    latest = num_steps - 1 - width
    stop = latest if stop is None else stop
    if len(splits) < 2 or not splits[-1] <= stop <= latest:
        raise ValueError(
            f"depth pruning skips {width} steps from the last of two splits or more (splits="
            f"{splits}) until depth_stop={stop}; use {splits[-1]} to {latest}"
        )
    return SlidingWindow(stop + width - splits[-1], width, 1, interval)
