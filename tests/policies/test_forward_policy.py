"""forward.py: the points of training are functions of the sample, and the rest follows from it.

Kills, among others: noise drawn by position, chunk or rank; a draw's noise used for another; draws
shared where they should not be, or not shared where they should; a unit torn apart; the starting
noise used again; sigma of another row; the wrong parameter set in the rollout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.data.noise import sample_noise
from flowrl.functional.sigma_draws import logit_normal_sigma, schedule_steps, uniform_sigma
from flowrl.methods.forward_plan import ForwardPlan
from flowrl.policies.forward import ForwardTrajectory
from flowrl.protocols import Trajectory
from tests.policies.toy_flow import GROUPS, SIZE, counted, make_batch, perturb
from tests.policies.toy_forward import make_forward_policy


def make_plan(**changed: Any) -> ForwardPlan:
    defaults = {"num_steps": 4, "num_draws": 3, "sigma_draw": logit_normal_sigma}
    return ForwardPlan(**{**defaults, **changed})


def roll(plan: ForwardPlan, **batch: int) -> ForwardTrajectory:
    return make_forward_policy().rollout(make_batch(**batch), plan)[1]


def everything(trajectory: ForwardTrajectory) -> tuple[Tensor, Tensor, Tensor]:
    return trajectory.points(torch.arange(trajectory.num_rows))


@pytest.mark.parametrize("shares", [False, True])
def test_every_sample_has_a_decision_per_draw_and_units_are_neighbours(shares: bool) -> None:
    trajectory: Trajectory = roll(make_plan(shares_draws=shares))
    data = trajectory.decisions
    num = GROUPS * SIZE * 3
    assert trajectory.num_rows == num == len(data.row)
    assert torch.equal(data.row, torch.arange(num))
    assert torch.bincount(data.sample).tolist() == [3] * GROUPS * SIZE
    assert data.mask.all() and (data.old_log_prob == 0).all() and data.sigma_next.isnan().all()
    unit = trajectory.unit
    assert (unit.diff() >= 0).all()
    assert torch.unique(unit, return_counts=True)[1].tolist() == (
        [SIZE] * GROUPS * 3 if shares else [1] * num
    )


@pytest.mark.parametrize("shares", [False, True])
def test_noise_and_sigma_are_one_per_unit_and_differ_between_units(shares: bool) -> None:
    trajectory = roll(make_plan(shares_draws=shares))
    _, x1, sigma = everything(trajectory)
    both = torch.cat([x1, sigma[:, None]], dim=1)
    for unit in trajectory.unit.unique():
        mine = both[trajectory.unit == unit]
        assert (mine == mine[0]).all()
    assert len(both.unique(dim=0)) == len(trajectory.unit.unique())
    group = trajectory.batch.group_id[trajectory.decisions.sample]
    units_of_group = [trajectory.unit[group == g].unique().tolist() for g in group.unique()]
    assert len({u for units in units_of_group for u in units}) == sum(map(len, units_of_group))


@pytest.mark.parametrize("shares", [False, True])
def test_points_do_not_depend_on_the_chunk_or_the_rank(shares: bool) -> None:
    plan = make_plan(shares_draws=shares)
    whole = roll(plan, groups=4)
    expected = everything(whole)
    index = torch.tensor([17, 3, 30, 4])
    for part, full in zip(whole.points(index), expected, strict=True):
        assert torch.equal(part, full[index])
    parts = [roll(plan, groups=4, rank=rank, world_size=2) for rank in range(2)]
    for full, *halves in zip(expected, *map(everything, parts), strict=True):
        assert torch.equal(torch.cat(halves), full)


def test_noise_is_standard_normal_and_not_the_starting_noise() -> None:
    trajectory = roll(make_plan(num_draws=200))
    _, x1, _ = everything(trajectory)
    assert x1.mean().item() == pytest.approx(0, abs=0.07)
    assert x1.std().item() == pytest.approx(1, abs=0.05)
    batch = trajectory.batch
    start = sample_noise(batch.seed, batch.sample_id, (2,), stream=0, dtype=torch.float64)
    assert not torch.isin(x1, start).any()


def test_stratified_draws_of_the_schedule_visit_every_step_of_the_sampler_once() -> None:
    draw = partial(schedule_steps, fraction=0.99)
    trajectory = roll(make_plan(num_steps=10, num_draws=9, sigma_draw=draw))
    data = trajectory.decisions
    for sample in range(GROUPS * SIZE):
        mine = data.sigma[data.sample == sample]
        assert torch.equal(mine.sort(descending=True).values, trajectory.sigmas[:9])


def test_draws_are_independent_unless_stratified() -> None:
    for is_stratified in (True, False):
        plan = make_plan(
            num_draws=8, sigma_draw=uniform_sigma, is_stratified=is_stratified, shares_draws=True
        )
        trajectory = roll(plan)
        parts = (trajectory.decisions.sigma[trajectory.decisions.sample == 0] * 8).floor()
        assert (len(parts.unique()) == 8) == is_stratified


def test_evaluation_sees_the_points_of_the_trajectory_in_one_forward() -> None:
    policy, batch = make_forward_policy(), make_batch()
    _, trajectory = policy.rollout(batch, make_plan())
    index = torch.tensor([5, 2, 33])
    with counted(policy.weights.network) as count:
        seen = policy.evaluate(trajectory, index)
    assert (count.calls, count.rows) == (1, 3)
    x0, x1, sigma = trajectory.points(index)
    assert torch.equal(seen.x0, trajectory.x0[trajectory.decisions.sample[index]])
    level = sigma[:, None]
    torch.testing.assert_close(seen.x_t, (1 - level) * x0 + level * x1)
    torch.testing.assert_close(seen.target, x1 - x0)
    assert torch.equal(seen.unit, trajectory.unit[index])
    for place, i in enumerate(index.tolist()):
        sample = trajectory.decisions.sample[i : i + 1]
        alone = policy.sampler.velocity(
            batch, seen.x_t[place][None], sigma[place : place + 1], sample
        )
        torch.testing.assert_close(seen.velocity[place], alone[0])
    assert seen.velocity.requires_grad


def test_the_plan_names_the_set_that_draws() -> None:
    policy, batch = make_forward_policy(), make_batch()
    before = policy.rollout(batch, make_plan())[1].x0
    perturb(policy.weights.network, 0.1, seed=4)
    current = policy.rollout(batch, make_plan())[1].x0
    assert not torch.equal(current, before)
    assert torch.equal(policy.rollout(batch, make_plan(rollout_with="old"))[1].x0, before)
    assert torch.equal(policy.rollout(batch, make_plan())[1].x0, current)


def test_latents_in_bfloat16_are_trained_in_float32() -> None:
    trajectory = roll(make_plan())
    small = ForwardTrajectory(
        trajectory.batch, trajectory.plan, trajectory.sigmas, trajectory.x0.bfloat16()
    )
    assert all(part.dtype == torch.float32 for part in everything(small))


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"num_draws": 0}, {"rollout_with": "reference"}]
)
def test_plans_that_cannot_be_run_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_plan(**wrong)
