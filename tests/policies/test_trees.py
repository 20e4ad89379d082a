"""The tree that a plan's keys make, on the 2-D toy: counts, noise, mixed levels, the tail.

Kills, among others: states merged although their parents differ; a state evaluated per leaf; a
sibling's noise that depends on who else is in the batch; a trunk that is walked once per branch;
a tail that counts its steps wrongly or ends above sigma 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flowrl.commands.check import network_evals
from flowrl.errors import ConfigError, ShapeError
from flowrl.functional.ratios import importance_ratio
from flowrl.methods.credit import dense_grpo, flash_grpo, g2rpo
from flowrl.methods.flow import flow_grpo, mix_grpo_flash
from flowrl.methods.spec import StepPlan, own_noise
from flowrl.methods.tails import Tail
from flowrl.methods.trees import branch_grpo, tempflow_grpo
from flowrl.types import Tree
from tests.policies.toy_flow import counted, make_batch, make_policy

PLANS: dict[str, tuple[Callable[[], StepPlan], int]] = {
    "branch": (lambda: branch_grpo(num_steps=6, splits=(0, 2)).plan(0), 4),
    "branch, mix": (
        lambda: branch_grpo(num_steps=6, splits=(1, 3), mix=True, mix_window=2).plan(0), 4,
    ),
    "tempflow": (lambda: tempflow_grpo(num_steps=4, num_seeds=2, num_branches=2).plan(0), 12),
    "flash": (lambda: mix_grpo_flash(num_steps=10, window=3, interval=1).plan(2), 4),
    "a step per prompt": (lambda: flash_grpo(num_steps=6).plan(0), 4),
    "granular": (lambda: g2rpo(num_steps=8, num_branches=2).plan(1), 4),
    "completions": (lambda: dense_grpo(num_steps=4, num_trajectories=2).plan(0), 8),
}  # fmt: skip
ALL_PLANS = pytest.mark.parametrize(("plan", "size"), PLANS.values(), ids=PLANS)


def test_the_papers_tree_has_its_counts() -> None:
    # T = 20, splits (0, 3, 6, 9): 16 leaves, 219 states, 218 edges, 203 evaluations; the last
    # step's 16 are not trained.
    plan, policy = branch_grpo().plan(0), make_policy()
    with counted(policy.weights.network) as count:
        rollout, trajectory = policy.rollout(make_batch(groups=1, size=16), plan)
    sizes = [len(level.parent) for level in trajectory.levels]
    assert sum(sizes) == 219 and sizes[-1] == 16
    assert count.rows == rollout.network_evals == 203
    assert trajectory.num_rows == 203 - 16 and len(trajectory.decisions.row) == 218 - 16
    with counted(policy.training_network) as count:
        policy.evaluate(trajectory, torch.arange(202))
    assert (count.rows, count.calls) == (187, 1)
    assert network_evals(plan, 3, 16) == (3 * 203, 3 * 187)


def test_tempflow_has_its_counts() -> None:
    # Per seed, T = 10 and K = 6: 9 + 6 * 45 = 279 evaluations for 54 images.
    plan, policy = tempflow_grpo().plan(0), make_policy(rollout_batch_size=512)
    rollout, trajectory = policy.rollout(make_batch(groups=1, size=216), plan)
    assert rollout.network_evals == 4 * 279 and len(rollout.images) == 4 * 54
    assert trajectory.num_rows == 4 * 9 and len(trajectory.decisions.row) == 216


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize(("count", "ratio"), [("paper", 0.4), ("paper", 0.2), ("code", 0.4)])
def test_flash_evaluates_as_often_as_its_closed_form(step: int, count: str, ratio: float) -> None:
    plan = mix_grpo_flash(
        num_steps=10, window=3, interval=1, tail_ratio=ratio, tail_count=count, shared_noise=False
    ).plan(step)
    policy, left = make_policy(), 10 - 3 - step
    rest = (
        -(-left * int(ratio * 10) // 10) if count == "paper" else max((left + 1) * 4 // 10 - 1, 1)
    )
    with counted(policy.weights.network) as counts:
        rollout, _ = policy.rollout(make_batch(groups=1), plan)
    assert counts.rows == rollout.network_evals == 4 * (step + 3 + rest)


@ALL_PLANS
def test_ratio_is_one_and_counts_are_those_of_the_keys(plan, size: int) -> None:
    for storage in (torch.float32, torch.bfloat16):
        policy = make_policy(dtype=torch.float32, storage_dtype=storage)
        rollout, trajectory = policy.rollout(make_batch(size=size), plan())
        data = trajectory.decisions
        new = policy.evaluate(trajectory, torch.arange(len(data.row))).log_prob.detach()
        ratio = importance_ratio(new, data.old_log_prob, data.mask)
        assert (ratio - 1).abs().max() < 1e-5 and data.mask.all()
        expected = network_evals(plan(), 3, size)
        assert (rollout.network_evals, trajectory.num_rows) == expected
        assert (data.row.diff() >= 0).all()
        # The tree's log-probs are the decisions', for every sample below an edge.
        mine = trajectory.tree.log_prob[data.sample, data.step]
        torch.testing.assert_close(mine, data.old_log_prob, rtol=0, atol=0)


@ALL_PLANS
def test_a_sample_does_not_depend_on_its_company_or_rank(plan, size: int) -> None:
    batch = make_batch(size=size)
    whole, trajectory = make_policy().rollout(batch, plan())
    for chosen in ([size + 1], [0, 3, size, 3 * size - 1], [size + 1, 0, 2]):
        index = torch.tensor(chosen)
        part, mine = make_policy().rollout(batch.select(index), plan())
        torch.testing.assert_close(part.images, whole.images[index])
        torch.testing.assert_close(mine.tree.log_prob, trajectory.tree.log_prob[index])
    for rank in range(3):
        share = make_batch(size=size, rank=rank, world_size=3)
        part, _ = make_policy().rollout(share, plan())
        torch.testing.assert_close(part.images, whole.images[share.sample_id])


def test_a_decision_is_an_edge_of_its_first_sample() -> None:
    plan = branch_grpo(num_steps=6, splits=(0, 2)).plan(0)
    _, trajectory = make_policy().rollout(make_batch(groups=1, size=4), plan)
    data = trajectory.decisions
    assert data.step.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4]
    assert data.sample.tolist() == [0, 2, 0, 2, *range(4), *range(4), *range(4)]
    assert data.row.tolist() == [0, 0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    alive = torch.tensor([False, True, False, False])
    edges = trajectory.tree.any_below(alive)[data.sample, data.step]
    assert edges.tolist() == [i in (0, 2, 5, 9, 13) for i in range(16)]


def test_siblings_noise_correlates_and_keeps_its_variance() -> None:
    # 2000 trees of two leaves: the noise of step 0, recovered from the states and their mean.
    plan = branch_grpo(num_steps=3, splits=(0,), noise_scale=1.0).plan(0)
    plan = replace(plan, store_mean=True)
    policy = make_policy(rollout_batch_size=4096, decode_batch_size=4096)
    _, trajectory = policy.rollout(make_batch(groups=2000, size=2), plan)
    first = trajectory.levels[1]
    noise = (first.states - first.mean) / 0.3 / (1 / 3) ** 0.5
    pairs = noise.reshape(2000, 2, 2)
    assert pairs.var().item() == pytest.approx(1, abs=5 * (2 / 8000) ** 0.5)
    assert (pairs[:, 0] * pairs[:, 1]).mean().item() == pytest.approx(
        0.5, abs=5 * (1.25 / 4000) ** 0.5
    )
    own = [
        policy._noise(trajectory.batch.seed, trajectory.batch.sample_id, stream=s) for s in (1, 0)
    ]
    assert (noise - own[0]).abs().max() > 0.1  # not the own noise alone


def test_the_old_mean_is_stored_if_the_plan_asks() -> None:
    policy = make_policy()
    _, without = policy.rollout(make_batch(), flow_grpo(num_steps=4).plan(0))
    assert without.decisions.old_mean is None
    plan = replace(flow_grpo(num_steps=4).plan(0), store_mean=True)
    _, trajectory = policy.rollout(make_batch(), plan)
    data = trajectory.decisions
    new = policy.evaluate(trajectory, torch.arange(len(data.row)))
    torch.testing.assert_close(data.old_mean, new.transition_mean.detach())
    part = data.select(torch.tensor([1, 5]))
    assert torch.equal(part.old_mean, data.old_mean[[1, 5]])


def test_the_tail_is_of_second_order() -> None:
    """Four times the steps divide the error by 4^2 (almost: the ends cost a log), Euler's by 4."""
    batch, policy = make_batch(), make_policy()
    kernel = flow_grpo().plan(0).kernel

    def end(num_steps: int, tail: Tail | None) -> torch.Tensor:
        # Of a plan without a stochastic step, everything is tail.
        rollout, _ = policy.rollout(batch, StepPlan(num_steps, kernel, (), (), tail=tail))
        return rollout.latents.double()

    exact = end(2048, Tail(1.0))
    for tail, low, high in ((None, 0.9, 1.1), (Tail(1.0), 1.6, 2.2)):
        coarse, fine = (float((end(n, tail) - exact).abs().max()) for n in (64, 256))
        assert low < math.log2(coarse / fine) / 2 < high


