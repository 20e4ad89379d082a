"""solvers.py: golden numbers and limits of dpmpp_2m (its order: test_gaussian_flow.py).

Kills, among others: h / previous_h inverted; the factor 1/2 missing; order 2 on the last step; nan
at sigma = 1 or sigma_next = 0; the extrapolated x0 returned as history.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional.sde import ode
from flowrl.functional.solvers import dpmpp_2m, resampled


def scalar(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_golden_second_order_step() -> None:
    # sigmas .8, .5, .2 have log-SNR -log 4, 0, log 4: h = previous_h, D = x0 + (x0 - previous_x0) /
    # 2. x_t = 1, velocity = .5: x0 = .75, previous_x0 = .25, D = 1; .4 * 1 + .6 * 1 = 1.
    x_next, x0 = dpmpp_2m(
        scalar(1.0), scalar(0.5), 0.5, 0.2, previous_x0=scalar(0.25), previous_sigma=0.8
    )
    assert (x_next.item(), x0.item()) == pytest.approx((1.0, 0.75), abs=1e-15)


def test_golden_second_order_step_with_unequal_log_snr() -> None:
    # sigmas .9, .5, .25: previous_h = log 9 = 2 log 3, h = log 3, D = x0 + (x0 - previous_x0) / 4
    # = .75 + .125 = .875; .5 * 1 + .5 * .875 = .9375.
    x_next, _ = dpmpp_2m(
        scalar(1.0), scalar(0.5), 0.5, 0.25, previous_x0=scalar(0.25), previous_sigma=0.9
    )
    assert x_next.item() == pytest.approx(0.9375, abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0.01, 1), fraction=st.floats(0, 1), seed=st.integers(0, 99))
def test_without_history_it_is_eulers_step(sigma: float, fraction: float, seed: int) -> None:
    x_t, velocity = random(2, 3, seed=seed), random(2, 3, seed=seed + 100)
    x_next, x0 = dpmpp_2m(x_t, velocity, sigma, sigma * fraction)
    torch.testing.assert_close(x_next, ode(x_t, velocity, sigma, sigma * fraction)[0])
    torch.testing.assert_close(x0, x_t - sigma * velocity)


def test_it_agrees_with_the_papers_exponential_form() -> None:
    x_t, velocity, previous_x0 = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    lam = torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64).neg().log1p()
    lam = lam - torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64).log()
    previous_h, h = lam.diff()
    x0 = x_t - 0.7 * velocity
    target = x0 + (x0 - previous_x0) / (2 * previous_h / h)
    expected = 0.4 / 0.7 * x_t - (1 - 0.4) * torch.expm1(-h) * target
    x_next, _ = dpmpp_2m(x_t, velocity, 0.7, 0.4, previous_x0=previous_x0, previous_sigma=0.9)
    torch.testing.assert_close(x_next, expected)


def test_last_step_lands_on_x0_whatever_the_history() -> None:
    x_t, velocity, previous_x0 = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    for previous_sigma in (1.0, 0.5):
        x_next, x0 = dpmpp_2m(
            x_t, velocity, 0.25, 0.0, previous_x0=previous_x0, previous_sigma=previous_sigma
        )
        assert torch.equal(x_next, x0)
        assert torch.equal(x0, x_t - 0.25 * velocity)


def test_history_from_pure_noise_is_infinitely_far_and_ignored() -> None:
    x_t, velocity, previous_x0 = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    x_next, _ = dpmpp_2m(x_t, velocity, 0.9, 0.8, previous_x0=previous_x0, previous_sigma=1.0)
    assert torch.equal(x_next, dpmpp_2m(x_t, velocity, 0.9, 0.8)[0])


def test_per_row_sigmas_give_the_rows_of_separate_calls() -> None:
    x_t, velocity, previous_x0 = random(3, 3), random(3, 3, seed=1), random(3, 3, seed=2)
    before, now, after = torch.tensor([[1, 0.9, 0.6], [0.8, 0.5, 0.3], [0.5, 0.2, 0]]).double()
    x_next, _ = dpmpp_2m(x_t, velocity, now, after, previous_x0=previous_x0, previous_sigma=before)
    for i in range(3):
        row = slice(i, i + 1)
        alone, _ = dpmpp_2m(
            x_t[row],
            velocity[row],
            now[i].item(),
            after[i].item(),
            previous_x0=previous_x0[row],
            previous_sigma=before[i].item(),
        )
        assert torch.equal(x_next[row], alone)


def test_half_a_history_and_shapes_that_do_not_fit_are_refused() -> None:
    x_t = random(2, 3)
    with pytest.raises(ValueError, match="come together"):
        dpmpp_2m(x_t, x_t, 0.5, 0.2, previous_x0=x_t)
    with pytest.raises(ValueError, match="come together"):
        dpmpp_2m(x_t, x_t, 0.5, 0.2, previous_sigma=0.8)
    with pytest.raises(ValueError, match="previous_x0 must have the shape of x_t"):
        dpmpp_2m(x_t, x_t, 0.5, 0.2, previous_x0=x_t[:1], previous_sigma=0.8)
    with pytest.raises(ValueError, match="velocity must have the shape of x_t"):
        dpmpp_2m(x_t, x_t[:1], 0.5, 0.2)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [10, 25])
def test_resampling_is_a_linspace_in_unshifted_time(shift: float, num_steps: int) -> None:
    def shifted(u: torch.Tensor) -> torch.Tensor:
        return shift * u / (1 + (shift - 1) * u)

    sigmas = shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))
    for first in range(num_steps):
        for count in {1, (num_steps - first + 1) // 2, num_steps - first}:
            u = torch.linspace(1 - first / num_steps, 0, count + 1, dtype=torch.float64)
            points = resampled(sigmas, first, count)
            torch.testing.assert_close(points, shifted(u), rtol=0, atol=1e-12)
            assert points[0] == sigmas[first] and points[-1] == 0


def test_resampling_follows_a_schedule_with_another_end() -> None:
    sd3 = torch.tensor(
        [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.278, 0.0089, 0]
    )
    for first in range(10):
        for count in range(1, 11 - first):
            points = resampled(sd3, first, count)
            assert (points.diff() < 0).all() and points[0] == sd3[first] and points[-1] == 0
        torch.testing.assert_close(resampled(sd3, first, 10 - first), sd3[first:])
    for first, count in ((10, 1), (-1, 1), (3, 0), (3, 8)):
        with pytest.raises(ValueError, match="first must be in"):
            resampled(sd3, first, count)
