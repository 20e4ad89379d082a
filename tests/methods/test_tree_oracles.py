"""The methods that grow trees equal their naive oracles: states, advantages, loss and gradient.

Kills, among others: noise of siblings whose std is not 1; a softmax per split instead of one over
paths; a mean over leaves instead of distinct states in a depth; an edge that takes its parent's
advantage; an edge counted once per leaf; pruning that changes a rollout or an advantage; a window
of depths that moves the wrong way; a tail that stops above sigma 0 or forgets its history; weights
with another mean than 1; a sample compared with samples that branched at other steps.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.data.noise import sample_noise
from flowrl.functional.aggregate import aggregate
from flowrl.methods import METHODS, Method
from flowrl.train.lessons import per_decision
from flowrl.train.step import weighted
from flowrl.types import Chunk, PromptBatch
from tests.methods import oracles, tree_oracles
from tests.methods.test_oracles import (
    CLOSE,
    WEIGHTS,
    field,
    float64,
    framework_loss,
    gradient,
    naive_chains,
    scores,
    two_rewards,
)
from tests.methods.test_oracles import Case as ChainCase
from tests.policies.toy_flow import make_batch, make_policy, perturb

STEPS, SPLITS, LEAVES = 7, (0, 2), 4
SMALL: dict[str, Any] = {"num_steps": STEPS, "splits": SPLITS}
# Pruned depths begin at the last split, 2, and move later: at training step 1 they are 3 and 4.
DEPTH = {"depth_pruning": True, "depth_window": 2, "depth_interval": 1}
# name: (arguments, training step, stochastic steps, trained steps, kept leaves)
BRANCH: dict[str, tuple[dict[str, Any], int, range | list[int], list[int], str]] = {
    "uniform": ({}, 0, range(7), [0, 1, 2, 3, 4, 5], "all"),
    "path_prob": ({"fusion": "path_prob"}, 0, range(7), [0, 1, 2, 3, 4, 5], "all"),
    "flow_sde": ({"kernel": "flow_sde"}, 0, range(7), [0, 1, 2, 3, 4, 5], "all"),
    "extreme": (
        {"width_pruning": "extreme", "num_extremes": 1}, 0, range(7), [0, 1, 2, 3, 4, 5], "extreme",
    ),
    "parent_top1": (
        {"width_pruning": "parent_top1"}, 0, range(7), [0, 1, 2, 3, 4, 5], "parent_top1",
    ),
    "depth at 0": (DEPTH, 0, range(7), [0, 1, 4, 5], "all"),
    "depth at 1": (DEPTH, 1, range(7), [0, 1, 2, 5], "all"),
    "depth at the end": (DEPTH, 99, range(7), [0, 1, 2, 3], "all"),
    "depth until 3": (DEPTH | {"depth_stop": 3}, 99, range(7), [0, 1, 2, 5], "all"),
    "mix": (
        {"mix": True, "mix_window": 2, "mix_interval": 1}, 3, [0, 2, 3, 4], [0, 2, 3, 4], "all",
    ),
}  # fmt: skip


def kept_leaves(rule: str, total: list[float]) -> set[int]:
    kept: set[int] = set()
    for first in range(0, len(total), LEAVES):
        leaves = range(first, first + LEAVES)
        if rule == "all":
            kept |= set(leaves)
        elif rule == "extreme":
            kept |= {min(leaves, key=lambda n: total[n]), max(leaves, key=lambda n: total[n])}
        else:  # the children of the last split are pairs of leaves
            pairs = (leaves[:2], leaves[2:])
            kept |= {max(pair, key=lambda n: total[n]) for pair in pairs}
    return kept


def tree_loss(
    policy: Any, trajectory: Any, method: Method, rewards: list[list[float]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss as the trainer makes it, in one chunk, and its metrics where trained."""
    data, group_id = trajectory.decisions, trajectory.batch.group_id
    scored = scores(rewards)
    advantages = method.advantage(scored, group_id, trajectory.tree)
    valid = scored.valid
    if method.prune is not None:
        valid = valid & method.prune(advantages, group_id, trajectory.tree)
    mask = data.mask & per_decision(trajectory.tree.any_below(valid), data)
    new, reference = policy.evaluate(trajectory, torch.arange(len(data.row))), None
    if "reference" in method.objective.needs.sets:
        with torch.no_grad(), policy.weights.use("reference"):
            reference = policy.evaluate(trajectory, torch.arange(len(data.row)))
    weight = None
    if method.weighting is not None:
        weight = method.weighting(trajectory.plan, trajectory.sigmas)[data.step]
    loss = method.objective(new, None, reference, Chunk(data, per_decision(advantages, data)))
    metrics = {name: values[mask] for name, values in loss.metrics.items()}
    return aggregate(weighted(loss, weight).values, mask, float(mask.sum())), metrics