def test_nodes_are_equal_where_keys_agree_up_to_there() -> None:
    keys = torch.tensor([[3, 7, -1], [3, 7, 5], [3, 8, 5], [4, 7, 5], [3, 7, -1]])
    node = Tree(keys, torch.zeros(5, 2)).node
    assert node.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [0, 0, 0]]
    with pytest.raises(ShapeError, match="int64 keys"):
        Tree(keys, torch.zeros(5, 3))


def test_keys_that_break_their_promise_are_refused() -> None:
    kernel, batch = flow_grpo().plan(0).kernel, make_batch()
    wrong = StepPlan(4, kernel, (1,), (1,), keys=lambda b, p: own_noise(b, p)[:, :-1])
    with pytest.raises(ShapeError, match=r"keys of a plan must be int64 \[12, 5\]"):
        make_policy().rollout(batch, wrong)
    every = lambda b, p: torch.zeros(len(b), 5, dtype=torch.int64)  # noqa: E731
    with pytest.raises(ShapeError, match="beyond"):
        make_policy().rollout(batch, StepPlan(4, kernel, (1,), (1,), keys=every))
    with pytest.raises(ConfigError, match=r"set data\.group_size=4"):
        make_policy().rollout(make_batch(size=8), branch_grpo(num_steps=6, splits=(0, 2)).plan(0))
