"""ratios.py: ratios, their gradients, and exact silence under the mask.

Kills, among others: old minus new; the old log-prob not detached; mask applied after the arithmetic
(0 * nan); masked ratio 0 instead of 1; a sequence mean over all instead of the unmasked decisions.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowrl.functional.ratios import importance_ratio, log_ratio, sequence_ratio

ALL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    function.__name__: function for function in (log_ratio, importance_ratio, sequence_ratio)
}
NEW = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
OLD = torch.tensor([[-2.0, -2.5, -1.0], [-1.0, -3.0, -1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [False, False, False]])


def test_golden_ratios() -> None:
    # Differences 1 and .5; masked: 0, ratio 1. Row: exp((1 + .5) / 2), and 1 where nothing is left.
    assert log_ratio(NEW, OLD, MASK).tolist() == [[1, 0.5, 0], [0, 0, 0]]
    ratio = importance_ratio(NEW, OLD, MASK)
    assert ratio[0].tolist() == pytest.approx([math.e, math.exp(0.5), 1], rel=1e-15)
    assert ratio[1].tolist() == [1, 1, 1]
    assert sequence_ratio(NEW, OLD, MASK).tolist() == pytest.approx([math.exp(0.75), 1], rel=1e-15)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ALL)
def test_masked_decisions_are_silent_whatever_their_log_prob(name: str, bad: float) -> None:
    clean = NEW.clone().requires_grad_()
    poisoned = torch.where(MASK, NEW, bad).requires_grad_()
    value = ALL[name](poisoned, torch.where(MASK, OLD, bad), MASK)
    expected = ALL[name](clean, OLD, MASK)
    assert torch.equal(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), poisoned)
    assert (gradient[~MASK] == 0).all()
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), clean)[0])


@pytest.mark.parametrize("name", ALL)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(
        lambda new: ALL[name](new, OLD, MASK), NEW.clone().requires_grad_()
    )


def test_on_policy_the_gradient_of_the_ratio_is_that_of_the_log_prob() -> None:
    new = NEW.clone().requires_grad_()
    ratio = importance_ratio(new, new, torch.ones_like(MASK))
    (gradient,) = torch.autograd.grad(ratio.sum(), new)
    assert (ratio == 1).all()
    assert (gradient == 1).all()


@pytest.mark.parametrize("name", ALL)
def test_old_log_prob_gets_no_gradient(name: str) -> None:
    old = OLD.clone().requires_grad_()
    assert not ALL[name](NEW, old, MASK).requires_grad


def test_sequence_ratio_is_the_geometric_mean_of_the_ratios() -> None:
    mask = torch.ones_like(MASK)
    expected = importance_ratio(NEW, OLD, mask).prod(dim=1) ** (1 / 3)
    torch.testing.assert_close(sequence_ratio(NEW, OLD, mask), expected)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_is_computed_in_float32(name: str) -> None:
    new, old = (NEW + 0.1).bfloat16(), OLD.bfloat16()
    value = ALL[name](new, old, MASK)
    assert value.dtype == torch.float32
    assert torch.equal(value, ALL[name](new.float(), old.float(), MASK))


@pytest.mark.parametrize("name", ALL)
def test_bad_inputs_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"mask must be bool.*mask\.bool\(\)"):
        ALL[name](NEW, OLD, MASK.float())
    with pytest.raises(ValueError, match="old_log_prob must have the shape of mask"):
        ALL[name](NEW, OLD[:1], MASK)
    with pytest.raises(ValueError, match="log_prob must have the shape of mask"):
        ALL[name](NEW[:1], OLD[:1], MASK)


def test_sequence_ratio_needs_rows() -> None:
    with pytest.raises(ValueError, match=r"log_prob must be \[N, S\]"):
        sequence_ratio(NEW[0], OLD[0], MASK[0])
