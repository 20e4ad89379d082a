"""surrogates.py: the four corners of PPO's clip, its bound and its gradient.

Kills, among others: maximum for minimum; clip_low and clip_high swapped; no min at all (a clipped
bad move that cannot come back); an advantage [N] along the last dim. Of Flow-DPPO: a mask on the KL
alone, which also stops the way back; > for >=; good and bad swapped; a nan KL that masks.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional.surrogates import dppo, dppo_keep, ppo_clip


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_corners_with_unequal_clip_distances() -> None:
    # Low .2, high .4, so the band is [.8, 1.4]. Good (A = 2): at 2 held to 1.4 * 2, at .5 free.
    # Bad (A = -1): at .5 held to -.8, at 2 free.
    value = ppo_clip(f64(2, 0.5, 1.1, 0.5, 2, 1.1), f64(2, 2, 2, -1, -1, -1), 0.2, 0.4)
    assert value.tolist() == pytest.approx([2.8, 1, 2.2, -0.8, -2, -1.1], rel=1e-15)


def test_gradient_stops_beyond_the_clip_and_never_on_the_way_back() -> None:
    ratio = f64(2, 0.5, 1.1, 0.5, 2, 1.1).requires_grad_()
    ppo_clip(ratio, f64(2, 2, 2, -1, -1, -1), 0.2, 0.4).sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0, 2, 2, 0, -1, -1]


def test_on_policy_the_gradient_is_the_advantage_whatever_the_clip() -> None:
    ratio, advantage = torch.ones(3, dtype=torch.float64, requires_grad=True), f64(-2, 0, 3)
    for distance in (1e-6, 0.2):
        (gradient,) = torch.autograd.grad(
            ppo_clip(ratio, advantage, distance, distance).sum(), ratio
        )
        assert torch.equal(gradient, advantage)


@settings(max_examples=50, deadline=None)
@given(
    ratio=st.floats(0, 5),
    advantage=st.floats(-5, 5),
    low=st.floats(1e-6, 2),
    high=st.floats(1e-6, 2),
)
def test_it_is_a_lower_bound_of_the_unclipped_surrogate(
    ratio: float, advantage: float, low: float, high: float
) -> None:
    value = ppo_clip(f64(ratio), f64(advantage), low, high).item()
    assert value <= ratio * advantage
    if 1 - low <= ratio <= 1 + high:
        assert value == ratio * advantage


def test_a_rows_advantage_goes_to_its_row_also_when_the_tensor_is_square() -> None:
    ratio = torch.ones(2, 2, dtype=torch.float64)
    assert ppo_clip(ratio, f64(3, -1), 0.2, 0.2).tolist() == [[3, 3], [-1, -1]]


def test_advantage_gets_no_gradient() -> None:
    assert not ppo_clip(f64(1), f64(1).requires_grad_(), 0.2, 0.2).requires_grad


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (0.2, 0.0), (-0.2, 0.2), (0.2, -0.2)])
def test_clip_distances_that_are_not_positive_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="positive distances from 1"):
        ppo_clip(f64(1), f64(1), low, high)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"advantage must be a number, \[B\]"):
        ppo_clip(torch.ones(2, 3), torch.ones(3), 0.2, 0.2)


# ratio, advantage and kl: good up, good down, bad up, bad down, each inside and outside .5.
RATIO = f64(2, 0.5, 2, 0.5, 2, 0.5, 2, 0.5)
ADVANTAGE = f64(3, 3, -3, -3, 3, 3, -3, -3)
KL = f64(0.4, 0.4, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5)


def test_golden_dppo_masks_only_what_is_outside_and_moves_away() -> None:
    # At the threshold itself: outside. Good and up, bad and down move away.
    keep = dppo_keep(RATIO, ADVANTAGE, KL, 0.5)
    assert keep.tolist() == [True] * 4 + [False, True, True, False]
    value = dppo(RATIO, ADVANTAGE, KL, 0.5)
    assert value.tolist() == [6, 1.5, -6, -1.5, 0, 1.5, -6, 0]


def test_dppo_has_the_gradient_of_the_advantage_where_kept_and_exactly_none_elsewhere() -> None:
    ratio, kl = RATIO.clone().requires_grad_(), KL.clone().requires_grad_()
    dppo(ratio, ADVANTAGE, kl, 0.5).sum().backward()
    assert ratio.grad is not None and kl.grad is None
    assert ratio.grad.tolist() == [3, 3, -3, -3, 0, 3, -3, 0]


def test_dppo_keeps_an_unmoved_decision_and_one_without_a_density() -> None:
    assert dppo_keep(f64(1, 2), f64(3, 3), f64(9, torch.nan), 0.5).tolist() == [True, True]


def test_dppo_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="threshold must be positive"):
        dppo(RATIO, ADVANTAGE, KL, 0.0)
    with pytest.raises(ValueError, match="kl must have the shape of ratio"):
        dppo(RATIO, ADVANTAGE, KL[:3], 0.5)
