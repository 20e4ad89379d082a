"""Guard, DPPO, Pref-GRPO and GDPO: their papers' numbers, and equality with naive oracles.

Kills, among others: one bias of RatioNorm for the batch; a log-ratio that is not scaled by std; a
loss times -dt; the old mean taken for the reference's, or with a gradient; a KL without the std, or
a bound that also stops the way back; a plan that forgets the old mean; a win rate of the batch
instead of the group; a sum normalised in the group again.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import rewards
from flowrl.functional.advantages import global_std_normalized
from flowrl.methods import METHODS
from flowrl.methods.flow import flow_grpo
from flowrl.methods.guarded import flow_dppo, flow_gdpo, grpo_guard, inverse_dt_steps, pref_grpo
from flowrl.methods.objectives import (
    KLS,
    ClippedRatio,
    DivergenceBound,
    density_log_ratio,
    normalized_log_ratio,
)
from flowrl.methods.spec import Method, own_noise, shared_start
from flowrl.train.scoring import RewardSet
from flowrl.types import Scores
from tests.methods import guarded_oracles, oracles
from tests.methods.test_oracles import (
    WEIGHTS,
    Case,
    field,
    float64,
    gradient,
    kept_steps,
    naive_chains,
    scores,
    two_rewards,
)
from tests.methods.test_tree_oracles import tree_loss
from tests.policies.toy_flow import GROUPS, SIZE, counted, make_batch, make_policy, perturb

SAMPLES = GROUPS * SIZE


def test_grpo_guard_has_the_numbers_of_its_paper() -> None:
    method = grpo_guard()
    plan = method.plan(3)
    assert plan.num_steps == 10 and plan.stochastic == tuple(range(10))
    assert plan.trained == tuple(range(9)) and plan.store_mean and plan.keys is own_noise
    clip = ClippedRatio(2e-6, 2e-6, KLS["paper"], log_ratio=normalized_log_ratio)
    assert method.objective == clip and not method.objective.needs.sets
    sigmas = torch.tensor([1.0, 0.8, 0.3, 0.0])
    torch.testing.assert_close(inverse_dt_steps(plan, sigmas), 1 / torch.tensor([0.2, 0.5, 0.3]))
    # The std of the group: 1 and .1 in two groups of two; plain Flow-GRPO takes everybody's.
    one = Scores({"a": float64([0, 2, 5, 5.2])}, {"a": 1.0}, torch.ones(4).bool())
    expected = float64([-1, 1, -0.1, 0.1]) / (float64([1, 1, 0.1, 0.1]) + 1e-4)
    group_id = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(method.advantage(one, group_id, None), expected)
    # Nothing of it in the method that it stands on.
    assert not flow_grpo().plan(0).store_mean and flow_grpo().weighting is None
    assert flow_grpo().objective.log_ratio is density_log_ratio


def test_flow_dppo_has_the_numbers_of_its_recipe() -> None:
    method = flow_dppo()
    assert method.objective == DivergenceBound(1e-5) and not method.objective.needs.sets
    plans = [method.plan(step) for step in range(60)]
    assert all(plan.store_mean and plan.num_steps == 10 for plan in plans)
    assert all(plan.stochastic == plan.trained and len(plan.trained) == 2 for plan in plans)
    assert {plan.trained[0] for plan in plans} == {0, 1, 2, 3}
    # One among 30 lies 5.4 std of everybody above the mean of its group: it is not cut at 5.
    values = float64([0.0] * 29 + [1.0])
    one = Scores({"a": values}, {"a": 1.0}, torch.ones(30).bool())
    advantages = method.advantage(one, torch.zeros(30, dtype=torch.int64), None)
    assert advantages.max() > 5.3
    torch.testing.assert_close(
        advantages, global_std_normalized(values, torch.zeros(30, dtype=torch.int64))
    )


def test_pref_grpo_has_the_numbers_of_its_script() -> None:
    method = pref_grpo()
    plan = method.plan(0)
    assert plan.num_steps == 25 and plan.num_kept == 14 and plan.keys is shared_start
    assert plan.trained == tuple(range(24)) and not plan.store_mean
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"]) and method.weighting is None
    assert "flow_sde(noise_level=0.7)" in dict(method.describe()).values()


def test_flow_gdpo_of_one_reward_is_flow_grpo_by_the_group_up_to_a_factor() -> None:
    group_id = torch.arange(SAMPLES) // SIZE
    one = Scores({"a": float64(two_rewards(SAMPLES)[1])}, {"a": 1.0}, torch.ones(SAMPLES).bool())
    ours = flow_gdpo().advantage(one, group_id, None)
    plain = flow_grpo(advantage_std="group").advantage(one, group_id, None)
    ratio = ours / plain
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])))
    assert float(ratio[0]) == pytest.approx(1, abs=1e-3)
    assert flow_gdpo().objective == flow_grpo().objective


def test_groups_of_equal_rewards_teach_exactly_nothing_under_gdpo() -> None:
    group_id = torch.arange(SAMPLES) // SIZE
    values = two_rewards(SAMPLES)
    for drawn in values:
        drawn[SIZE : 2 * SIZE] = [0.3] * SIZE
    advantages = flow_gdpo().advantage(scores(values), group_id, None)
    assert (advantages[SIZE : 2 * SIZE] == 0).all() and (advantages[:SIZE] != 0).all()


@pytest.mark.parametrize(
    ("make", "args", "message"),
    [
        (grpo_guard, {"kernel": "cps"}, "kernel=cps does not fit.*use flow_sde or dance_sde"),
        (grpo_guard, {"clip_range": 0.0}, "clip_low must be positive"),
        (grpo_guard, {"num_steps": 1}, "leaves nothing to train"),
        (flow_dppo, {"threshold": 0.0}, "threshold must be positive"),
        (flow_dppo, {"window": 6}, "window=6 does not fit before window_end=5"),
        (pref_grpo, {"noise_level": 0.0}, "noise_level must be positive"),
        (flow_gdpo, {"advantage_clip": 0.0}, "advantage_clip must be positive"),
        (flow_gdpo, {"kl_coef": -0.1}, "kl_coef must not be negative"),
    ],
)
def test_an_impossible_combination_is_refused(
    make: Any, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**args)


@pytest.mark.parametrize("name", ["grpo_guard", "flow_dppo"])
def test_an_objective_without_the_old_mean_says_what_is_missing(name: str) -> None:
    policy, batch = make_policy(), make_batch()
    _, trajectory = policy.rollout(batch, flow_grpo(num_steps=4).plan(0))
    with pytest.raises(ValueError, match="its plan must set store_mean"):
        tree_loss(policy, trajectory, METHODS[name](num_steps=6), two_rewards(SAMPLES))


GUARD = {
    "flow_sde": Case("grpo_guard", {"num_steps": 5, "clip_range": 3e-5}, "flow_sde"),
    "flow_sde, guided, one start": Case(
        "grpo_guard",
        {"num_steps": 4, "clip_range": 3e-5, "shared_noise": True},
        "flow_sde",
        guidance_scale=3.0,
    ),
    "dance_sde": Case(
        "grpo_guard", {"num_steps": 5, "clip_range": 3e-5, "kernel": "dance_sde"}, "dance_sde"
    ),
}


@pytest.mark.parametrize("case", GUARD.values(), ids=GUARD)
def test_grpo_guard_equals_its_oracle(case: Case) -> None:
    policy, batch, method = (
        make_policy(guidance_scale=case.guidance_scale),
        make_batch(),
        case.method,
    )
    network = policy.weights.network
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(0))
    chains = naive_chains(policy, case, batch, old)
    ends = torch.stack([chain[-1] for chain in chains])
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(ends))

    drawn = two_rewards(SAMPLES)
    advantages = oracles.summed_advantages(drawn, batch.group_id.tolist(), WEIGHTS, "group")
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, drawn)
        expected = guarded_oracles.guard_loss(
            field(policy, network, batch), old, chains, kept_steps(trajectory), advantages,
            kernel=case.kernel, noise_level=0.7, sigmas=trajectory.sigmas.tolist(), clip=3e-5,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        expected_gradient = gradient(expected, network)
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient(loss, network), expected_gradient, rtol=1e-6, atol=1e-9)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert 0.1 < bound < 0.9 if moved else metrics["ratio_max_dev"].max() < 1e-12


DPPO = {
    "window": Case("flow_dppo", {"num_steps": 8}, "flow_sde", step=2),
    "cps": Case("flow_dppo", {"num_steps": 8, "kernel": "cps", "noise_level": 0.8}, "cps"),
}


@pytest.mark.parametrize("case", DPPO.values(), ids=DPPO)
def test_flow_dppo_equals_its_oracle(case: Case) -> None:
    threshold = 4e-7  # the change below has KLs from 5e-8 to 7e-6
    method = METHODS["flow_dppo"](**case.args, threshold=threshold)
    policy, batch = make_policy(), make_batch()
    network = policy.weights.network
    old = field(policy, copy.deepcopy(network), batch)
    _, trajectory = policy.rollout(batch, method.plan(case.step))
    chains = naive_chains(policy, case, batch, old)

    drawn = two_rewards(SAMPLES)
    advantages = oracles.summed_advantages(drawn, batch.group_id.tolist(), WEIGHTS, "global")
    assert max(map(abs, advantages)) < 5  # where the oracle would clip, and the method does not
    for moved in (False, True):
        if moved:
            perturb(network, 2e-3, seed=3)
        loss, metrics = tree_loss(policy, trajectory, method, drawn)
        expected, stopped = guarded_oracles.dppo_loss(
            field(policy, network, batch), old, chains, kept_steps(trajectory), advantages,
            kernel=case.kernel, noise_level=case.noise_level, sigmas=trajectory.sigmas.tolist(),
            threshold=threshold,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        expected_gradient = gradient(expected, network)
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient(loss, network), expected_gradient, rtol=1e-6, atol=1e-9)
        share = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert share.item() == pytest.approx(stopped)
        assert 0.1 < stopped < 0.9 if moved else metrics["ratio_max_dev"].max() < 1e-12
        assert moved or metrics["behaviour_kl"].max() < 1e-20


def test_pref_grpo_standardises_the_win_rates_of_each_group() -> None:
    images = torch.rand(SAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]  # a tie, within the first group of a sampler that deals groups in turn
    batch = make_batch()
    level, groups = images.mean(dim=(1, 2, 3)).tolist(), batch.group_id.tolist()
    judged = RewardSet([("win", rewards.load("win_rate", judge="brightness"), 1.0)])
    scored = judged.score(batch, images=images)
    rates = guarded_oracles.group_win_rates(level, groups)
    torch.testing.assert_close(scored.rewards["win"], torch.tensor(rates))
    expected = oracles.normalized_advantages([rates], groups, [1.0])
    advantages = pref_grpo().advantage(scored, batch.group_id, None)
    torch.testing.assert_close(advantages, torch.tensor(expected))


@pytest.mark.parametrize(
    ("method", "rollout", "training"),
    [
        # own starts: T per sample, of which all but the last are trained
        (grpo_guard(num_steps=6), 6 * SAMPLES, 5 * SAMPLES),
        (flow_gdpo(num_steps=6), 6 * SAMPLES, 5 * SAMPLES),
        # one start per group; 60 % of 5 steps
        (pref_grpo(num_steps=6), GROUPS + 5 * SAMPLES, None),
        (flow_dppo(num_steps=6, window_end=4), 6 * SAMPLES, 2 * SAMPLES),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_the_network_is_evaluated_as_often_as_the_closed_form_says(
    method: Method, rollout: int, training: int | None
) -> None:
    policy = make_policy()
    with counted(policy.weights.network) as count:
        drawn, trajectory = policy.rollout(make_batch(), method.plan(0))
    assert count.rows == drawn.network_evals == rollout
    data = trajectory.decisions
    index = data.mask.nonzero().flatten()
    with counted(policy.weights.network) as count:
        policy.evaluate(trajectory, index)
    if training is None:  # the shared first state is one row, for all that train its step
        first = data.step[index] == 0
        assert len(index) == 3 * SAMPLES
        training = int((~first).sum()) + len(set(data.sample[index][first].tolist()))
        training -= int(first.sum()) - len(torch.unique(data.row[index][first]))
    assert count.rows == training
    assert math.isfinite(float(data.old_log_prob[index].sum()))