def draw(batch: PromptBatch, key: int, stream: int) -> Tensor:
    ids = torch.tensor([key])
    return sample_noise(batch.seed, ids, (2,), stream=stream, dtype=torch.float64)[0]


@pytest.mark.parametrize("case", BRANCH.values(), ids=BRANCH)
def test_branch_grpo_equals_its_oracle(case: Any) -> None:
    args, step, stochastic, trained, rule = case
    policy, method = make_policy(), METHODS["branch_grpo"](**SMALL, **args)
    batch, network = make_batch(groups=3, size=LEAVES), policy.weights.network
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(step))

    kernel = args.get("kernel", "dance_sde")
    sigmas = policy.pipeline.sigmas(STEPS).double().tolist()
    how = tree_oracles.Branching(kernel, 0.3, sigmas, SPLITS, stochastic, 2, 4.0)
    roots = []
    for g in range(3):
        x = draw(batch, int(batch.group_id[g * LEAVES]), 0)
        root = tree_oracles.Node(x, 0, range(g * LEAVES, (g + 1) * LEAVES))
        tree_oracles.grow(
            old, how, root,
            lambda i, leaf: draw(batch, leaf, 1 + i),
            lambda i, leaf: draw(batch, leaf, STEPS + 3 + i),
        )  # fmt: skip
        roots.append(root)
    nodes = [node for root in roots for node in root.below()]
    ends = torch.stack([node.x for node in nodes if node.depth == STEPS])
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(ends))
    assert rollout.network_evals == len(nodes) - len(ends)  # every state once

    rewards = two_rewards(len(batch))
    total = [a * WEIGHTS[0] + b * WEIGHTS[1] for a, b in zip(*rewards, strict=True)]
    for root in roots:
        tree_oracles.credit(root, total, 1.0 if args.get("fusion") == "path_prob" else 0.0)
    advantages = method.advantage(scores(rewards), batch.group_id, trajectory.tree)
    for node in nodes:
        for leaf in node.leaves if node.depth else ():
            assert advantages[leaf, node.depth - 1].item() == pytest.approx(
                node.advantage, abs=1e-9
            )

    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, rewards)
        expected = tree_oracles.branch_loss(
            field(policy, network, batch), how, roots, trained, kept_leaves(rule, total), 1e-3
        )
        torch.testing.assert_close(loss, expected, **CLOSE)
        expected_gradient = gradient(expected, network)
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient(loss, network), expected_gradient, **CLOSE)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert bound > 0 if moved else metrics["ratio_max_dev"].max() < 1e-12


@pytest.mark.parametrize("pruning", [{"width_pruning": "extreme"}, DEPTH])
def test_pruning_leaves_rollout_and_advantages_alone(pruning: dict[str, Any]) -> None:
    batch, rewards = make_batch(groups=3, size=LEAVES), scores(two_rewards(3 * LEAVES))
    plain, cut = (METHODS["branch_grpo"](**SMALL, **args) for args in ({}, pruning))
    whole, trajectory = make_policy().rollout(batch, plain.plan(0))
    pruned, other = make_policy().rollout(batch, cut.plan(0))
    assert torch.equal(whole.images, pruned.images)
    assert torch.equal(trajectory.tree.log_prob, other.tree.log_prob)
    advantages = plain.advantage(rewards, batch.group_id, trajectory.tree)
    assert torch.equal(advantages, cut.advantage(rewards, batch.group_id, other.tree))


