"""reward_losses="separate" equals a naive oracle that adds one clipped loss per reward.

Kills, among others: a method that drops the argument; the normaliser of another paper; the sum
clamped instead of each advantage; a chunk whose negative share is ignored; clip fractions of the
total; a negative advantage given to an objective that has one loss for all.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.functional.advantages import global_std_normalized, group_normalized
from flowrl.functional.aggregate import aggregate
from flowrl.methods import METHODS, Method
from flowrl.methods.objectives import KLS, ClippedRatio, DivergenceBound
from flowrl.methods.several import combine
from flowrl.train.lessons import per_decision
from flowrl.types import Chunk, Decisions, Evaluation, Scores
from tests.methods import oracles
from tests.methods.test_oracles import (
    CLOSE,
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
from tests.policies.toy_flow import make_batch, make_policy, perturb

SEPARATE = {"reward_losses": "separate"}
OFFERED = [n for n, f in METHODS.items() if "reward_losses" in inspect.signature(f).parameters]
CASES = {
    "dance_grpo": Case("dance_grpo", {"num_steps": 6, **SEPARATE}, "dance_sde"),
    "mix_grpo": Case("mix_grpo", {"num_steps": 6, "window": 3, **SEPARATE}, "flow_sde"),
    "flow_grpo": Case("flow_grpo", {"num_steps": 4, **SEPARATE}, "flow_sde"),
    "flow_grpo, std of the group": Case(
        "flow_grpo", {"num_steps": 4, "advantage_std": "group", **SEPARATE}, "flow_sde"
    ),
}


def own_advantages(case: Case, reward: list[float], groups: list[int]) -> list[float]:
    """One reward's advantages, clamped, as if it were the only one."""
    if case.name == "flow_grpo":
        scope = case.args.get("advantage_std", "global")
        return oracles.summed_advantages([reward], groups, [1.0], scope)
    return oracles.normalized_advantages([reward], groups, [1.0])


def loss_of(policy: Any, trajectory: Any, method: Method, found: Scores) -> tuple[Tensor, Tensor]:
    """Loss of all decisions in one chunk, and its clip fractions [2] where trained."""
    data, group_id = trajectory.decisions, trajectory.batch.group_id
    total, negative = (
        per_decision(advantage(found, group_id, None), data)
        for advantage in (method.advantage, method.negative_advantage)
        if advantage is not None
    )
    new = policy.evaluate(trajectory, torch.arange(len(data.row)))
    loss = method.objective(new, None, None, Chunk(data, total, negative_advantage=negative))
    high, low = (loss.metrics[f"clip_frac_{side}"][data.mask].mean() for side in ("high", "low"))
    value = aggregate(loss.values, data.mask, float(data.mask.sum()))
    return value, torch.stack([high, low])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_equals_one_clipped_loss_per_reward_with_its_weight(case: Case) -> None:
    policy, batch = make_policy(), make_batch()
    network, method = policy.weights.network, case.method
    old = field(policy, make_policy().weights.network, batch)
    _, trajectory = policy.rollout(batch, method.plan(0))
    chains, groups = naive_chains(policy, case, batch, old), batch.group_id.tolist()
    rewards = two_rewards(len(batch))
    rewards[1] = [-2 * a + b / 9 for a, b in zip(*rewards, strict=True)]  # often the opposite
    summed = METHODS[case.name](**case.args | {"reward_losses": "summed"})
    differ = []
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, stopped = loss_of(policy, trajectory, method, scores(rewards))
        expected = torch.zeros((), dtype=torch.float64)
        for weight, reward in zip(WEIGHTS, rewards, strict=True):
            expected = expected + weight * oracles.flow_loss(
                field(policy, network, batch),
                old,
                old,
                chains,
                kept_steps(trajectory),
                own_advantages(case, reward, groups),
                kernel=case.kernel,
                noise_level=case.noise_level,
                sigmas=trajectory.sigmas.tolist(),
                clip=1e-4,
                kl_coef=0.0,
                kl="paper",
            )
        torch.testing.assert_close(loss, expected, **CLOSE)
        want = gradient(expected, network)
        assert want.abs().max() > 1e-3
        torch.testing.assert_close(gradient(loss, network), want, **CLOSE)
        assert stopped.min() > 0.1 if moved else stopped.max() == 0
        # The same advantages, their sum clipped once: the same gradient at a ratio of 1 alone.
        once = replace(method, objective=summed.objective)
        data = trajectory.decisions
        new = policy.evaluate(trajectory, torch.arange(len(data.row)))
        total = per_decision(method.advantage(scores(rewards), batch.group_id, None), data)
        plain = once.objective(new, None, None, Chunk(data, total)).values
        plain_gradient = gradient(aggregate(plain, data.mask, float(data.mask.sum())), network)
        differ.append(float((plain_gradient - want).abs().max()))
    assert differ[0] < 1e-9 and differ[1] > 1e-2


