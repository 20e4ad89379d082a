"""flow.py: the straight path, its inversions and the two schedules.

Kills, among others: sigma and 1 - sigma swapped; velocity negated; a per-row sigma that broadcasts
along the last dim; a single instead of a double shift; the terminal 0 missing.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.functional.flow import (
    diffusers_schedule,
    interpolate,
    linear_schedule,
    predict_x0,
    predict_x1,
    shift_sigmas,
    velocity_target,
)

X0 = torch.tensor([[2.0]], dtype=torch.float64)
X1 = torch.tensor([[-1.0]], dtype=torch.float64)


def random_pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x0, torch.randn(shape, dtype=torch.float64, generator=generator)


def test_golden_numbers_of_the_straight_path() -> None:
    # x_t = .75 * 2 + .25 * (-1) = 1.25; velocity = -1 - 2 = -3;
    # x0 = 1.25 - .25 * (-3) = 2; x1 = 1.25 + .75 * (-3) = -1.
    x_t, velocity = interpolate(X0, X1, 0.25), velocity_target(X0, X1)
    assert (x_t.item(), velocity.item()) == (1.25, -3.0)
    assert predict_x0(x_t, velocity, 0.25).item() == 2.0
    assert predict_x1(x_t, velocity, 0.25).item() == -1.0


def test_path_starts_at_data_and_ends_at_noise_exactly() -> None:
    x0, x1 = random_pair(2, 3)
    assert torch.equal(interpolate(x0, x1, 0.0), x0)
    assert torch.equal(interpolate(x0, x1, 1.0), x1)


@settings(max_examples=50, deadline=None)
@given(x0=st.floats(-10, 10), x1=st.floats(-10, 10), sigma=st.floats(0, 1))
def test_predictions_invert_the_path(x0: float, x1: float, sigma: float) -> None:
    data, noise = X0.new_tensor([[x0]]), X0.new_tensor([[x1]])
    x_t, velocity = interpolate(data, noise, sigma), velocity_target(data, noise)
    torch.testing.assert_close(predict_x0(x_t, velocity, sigma), data, rtol=0, atol=1e-13)
    torch.testing.assert_close(predict_x1(x_t, velocity, sigma), noise, rtol=0, atol=1e-13)


def test_velocity_is_the_derivative_of_the_path_by_sigma() -> None:
    x0, x1 = random_pair(2, 3)
    sigma = torch.tensor(0.3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda s: interpolate(x0, x1, s), sigma)
    torch.testing.assert_close(slope, velocity_target(x0, x1))


def test_one_sigma_per_row_goes_to_its_row_also_when_the_tensor_is_square() -> None:
    x0, x1 = random_pair(3, 3, 3)
    sigmas = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows = [interpolate(x0[i], x1[i], sigmas[i]) for i in range(3)]
    assert torch.equal(interpolate(x0, x1, sigmas), torch.stack(rows))
    assert torch.equal(interpolate(x0, x1, sigmas.view(3, 1, 1)), torch.stack(rows))


def test_bfloat16_is_computed_in_float32() -> None:
    x0, x1 = (x.bfloat16() for x in random_pair(2, 3))
    x_t = interpolate(x0, x1, 0.9601)
    assert x_t.dtype == velocity_target(x0, x1).dtype == torch.float32
    torch.testing.assert_close(x_t, interpolate(x0.float(), x1.float(), 0.9601), rtol=0, atol=0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    x0, x1 = random_pair(2, 3)
    with pytest.raises(ValueError, match=r"x1 must have the shape of x0, \[2, 3\]"):
        interpolate(x0, x1[:1], 0.5)
    with pytest.raises(ValueError, match="velocity must have the shape of x_t"):
        predict_x0(x0, x1[:, :1], 0.5)
    with pytest.raises(ValueError, match="velocity must have the shape of x_t"):
        predict_x1(x0, x1[:, :1], 0.5)
    with pytest.raises(ValueError, match=r"sigma must be a number, \[B\]"):
        interpolate(x0, x1, torch.full((3,), 0.5))


def test_shift_golden_and_fixed_points() -> None:
    # 3 * .5 / (1 + 2 * .5) = .75
    sigmas = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert shift_sigmas(sigmas, 3.0).tolist() == [0.0, 0.75, 1.0]
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


def test_shifts_compose_by_multiplication() -> None:
    sigmas = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(
        shift_sigmas(shift_sigmas(sigmas, 2.0), 1.5), shift_sigmas(sigmas, 3.0)
    )


def test_linear_schedule_golden() -> None:
    # shift 3 of 1, .9, ..., 0, for example 3 * .9 / 2.8 = .9643
    expected = [1, 0.9643, 0.9231, 0.875, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0]
    schedule = linear_schedule(10, shift=3.0)
    assert schedule.dtype == torch.float32
    assert schedule.tolist() == pytest.approx(expected, abs=5e-5)
    assert linear_schedule(16, shift=3.0)[-2].item() == pytest.approx(1 / 6)
    assert linear_schedule(25, shift=3.0)[-2].item() == pytest.approx(1 / 9)


def test_diffusers_schedule_golden() -> None:
    # Measured with diffusers 0.42.1, SD3.5, ten steps.
    expected = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert diffusers_schedule(10).tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 40])
def test_diffusers_schedule_is_that_of_diffusers(num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    ours = diffusers_schedule(num_steps, shift=shift)
    assert ours.dtype == scheduler.sigmas.dtype
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=2e-7)


@settings(max_examples=30, deadline=None)
@given(num_steps=st.integers(1, 60), shift=st.floats(0.2, 10))
def test_schedules_descend_from_one_to_zero(num_steps: int, shift: float) -> None:
    for schedule in (
        linear_schedule(num_steps, shift=shift),
        diffusers_schedule(num_steps, shift=shift),
    ):
        assert schedule.shape == (num_steps + 1,)
        assert (schedule[0].item(), schedule[-1].item()) == (1.0, 0.0)
        assert (schedule.diff() < 0).all()


@pytest.mark.parametrize("schedule", [linear_schedule, diffusers_schedule])
def test_schedules_refuse_no_steps_and_a_shift_that_is_not_positive(
    schedule: Callable[..., torch.Tensor],
) -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, but is 0"):
        schedule(0)
    with pytest.raises(ValueError, match="shift must be positive"):
        schedule(4, shift=0.0)