def test_tempflow_grpo_equals_its_oracle() -> None:
    steps, seeds, branches = 5, 2, 3
    method = METHODS["tempflow_grpo"](
        num_steps=steps, num_seeds=seeds, num_branches=branches, kl_coef=0.3
    )
    size = seeds * branches * (steps - 1)
    policy, batch = make_policy(with_reference=True), make_batch(groups=2, size=size)
    network = policy.weights.network
    reference = field(policy, copy.deepcopy(network), batch)
    perturb(network, 0.02, seed=2)
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(0))
    assert len(trajectory.decisions.row) == len(batch)  # one decision per sample
    # Per trunk: T - 1 states that branch, and K * T (T - 1) / 2 after them.
    trunk = (steps - 1) + branches * steps * (steps - 1) // 2
    assert rollout.network_evals == 2 * seeds * trunk

    sigmas = policy.pipeline.sigmas(steps).double().tolist()
    own = [n % size % (size // seeds) // branches for n in range(len(batch))]
    chains = []
    for n, branch in enumerate(own):
        start = draw(batch, n - n % (size // seeds), 0)
        noise = [draw(batch, n, 1 + i) for i in range(steps)]
        chains += oracles.rollout(
            lambda x, s, _, n=n: old(x, s, n), "flow_sde", 0.7, sigmas, [branch], [start], [noise]
        )
    ends = torch.stack([chain[-1] for chain in chains])
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(ends))

    rewards = two_rewards(len(batch))
    columns = [(n // size) * steps + branch for n, branch in enumerate(own)]
    expected_advantages = oracles.summed_advantages(rewards, columns, WEIGHTS, "group")
    advantages = method.advantage(scores(rewards), batch.group_id, trajectory.tree)
    torch.testing.assert_close(advantages, float64(expected_advantages), **CLOSE)

    stds = [
        0.7 * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)) * (s - s_next))
        for s, s_next in pairwise(sigmas[:-1])
    ]
    weights = [std * len(stds) / sum(stds) for std in stds]
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, rewards)
        parts = [
            weights[own[n]]
            * oracles.flow_loss(
                field(policy, network, batch), old, reference,
                [chains[n] if m == n else [] for m in range(len(batch))],
                [[own[n]] if m == n else [] for m in range(len(batch))],
                expected_advantages, kernel="flow_sde", noise_level=0.7, sigmas=sigmas, clip=1e-4,
                kl_coef=0.3, kl="paper",
            )
            for n in range(len(batch))
        ]  # fmt: skip
        expected = torch.stack(parts).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            gradient(loss, network), gradient(expected, network), rtol=1e-6, atol=1e-9
        )
        assert moved or metrics["ratio_max_dev"].max() < 1e-12


@pytest.mark.parametrize("step", [0, 2, 99])
@pytest.mark.parametrize("count", ["paper", "code"])
def test_mix_grpo_flash_equals_its_oracle(step: int, count: str) -> None:
    args = {"num_steps": 12, "window": 2, "interval": 1}
    method = METHODS["mix_grpo_flash"](**args, tail_count=count)
    policy, batch = make_policy(), make_batch()
    network = policy.weights.network
    old = field(policy, copy.deepcopy(network), batch)
    plan = method.plan(step)
    rollout, trajectory = policy.rollout(batch, plan)
    chains = naive_chains(policy, ChainCase("mix_grpo", args, "flow_sde", step), batch, old)

    first, sigmas = plan.trained[-1] + 1, policy.pipeline.sigmas(12).double().tolist()
    remaining = 12 - first
    steps = math.ceil(remaining * 0.4) if count == "paper" else int((remaining + 1) * 0.4) - 1
    steps = max(steps, 1)
    points = [sigmas[first] * (1 - k / steps) for k in range(steps + 1)]  # the toy has no shift
    ends = []
    for n, chain in enumerate(chains):
        x, s = chain[first - 1], sigmas[first - 1]
        before = x - s * old(x, s, n)
        ends.append(tree_oracles.dpmpp_2m_walk(old, chain[first], points, n, before, s).detach())
    images = policy.pipeline.decode(torch.stack(ends))
    torch.testing.assert_close(rollout.images, images, rtol=1e-5, atol=1e-5)
    own = len(batch)
    assert rollout.network_evals == 3 * (first - 1) + own + own * steps  # window of 2

    rewards, groups = two_rewards(own), batch.group_id.tolist()
    expected_advantages = oracles.normalized_advantages(rewards, groups, WEIGHTS)
    advantages = method.advantage(scores(rewards), batch.group_id, trajectory.tree)
    perturb(network, 1e-3, seed=3)
    loss, _ = framework_loss(policy, trajectory, method, advantages)
    expected = oracles.flow_loss(
        field(policy, network, batch), old, old, chains, [list(plan.trained)] * own,
        expected_advantages, kernel="flow_sde", noise_level=0.7, sigmas=sigmas, clip=1e-4,
        kl_coef=0.0, kl="paper",
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        gradient(loss, network), gradient(expected, network), rtol=1e-6, atol=1e-9
    )