@pytest.mark.parametrize("name", OFFERED)
def test_every_method_that_offers_it_uses_its_own_normaliser_one_reward_at_a_time(
    name: str,
) -> None:
    method, plain = METHODS[name](**SEPARATE, advantage_clip=0.9), METHODS[name](advantage_clip=0.9)
    found = scores(two_rewards(12))
    group_id = torch.arange(12) // 4
    assert plain.negative_advantage is None and method.negative_advantage is not None
    each = [
        weight
        * plain.advantage(
            Scores({"a": found.rewards[key]}, {"a": 1.0}, found.valid), group_id, None
        )
        for key, weight in found.weights.items()
    ]
    total = method.advantage(found, group_id, None)
    torch.testing.assert_close(total, each[0] + each[1], **CLOSE)
    negative = method.negative_advantage(found, group_id, None)
    blame = each[0].clamp(max=0) + each[1].clamp(max=0)
    torch.testing.assert_close(negative, blame, **CLOSE)
    assert (negative < total.clamp(max=0) - 1e-3).any(), "the rewards never disagree"
    assert method.compares == plain.compares and method.objective == plain.objective
    texts = dict(method.describe())
    assert texts["losses of several rewards"] == "separate"
    assert texts["negative_advantage"].startswith("blaming_rewards(normalize=")
    assert "negative_advantage" not in dict(plain.describe())


def test_all_are_offered_whose_ratio_is_clipped_on_chains_or_tokens() -> None:
    assert OFFERED == [
        "flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "mix_grpo_flash", "grpo_guard",
        "pref_grpo", "grpo",
    ]  # fmt: skip


def test_a_method_without_the_argument_is_made_of_what_it_was() -> None:
    gdpo, fast = METHODS["flow_gdpo"](), METHODS["flow_dppo"]()
    assert gdpo.negative_advantage is None and fast.negative_advantage is None
    flow = METHODS["flow_grpo"]()
    assert flow.advantage.keywords["normalize"].func is global_std_normalized  # type: ignore[attr-defined]


def objective_of(total: Tensor, negative: Tensor | None, change: Tensor) -> dict[str, list[float]]:
    """Metrics of decisions whose log-ratio is `change`, clipped to [.8, 1.2]."""
    number, zero = torch.arange(len(total)), torch.zeros(len(total))
    data = Decisions(number, number, number, zero, torch.ones(len(total)).bool(), zero, zero)
    objective = ClippedRatio(0.2, 0.2, KLS["paper"])
    chunk = Chunk(data, total, negative_advantage=negative)
    loss = objective(Evaluation(change), None, None, chunk)
    return {name: values.tolist() for name, values in loss.metrics.items()}


def test_clip_fractions_count_decisions_of_which_some_reward_is_stopped() -> None:
    # Ratios 2, 2, 2, .5, .5, .5, 1; P and M: both, P alone, M alone, likewise, both.
    change = torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 1.0]).log()
    total = torch.tensor([-1.0, 2.0, -3.0, 1.0, 2.0, -3.0, 0.0])
    negative = torch.tensor([-2.0, 0.0, -3.0, -1.0, 0.0, -3.0, -4.0])
    each = objective_of(total, negative, change)
    assert each["clip_frac_high"] == [1, 1, 0, 0, 0, 0, 0]
    assert each["clip_frac_low"] == [0, 0, 0, 1, 0, 1, 0]
    once = objective_of(total, None, change)
    assert once["clip_frac_high"] == [0, 1, 0, 0, 0, 0, 0]
    assert once["clip_frac_low"] == [0, 0, 0, 0, 0, 1, 0]
    assert once["ratio_mean"] == each["ratio_mean"]


def test_an_objective_with_one_loss_for_all_rewards_is_refused() -> None:
    method = METHODS["dance_grpo"](**SEPARATE)
    with pytest.raises(ValueError, match=r"dance_grpo: .* DivergenceBound, has one for all"):
        replace(method, objective=DivergenceBound(1e-5))
    one = partial(group_normalized, eps=0.0)
    with pytest.raises(ValueError, match="must be 'summed' or 'separate', got 'apart'"):
        combine(method, "apart", normalize=one, clip=math.inf)  # type: ignore[arg-type]


def test_best_of_n_is_chosen_by_the_sum_of_all_rewards() -> None:
    method = METHODS["dance_grpo"](num_extremes=1, **SEPARATE)
    assert method.prune is not None
    found = Scores(
        {"a": float64([0, 1, 2, 3]), "b": float64([3, 2, 1, -9])},
        {"a": 1.0, "b": 0.1},
        torch.ones(4).bool(),
    )
    group_id = torch.zeros(4, dtype=torch.int64)
    kept = method.prune(method.advantage(found, group_id, None), group_id, None)
    assert kept.tolist() == [True, False, False, True]
