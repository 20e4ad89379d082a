"""Flash-GRPO, G2RPO and DenseGRPO: their papers' numbers, and equality with naive oracles.

Kills, among others: a step per sample, or one for all prompts; lambda in place of its inverse, or a
mean over other steps; a granularity that stops above sigma 0, skips the shared step or is compared
with another; an end counted as a decision; a gain of the wrong sign or of the step beside; gains
normalised over all steps; a completion with noise; a failed reward that counts as 0.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.errors import ConfigError
from flowrl.methods import METHODS
from flowrl.methods.credit import (
    completions,
    dense_grpo,
    flash_grpo,
    g2rpo,
    rectified_steps,
    step_of_group,
)
from flowrl.methods.objectives import KLS, ClippedRatio
from flowrl.methods.spec import Method, StepPlan
from flowrl.methods.tails import Granularities
from flowrl.types import PromptBatch, Scores, Tree
from tests.methods import credit_oracles, oracles
from tests.methods.test_oracles import (
    CLOSE,
    WEIGHTS,
    field,
    float64,
    gradient,
    kept_steps,
    scores,
    two_rewards,
)
from tests.methods.test_tree_oracles import draw, tree_loss
from tests.policies.toy_flow import counted, make_batch, make_policy, perturb

GRANULAR: dict[str, Any] = {"num_steps": 8, "window_end": 3, "num_branches": 3}
DENSE: dict[str, Any] = {"num_steps": 5, "num_trajectories": 3}


def weighted(rewards: list[list[float]]) -> list[float]:
    return [a * WEIGHTS[0] + b * WEIGHTS[1] for a, b in zip(*rewards, strict=True)]


def assert_equal_with_gradient(found: Tensor, expected: Tensor, network: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    gradients = gradient(found, network), gradient(expected, network)
    assert gradients[1].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_flash_grpo_has_the_numbers_of_its_code() -> None:
    method = flash_grpo()
    plan = method.plan(7)
    assert plan.num_steps == 20 and plan.stochastic == plan.trained == tuple(range(10))
    assert plan.keys is step_of_group and not plan.needs_whole_groups
    assert method.objective == ClippedRatio(1e-3, 1e-3, KLS["paper"])
    # The table of its code is 1 / lambda of Wan's noise, .9828 * sigma (shift 3, 20 steps).
    u = 1 - torch.arange(21, dtype=torch.float64) / 20
    sigmas = 3 * u / (1 + 2 * u)
    table = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    expected = float64(table) / (sum(table) / 10)

    def wan(x: Tensor, v: Tensor, s: Tensor, s_next: Tensor, s_max: Tensor) -> Any:
        s, s_next = s.reshape(-1, 1), s_next.reshape(-1, 1)
        g, dt = s_max * s, s_next - s
        drift = v + g**2 / (2 * s.clamp(min=1e-9)) * (x + (1 - s) * v)
        return x + dt * drift, g * (-dt).sqrt()

    weights = rectified_steps(StepPlan(20, wan, plan.stochastic, plan.trained), sigmas)
    torch.testing.assert_close(weights[:10], expected, rtol=2e-3, atol=0)
    assert flash_grpo(window_end=3).plan(0).trained == (0, 1, 2)


def test_a_prompts_samples_share_one_step_which_is_drawn_among_all() -> None:
    plan = flash_grpo().plan(0)
    batch = make_batch(groups=400, size=3)
    keys = step_of_group(batch, plan)
    assert ((keys[:, 1:] >= 0).sum(1) == 1).all() and (keys[:, 0] == batch.sample_id).all()
    assert (keys.max(1).values == batch.sample_id).all()
    step = (keys[:, 1:] >= 0).int().argmax(1).reshape(400, 3)
    assert (step == step[:, :1]).all()
    counts = Counter(step[:, 0].tolist())
    assert set(counts) == set(range(10)) and max(counts.values()) < 40 + 5 * 6  # std 6
    parts = [make_batch(groups=400, size=3, rank=rank, world_size=3) for rank in range(3)]
    assert len(parts[0]) % 3  # groups span ranks
    whole = torch.cat([step_of_group(part, plan) for part in parts])
    order = torch.cat([part.sample_id for part in parts]).argsort()
    assert torch.equal(whole[order], keys)
    other = PromptBatch(batch.prompts, batch.group_id, *[batch.sample_id] * 3, seed=batch.seed + 1)
    assert not torch.equal(step_of_group(other, plan), keys)


def test_flash_grpo_equals_its_oracle() -> None:
    steps = 8
    method = METHODS["flash_grpo"](num_steps=steps, clip_range=1e-4)
    policy, batch = make_policy(), make_batch()
    network = policy.weights.network
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(0))
    taken = kept_steps(trajectory)
    assert len({step for (step,) in taken}) > 1
    sigmas = trajectory.sigmas.tolist()
    chains = []
    for n, mine in enumerate(taken):
        noise = [draw(batch, n, 1 + i) for i in range(steps)]
        chains += oracles.rollout(
            lambda x, s, _, n=n: old(x, s, n), "flow_sde", 0.7, sigmas, mine, [draw(batch, n, 0)],
            [noise],
        )  # fmt: skip
    ends = torch.stack([chain[-1] for chain in chains])
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(ends))

    drawn = two_rewards(len(batch))
    advantages = oracles.summed_advantages(drawn, batch.group_id.tolist(), WEIGHTS, "global")
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, drawn)
        expected = credit_oracles.flash_loss(
            field(policy, network, batch), old, chains, taken, advantages, noise_level=0.7,
            sigmas=sigmas, clip=1e-4, trained=range(steps // 2),
        )  # fmt: skip
        assert_equal_with_gradient(loss, expected, network)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert bound > 0.1 if moved else metrics["ratio_max_dev"].max() < 1e-12


def test_g2rpo_has_the_numbers_of_its_code() -> None:
    method = g2rpo()
    plans = [method.plan(step) for step in range(9)]
    assert [plan.trained for plan in plans] == [(k,) for k in (*range(8), 0)]
    assert all(plan.stochastic == plan.trained and plan.num_steps == 16 for plan in plans)
    assert plans[0].tail == Granularities((1, 2)) and plans[0].group_size == 24
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"]) and method.weighting is None
    # The schedules of its code after step k: entries k + 2, k + 4, ..., and 0 for the last.
    entries = torch.arange(16, -1, -1).double() / 16
    for k, coarse in ((0, [2, 4, 6, 8, 10, 12, 14, 16]), (3, [5, 7, 9, 11, 13, 16])):
        fine, found = plans[k].tail.paths(entries, plans[k].num_table_steps)
        assert (16 - 16 * fine).tolist() == list(range(k + 2, 17))
        assert (16 - 16 * found).tolist() == coarse


@pytest.mark.parametrize("k", [0, 1, 2])
def test_g2rpo_equals_its_oracle(k: int) -> None:
    method = METHODS["g2rpo"](**GRANULAR)
    policy, batch = make_policy(), make_batch(groups=2, size=6)
    network = policy.weights.network
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(k))
    sigmas = trajectory.sigmas.tolist()
    groups, state = batch.group_id.tolist(), [n - n % 2 for n in range(12)]
    chains: dict[int, list[Tensor]] = {}
    ends = []
    for n in range(12):
        x = draw(batch, groups[n], 0)
        x = credit_oracles.euler_walk(old, x, sigmas[: k + 1], n)[0].detach()
        mean, std = oracles.transition("flow_sde", 0.7, x, old(x, sigmas[k], n), sigmas, k)
        after = (mean + std * draw(batch, state[n], 1 + k)).detach()
        chains[state[n]] = [*[x] * (k + 1), after]
        ends.append(credit_oracles.granular_ends(old, after, sigmas, k, 1 + n % 2, n))
    images = policy.pipeline.decode(torch.stack(ends))
    torch.testing.assert_close(rollout.images, images)
    assert not torch.equal(images[::2], images[1::2])
    assert len(trajectory.decisions.row) == 6 and trajectory.num_rows == 2
    assert trajectory.decisions.sample.tolist() == sorted(chains)

    drawn = two_rewards(12)
    by_state = credit_oracles.granular_advantages(
        drawn, WEIGHTS, groups, [n % 2 for n in range(12)], state
    )
    advantages = method.advantage(scores(drawn), batch.group_id, trajectory.tree)
    torch.testing.assert_close(advantages, float64([by_state[s] for s in state]), **CLOSE)
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, drawn)
        expected = credit_oracles.stepwise_loss(
            field(policy, network, batch), old, old, list(chains.values()), [[k]] * 6,
            list(chains), [[by_state[s]] for s in chains], kernel="flow_sde", noise_level=0.7,
            sigmas=sigmas, clip=1e-4, kl_coef=0.0,
        )  # fmt: skip
        assert_equal_with_gradient(loss, expected, network)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert bound > 0.1 if moved else metrics["ratio_max_dev"].max() < 1e-12


def test_dense_grpo_has_the_numbers_of_its_paper() -> None:
    method = dense_grpo()
    plan = method.plan(3)
    assert plan.num_steps == 10 and plan.stochastic == plan.trained == tuple(range(9))
    assert plan.group_size == 240 and plan.keys is completions
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"]) and method.weighting is None


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_dense_grpo_equals_its_oracle(kl_coef: float) -> None:
    method, steps = METHODS["dense_grpo"](**DENSE, kl_coef=kl_coef), 5
    policy, batch = make_policy(with_reference=True), make_batch(groups=2, size=15)
    network = policy.weights.network
    reference = field(policy, copy.deepcopy(network), batch)
    perturb(network, 0.02, seed=2)
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(0))
    sigmas, names = trajectory.sigmas.tolist(), list(range(0, 30, steps))
    chains, ends = [], []
    for n in names:
        noise = [draw(batch, n, 1 + i) for i in range(steps)]
        chains += oracles.rollout(
            lambda x, s, _, n=n: old(x, s, n), "flow_sde", 0.7, sigmas, range(steps - 1),
            [draw(batch, n, 0)], [noise],
        )  # fmt: skip
        for j in range(steps):
            ends.append(credit_oracles.euler_walk(old, chains[-1][j], sigmas[j:], n)[0].detach())
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(torch.stack(ends)))
    assert len(trajectory.decisions.row) == trajectory.num_rows == 6 * 4

    drawn = two_rewards(30)
    total = weighted(drawn)
    by_trajectory = [total[n : n + steps] for n in names]
    groups = batch.group_id[::steps].tolist()
    expected_advantages = credit_oracles.dense_advantages(by_trajectory, groups)
    advantages = method.advantage(scores(drawn), batch.group_id, trajectory.tree)
    for m, row in enumerate(expected_advantages):
        for j in range(steps):  # leaf j took the steps before j with noise
            found = advantages[m * steps + j].tolist()
            assert found == pytest.approx([*row[:j], *[0.0] * (steps - j)], abs=1e-9)
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, drawn)
        expected = credit_oracles.stepwise_loss(
            field(policy, network, batch), old, reference, chains, [range(4)] * 6, names,
            expected_advantages, kernel="flow_sde", noise_level=0.7, sigmas=sigmas, clip=1e-4,
            kl_coef=kl_coef,
        )  # fmt: skip
        assert_equal_with_gradient(loss, expected, network)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert bound > 0.1 if moved else metrics["ratio_max_dev"].max() < 1e-12


def one_reward(values: list[float], failed: int | None = None) -> Scores:
    reward = float64(values)
    if failed is not None:
        reward[failed] = torch.nan
    return Scores({"a": reward}, {"a": 1.0}, ~reward.isnan())


def forest(method: Method, batch: PromptBatch, step: int = 0) -> Tree:
    plan = method.plan(step)
    return Tree(plan.table(batch), torch.zeros(len(batch), plan.num_steps))


def test_a_failed_reward_spoils_the_two_gains_it_is_part_of() -> None:
    method, batch = METHODS["dense_grpo"](**DENSE), make_batch(groups=2, size=15)
    values, tree = two_rewards(30)[1], forest(method, batch)
    whole = method.advantage(one_reward(values), batch.group_id, tree)
    found = method.advantage(one_reward(values, failed=7), batch.group_id, tree)  # leaf 2
    changed = (whole != found)[4::5].nonzero().tolist()  # of the last leaf of each trajectory
    assert changed == [[m, i] for m in range(3) for i in (1, 2)]
    assert found[9].tolist()[1:3] == [0, 0] and found[9, 0] != 0
    # The others are compared with each other: of two, one is as much above as the other below.
    assert (found[4, 1:3] + found[14, 1:3]).abs().max() < 1e-12


def test_a_failed_end_adds_nothing() -> None:
    method, batch = METHODS["g2rpo"](**GRANULAR), make_batch(groups=2, size=6)
    values, tree = [1.0, 5.0, 2.0, 4.0, 3.0, 9.0, *[0.5] * 6], forest(method, batch)
    found = method.advantage(one_reward(values, failed=3), batch.group_id, tree)
    half = 0.5**0.5  # of two values with ddof 1; of 1, 2, 3 they are -1, 0, 1
    expected = float64([-1 - half, 0, 1 + half]).repeat_interleave(2)
    torch.testing.assert_close(found[:6], expected, rtol=1e-6, atol=1e-9)
    assert (found[6:] == 0).all()


@pytest.mark.parametrize(
    ("name", "args", "size"), [("g2rpo", GRANULAR, 6), ("dense_grpo", DENSE, 15)]
)
def test_completions_that_are_not_together_are_refused(
    name: str, args: dict[str, Any], size: int
) -> None:
    method, batch = METHODS[name](**args), make_batch(groups=2, size=size)
    mixed = batch.select(torch.randperm(2 * size, generator=torch.Generator().manual_seed(0)))
    values = two_rewards(2 * size)[0]
    with pytest.raises(ValueError, match="must stand together"):
        method.advantage(one_reward(values), mixed.group_id, forest(method, mixed))
    with pytest.raises(ValueError, match="there is no tree"):
        method.advantage(one_reward(values), batch.group_id, None)
    with pytest.raises(ConfigError, match=rf"set data\.group_size={size}"):
        forest(method, make_batch(groups=1, size=size + 1))


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (flash_grpo, {"window_end": 0}, "window_end=0 must be 1 to 19"),
        (flash_grpo, {"window_end": 20}, "the last step is never trained"),
        (flash_grpo, {"num_steps": 1}, "leaves nothing to train"),
        (flash_grpo, {"noise_level": 0.0}, "noise_level must be positive"),
        (g2rpo, {"granularities": ()}, r"granularities=\(\) must be different strides"),
        (g2rpo, {"granularities": (1, 1)}, "must be different strides"),
        (g2rpo, {"granularities": (0, 1)}, "of at least 1"),
        (g2rpo, {"window_end": 14}, "after step 13, .* 2 of 16 steps are left .* needs 3"),
        (g2rpo, {"num_steps": 1}, "window_end=0 must be"),
        (g2rpo, {"num_branches": 0}, "num_branches must be positive"),
        (g2rpo, {"clip_range": 0.0}, "clip_low must be positive"),
        (dense_grpo, {"num_trajectories": 0}, "num_trajectories must be positive"),
        (dense_grpo, {"num_steps": 1}, "leaves nothing to train"),
        (dense_grpo, {"kl_coef": -0.1}, "kl_coef must not be negative"),
    ],
)
def test_an_impossible_combination_is_refused(
    make: Any, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)


@pytest.mark.parametrize(
    ("method", "size", "step", "rollout", "training"),
    [
        # Flash: T per sample, one trained.
        (flash_grpo(num_steps=6), 4, 0, 6 * 4, 4),
        # G2RPO: k + 1 of the trunk; per branch the shared step, and (T - k - 2) // stride each.
        (g2rpo(num_steps=16), 24, 0, 1 + 12 * (1 + 14 + 7), 1),
        (g2rpo(num_steps=16), 24, 7, 8 + 12 * (1 + 7 + 3), 1),
        # DenseGRPO: per trajectory T (T + 1) / 2, and T - 1 trained.
        (dense_grpo(num_steps=10, num_trajectories=2), 20, 0, 2 * 55, 2 * 9),
    ],
)
def test_the_network_is_evaluated_as_often_as_the_closed_form_says(
    method: Method, size: int, step: int, rollout: int, training: int
) -> None:
    policy = make_policy()
    with counted(policy.weights.network) as count:
        drawn, trajectory = policy.rollout(make_batch(groups=2, size=size), method.plan(step))
    assert count.rows == drawn.network_evals == 2 * rollout
    with counted(policy.weights.network) as count:
        policy.evaluate(trajectory, torch.arange(len(trajectory.decisions.row)))
    assert count.rows == trajectory.num_rows == 2 * training
