"""matching.py: errors, NFT's two losses and AWM's weightings: golden numbers, optima, gradients.

Kills, among others: v+ and v- swapped; optimality and its complement swapped; mix forgotten in one
of them; the adaptive weight not detached, or squared; x0's error without sigma; a sum over dims; a
gradient through old, target or optimality; a weighting without its sigma.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional import matching
from flowrl.functional.flow import interpolate, velocity_target
from flowrl.functional.matching import (
    Matching,
    matching_error,
    matching_log_prob,
    nft,
    nft_of_published_code,
    nft_velocities,
    optimality,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


X0, X1, OLD, V = (random(3, 2, 2, seed=seed) for seed in range(4))
SIGMA, OPTIMAL = f64(0.9, 0.5, 0.2), f64(1.0, 0.25, 0.0)
X_T, TARGET = interpolate(X0, X1, SIGMA), velocity_target(X0, X1)


def test_golden_matching_error_and_its_parts() -> None:
    # x0 = (1, 1), x1 = (3, -1), sigma = .25: x_t = (1.5, .5), target (2, -2); v = (1, 0): 5 / 2.
    seen = Matching(
        f64(1, 0)[None], f64(1, 1)[None], f64(3, -1)[None], f64(0.25), torch.tensor([0])
    )
    assert seen.x_t.tolist() == [[1.5, 0.5]]
    assert seen.target.tolist() == [[2, -2]]
    assert seen.error.tolist() == [2.5]


def test_optimality_golden() -> None:
    assert optimality(f64(-9, -5, 0, 2.5, 5, 9), 5.0).tolist() == [0, 0, 0.5, 0.75, 1, 1]
    assert not optimality(f64(1).requires_grad_(), 5.0).requires_grad
    with pytest.raises(ValueError, match="limit must be positive"):
        optimality(f64(1), 0.0)


def test_golden_nft() -> None:
    # v = 3, old = 1, mix .5: v+ = 2, v- = 0; target 4: errors 4 and 16; .75 * 4 + .25 * 16 = 7.
    value = nft(f64(3)[:, None], f64(1)[:, None], f64(4)[:, None], f64(0.75), 0.5)
    assert value.tolist() == [7]


def test_golden_nft_of_published_code() -> None:
    # x_t = 2, x0 = 0, sigma = .5: x0+ = 2 - .5 * 2 = 1, x0- = 2; errors 1 and 4 over |.| 1 and 2:
    # 1 and 2; (.75 * 1 + .25 * 2) / .5 = 2.5.
    one = [each[:, None] for each in (f64(3), f64(1), f64(2), f64(0))]
    assert nft_of_published_code(*one, f64(0.5), f64(0.75), 0.5).tolist() == [2.5]


@given(optimal=st.floats(0, 1), mix=st.floats(0.1, 2))
def test_nft_has_its_minimum_where_the_docstring_says(optimal: float, mix: float) -> None:
    best = OLD + (2 * optimal - 1) / mix * (TARGET - OLD)
    best.requires_grad_()
    loss = nft(best, OLD, TARGET, f64(*[optimal] * 3), mix).sum()
    (gradient,) = torch.autograd.grad(loss, best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_nft_of_a_certainly_good_sample_at_mix_1_is_flow_matching() -> None:
    torch.testing.assert_close(
        nft(V, OLD, TARGET, torch.ones(3).double(), 1.0), matching_error(V, TARGET)
    )


@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_at_the_old_policy_an_average_sample_teaches_nothing(mix: float) -> None:
    half = torch.full((3,), 0.5, dtype=torch.float64)
    for loss in (
        lambda v: nft(v, OLD, TARGET, half, mix),
        lambda v: nft_of_published_code(v, OLD, X_T, X0, SIGMA, half, mix),
    ):
        velocity = OLD.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(velocity).sum(), velocity)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_the_first_gradient_of_the_code_does_not_depend_on_mix_and_that_of_the_paper_does() -> None:
    def first(loss: Callable[[Tensor], Tensor]) -> Tensor:
        velocity = OLD.clone().requires_grad_()
        return torch.autograd.grad(loss(velocity).sum(), velocity)[0]

    code = [
        first(lambda v: nft_of_published_code(v, OLD, X_T, X0, SIGMA, OPTIMAL, mix))  # noqa: B023
        for mix in (0.1, 1.0)
    ]
    paper = [first(lambda v: nft(v, OLD, TARGET, OPTIMAL, mix)) for mix in (0.1, 1.0)]  # noqa: B023
    torch.testing.assert_close(code[0], code[1])
    torch.testing.assert_close(10 * paper[0], paper[1])


def test_the_codes_error_is_sigma_squared_times_the_velocitys_over_its_deviation() -> None:
    # x_t - sigma * v - x0 = sigma * (target - v).
    ones, step = torch.ones(3).double(), TARGET - V
    deviation = SIGMA * step.abs().mean(dim=(1, 2))
    expected = SIGMA**2 * matching_error(V, TARGET) / deviation
    torch.testing.assert_close(nft_of_published_code(V, OLD, X_T, X0, SIGMA, ones, 1.0), expected)


def test_nft_gradients_agree_with_finite_differences() -> None:
    assert torch.autograd.gradcheck(
        lambda v: nft(v, OLD, TARGET, OPTIMAL, 0.3), (V.clone().requires_grad_(),)
    )


def test_the_codes_gradient_treats_the_adaptive_weight_as_data() -> None:
    velocity = V.clone().requires_grad_()
    loss = nft_of_published_code(velocity, OLD, X_T, X0, SIGMA, OPTIMAL, 0.3)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    expected = torch.zeros_like(V)
    for sign, share in ((1, OPTIMAL), (-1, 1 - OPTIMAL)):
        implicit = OLD + sign * 0.3 * (V - OLD)
        miss = X_T - SIGMA[:, None, None] * implicit - X0
        weight = miss.abs().mean(dim=(1, 2), keepdim=True)
        slope = -2 * sign * 0.3 * SIGMA[:, None, None] * miss / 4 / weight
        expected += share[:, None, None] * slope / 0.3
    torch.testing.assert_close(gradient, expected)


def test_a_perfect_prediction_divides_by_the_floor_not_by_zero() -> None:
    ones = torch.ones(3).double()
    value = nft_of_published_code(TARGET, TARGET, X_T, X0, SIGMA, ones, 1.0)
    assert (value < 1e-20).all()


def test_nothing_but_the_velocity_gets_a_gradient() -> None:
    old, target, optimal = (x.clone().requires_grad_() for x in (OLD, TARGET, OPTIMAL))
    assert not nft(V, old, target, optimal, 0.5).requires_grad
    assert not nft_of_published_code(V, old, X_T, X0, SIGMA, optimal, 0.5).requires_grad
    assert not matching_error(V, target).requires_grad


def test_mirrored_velocities() -> None:
    good, bad = nft_velocities(V, OLD, 0.3)
    torch.testing.assert_close(good, 0.3 * V + 0.7 * OLD)
    torch.testing.assert_close(bad, 1.3 * OLD - 0.3 * V)


WEIGHTINGS = {
    # error 4, sigma .5; ghuber at .5: (4^.5 - 1e-5) / .5 * .5.
    "plain": (matching.plain, 4.0),
    "times_sigma": (matching.times_sigma, 2.0),
    "times_sigma_squared": (matching.times_sigma_squared, 1.0),
    "huber": (matching.huber, 0.5 * (2 - 1e-5)),
    "general_huber": (lambda e, s: matching.general_huber(e, s, power=0.5), 2 - 1e-5),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_golden_weightings(name: str) -> None:
    weighting, expected = WEIGHTINGS[name]
    value = matching_log_prob(f64(4), f64(0.5), weighting)
    assert value.item() == pytest.approx(-expected, abs=1e-9)
    # Nothing left to fit is likeliest, and the less likely the larger the error.
    best, worse = matching_log_prob(f64(0, 5), f64(0.5, 0.5), weighting).tolist()
    assert best == pytest.approx(0, abs=1e-14) and worse < value.item()
    error = f64(0.3, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda e: matching_log_prob(e, f64(0.7, 0.2), weighting), (error,)
    )


def test_bfloat16_velocities_are_compared_in_float32() -> None:
    error = matching_error(V.bfloat16(), TARGET.bfloat16())
    assert error.dtype == torch.float32
    torch.testing.assert_close(
        error, matching_error(V.bfloat16().float(), TARGET.bfloat16().float())
    )


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="target must have the shape of velocity"):
        matching_error(V, TARGET[:1])
    with pytest.raises(ValueError, match="mix must be positive"):
        nft(V, OLD, TARGET, OPTIMAL, 0.0)
    with pytest.raises(ValueError, match="old_velocity must have the shape of velocity"):
        nft(V, OLD[:1], TARGET, OPTIMAL, 1.0)
    with pytest.raises(ValueError, match="optimal must have the shape of error"):
        nft(V, OLD, TARGET, OPTIMAL[:1], 1.0)
    with pytest.raises(ValueError, match="sigma must have the shape of error"):
        matching_log_prob(f64(1, 2), f64(0.5), matching.plain)
    with pytest.raises(ValueError, match="power must be positive"):
        matching.general_huber(f64(1), f64(1), power=0.0)
