"""sigma_draws.py: the distributions of sigma, by their closed forms, and the strata.

Kills, among others: a schedule's terminal 0 drawn; the first step lost; strata that overlap; a
shift before the range; a normal instead of its sigmoid.
"""

import pytest
import torch
from torch import Tensor

from flowrl.functional.flow import linear_schedule, shift_sigmas
from flowrl.functional.sigma_draws import (
    logit_normal_sigma,
    schedule_steps,
    stratified,
    uniform_sigma,
)

SCHEDULE = linear_schedule(10)


def grid(num: int) -> Tensor:
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def test_stratified_puts_one_number_in_every_part() -> None:
    uniform = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    parts = (stratified(uniform) * 7).floor()
    assert (parts == torch.arange(7)).all()
    assert stratified(torch.tensor([[0.5, 0.0]])).tolist() == [[0.25, 0.5]]


def test_uniform_sigma_fills_its_range_and_is_shifted_afterwards() -> None:
    value = uniform_sigma(grid(1000), SCHEDULE, low=0.2, high=0.8)
    assert value.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert value.aminmax().min.item() == pytest.approx(0.2003, abs=1e-6)
    shifted = uniform_sigma(grid(9), SCHEDULE, low=0.2, high=0.8, shift=3.0)
    torch.testing.assert_close(
        shifted, shift_sigmas(0.2 + 0.6 * grid(9), 3.0).float(), rtol=1e-6, atol=0
    )


def test_logit_normal_sigma_has_the_moments_of_its_logit() -> None:
    logit = torch.logit(logit_normal_sigma(grid(20_000), SCHEDULE, mean=0.5, std=0.7).double())
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert logit.std().item() == pytest.approx(0.7, abs=1e-3)
    # The median is the sigmoid of the mean; shift 3 takes 1/2 to 3/4.
    half = torch.tensor([0.5])
    assert logit_normal_sigma(half, SCHEDULE).item() == 0.5
    assert logit_normal_sigma(half, SCHEDULE, shift=3.0).item() == 0.75
    edges = logit_normal_sigma(torch.tensor([0.0, 1.0]), SCHEDULE, floor=0.01)
    assert edges[0].item() == pytest.approx(0.01) and 0.99 < edges[1].item() < 1


@pytest.mark.parametrize("num_steps", [2, 10, 49])
def test_as_many_stratified_draws_as_steps_visit_each_step_once(num_steps: int) -> None:
    schedule = linear_schedule(num_steps, shift=3.0)
    for edge in (0.0, 0.5, 1 - 2**-24):
        uniform = stratified(torch.full((num_steps,), edge))
        assert torch.equal(schedule_steps(uniform, schedule), schedule[:-1])


def test_golden_schedule_steps() -> None:
    # NFT: int(10 * .99) = 9 steps, sigmas 1 to .2. AWM: steps 1 to int(10 * .9) - 1 = 8.
    for first, fraction, low, high in ((0, 0.99, 0.2, 1.0), (1, 0.9, 0.2, 0.9)):
        value = schedule_steps(grid(1000), SCHEDULE, first=first, fraction=fraction)
        assert value.max().item() == pytest.approx(high)
        assert value.min().item() == pytest.approx(low)
    assert 0 not in schedule_steps(torch.tensor([0.0, 1 - 2**-24]), SCHEDULE)


def test_nonsense_is_refused() -> None:
    for low, high in ((0.5, 0.5), (-0.1, 1), (0, 1.1)):
        with pytest.raises(ValueError, match="low < high"):
            uniform_sigma(grid(2), SCHEDULE, low=low, high=high)
    with pytest.raises(ValueError, match="std must be positive"):
        logit_normal_sigma(grid(2), SCHEDULE, std=0.0)
    for first, fraction in ((10, 1.0), (0, 0.05), (-1, 1.0)):
        with pytest.raises(ValueError, match="leave no step of 10"):
            schedule_steps(grid(2), SCHEDULE, first=first, fraction=fraction)
