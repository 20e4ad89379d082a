"""Neighbor GRPO: its numbers, equality with a naive oracle, and its policy's promises.

Kills, among others: candidates of another group or level; the anchor's own prediction in place of
its state; a distance that is a sum over dims; a solver's step in place of Euler's in the ratio; a
candidate that is trained with the anchor's advantage; steps or anchors that never change; shared
and own noise that change places.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from flowrl.commands.check import network_evals
from flowrl.data.noise import sample_noise
from flowrl.functional.solvers import dpmpp_2m
from flowrl.methods import METHODS, Method
from flowrl.methods.credit import neighbor_grpo
from flowrl.methods.objectives import KLS, ClippedRatio
from flowrl.policies.neighbors import NeighborPolicy
from flowrl.testing import check_policy
from tests.methods import credit_oracles
from tests.methods.test_oracles import (
    CLOSE,
    WEIGHTS,
    field,
    float64,
    framework_loss,
    gradient,
    scores,
    two_rewards,
)
from tests.policies.toy_flow import counted, make_batch, make_policy, perturb

SMALL: dict[str, Any] = {
    "num_steps": 5, "group_size": 4, "num_anchors": 2, "num_trained": 3, "temperature": 0.5,
}  # fmt: skip


def neighbors(**kwargs: Any) -> NeighborPolicy:
    return NeighborPolicy(make_policy(**kwargs))


def small(**args: Any) -> Method:
    return METHODS["neighbor_grpo"](**SMALL, **args)


def test_it_has_the_numbers_of_its_paper() -> None:
    method = neighbor_grpo()
    plans = [method.plan(step) for step in range(200)]
    plan = plans[0]
    assert (plan.num_steps, plan.group_size, plan.num_anchors) == (8, 12, 4)
    assert plan.solver is dpmpp_2m and plan.spread == 0.3 and plan.needs_whole_groups
    assert all(len(p.trained) == 4 and list(p.trained) == sorted(p.trained) for p in plans)
    counts = Counter(step for p in plans for step in p.trained)
    assert set(counts) == set(range(8)) and max(counts.values()) < 100 + 5 * 7.1  # its std
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"]) and method.weighting is None
    assert network_evals(plan, 1, 12) == (8 * 12, 16)  # 4 / 12 * 4 = 1.33 per sample


@pytest.mark.parametrize(("solver", "scale"), [("dpmpp_2m", 1.0), ("ode", 3.0)])
def test_it_equals_its_oracle(solver: Any, scale: float) -> None:
    method = small(solver=solver, clip_range=1e-4)
    policy, batch = neighbors(guidance_scale=scale), make_batch()
    network = policy.weights.network
    old = field(policy.sampler, copy.deepcopy(network), batch)
    plan = method.plan(0)
    rollout, trajectory = policy.rollout(batch, plan)
    sigmas, groups = trajectory.sigmas.tolist(), batch.group_id.tolist()
    shared, own = (
        list(sample_noise(batch.seed, ids, (2,), stream=stream, dtype=torch.float64))
        for ids, stream in ((batch.group_id, 1), (batch.sample_id, 0))
    )
    chains = credit_oracles.neighbor_chains(old, solver, sigmas, shared, own, 0.3)
    ends = torch.stack([chain[-1] for chain in chains])
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(ends))

    data, anchors = trajectory.decisions, trajectory.anchors.tolist()
    assert [groups[n] for n in anchors] == [g for g in sorted(set(groups)) for _ in range(2)]
    assert len(data.row) == 3 * 3 * 2 * 4 and trajectory.num_rows == 3 * 3 * 2
    drawn = two_rewards(len(batch))
    expected_advantages = credit_oracles.neighbor_advantages(drawn, groups, WEIGHTS, 0.8)
    advantages = method.advantage(scores(drawn), batch.group_id, None)
    torch.testing.assert_close(advantages, float64(expected_advantages), **CLOSE)
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = framework_loss(policy, trajectory, method, advantages)
        expected = credit_oracles.neighbor_loss(
            field(policy.sampler, network, batch), old, chains, groups, anchors, plan.trained,
            expected_advantages, sigmas=sigmas, temperature=0.5, clip=1e-4,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
        gradients = gradient(loss, network), gradient(expected, network)
        assert gradients[1].abs().max() > 1e-5
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert bound > 0.05 if moved else metrics["ratio_max_dev"].max() < 1e-12


def test_it_keeps_the_promises_of_a_policy() -> None:
    policy = neighbors(dtype=torch.float32)
    check_policy(policy, make_batch(), small().plan(0))
    # As in a preflight, a group may be cut: its candidates are those that are there.
    _, trajectory = policy.rollout(make_batch().select(torch.arange(7)), small().plan(0))
    data = trajectory.decisions
    assert Counter(data.row.tolist()) == {r: 4 if r % 4 < 2 else 3 for r in range(12)}
    new = policy.evaluate(trajectory, torch.arange(len(data.row))).log_prob
    assert (new - data.old_log_prob).abs().max() < 1e-6
    total = torch.zeros(12).index_add(0, data.row, new.detach().exp())
    torch.testing.assert_close(total, torch.ones(12))


def test_states_are_rounded_before_they_are_scored() -> None:
    policy = neighbors(dtype=torch.float32, storage_dtype=torch.bfloat16)
    _, trajectory = policy.rollout(make_batch(), small().plan(0))
    assert {x.dtype for x in trajectory.states.values()} == {torch.bfloat16}
    trained = trajectory.plan.trained
    assert trajectory.states.keys() == {i + k for i in trained for k in (0, 1)}
    data = trajectory.decisions
    new = policy.evaluate(trajectory, torch.arange(len(data.row))).log_prob
    assert (new - data.old_log_prob).abs().max() < 1e-5


def test_a_group_does_not_depend_on_the_rank_that_holds_it() -> None:
    plan, batch = small().plan(0), make_batch()
    whole, trajectory = neighbors().rollout(batch, plan)
    for rank in range(3):
        share = make_batch(rank=rank, world_size=3)
        part, mine = neighbors().rollout(share, plan)
        torch.testing.assert_close(part.images, whole.images[share.sample_id])
        theirs = trajectory.anchors[torch.isin(trajectory.anchors, share.sample_id)]
        assert torch.equal(share.sample_id[mine.anchors], theirs)


def test_every_member_of_a_group_is_as_often_an_anchor() -> None:
    batch = make_batch(groups=300)
    _, trajectory = neighbors(rollout_batch_size=2048).rollout(batch, small().plan(0))
    counts = Counter(batch.member[trajectory.anchors].tolist())
    # 2 of 4 in 300 groups: 150 each, with a std of sqrt(300 / 4) = 8.7.
    assert sum(counts.values()) == 600
    assert all(abs(counts[member] - 150) < 5 * 8.7 for member in range(4))


def test_the_network_is_evaluated_as_often_as_the_closed_form_says() -> None:
    policy, plan = neighbors(), small().plan(0)
    with counted(policy.weights.network) as count:
        rollout, trajectory = policy.rollout(make_batch(), plan)
    assert count.rows == rollout.network_evals == 5 * 12
    with counted(policy.training_network) as count:
        policy.evaluate(trajectory, torch.arange(len(trajectory.decisions.row)))
    assert (count.rows, count.calls) == (3 * 2 * 3, 1)
    assert network_evals(plan, 3, 4) == (60, 18)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_anchors": 13}, "num_anchors=13 of group_size=12"),
        ({"group_size": 1, "num_anchors": 1}, "use a group of 2 at least"),
        ({"num_anchors": 0}, "1 anchor to all of them"),
        ({"num_trained": 9}, "num_trained=9 must be 1 to num_steps=8"),
        ({"num_trained": 0}, "num_trained=0 must be"),
        ({"spread": 0.0}, r"spread=0.0 must be in \(0, 1\]"),
        ({"temperature": 0.0}, "temperature=0.0 positive"),
        ({"power": 2.0}, r"power=2.0 of the quasi-norm must be in \(0, 1\]"),
        ({"clip_range": 0.0}, "clip_range must be positive"),
    ],
)
def test_an_impossible_combination_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighbor_grpo(**args)
