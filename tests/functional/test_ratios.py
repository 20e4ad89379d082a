"""ratios.py: ratios, their gradients, and exact silence under the mask.

Kills, among others: old minus new; the old log-prob not detached; mask applied after the arithmetic
(0 * nan); masked ratio 0 instead of 1; a sequence mean over all instead of the unmasked decisions;
a bias subtracted instead of added, without its 1/2, or of the whole batch; std left out of it.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowrl.functional.ratios import importance_ratio, log_ratio, ratio_norm, sequence_ratio
from flowrl.functional.sde import gaussian_log_prob

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


def guard_inputs(std: float, num: int = 20_000) -> tuple[Tensor, ...]:
    """(log-ratio, mean, old mean, mask) of actions drawn from N(old mean, std^2), 4 dims each."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(num, 4, dtype=torch.float64, generator=generator)
    old_mean = torch.zeros(num, 4, dtype=torch.float64)
    mean = old_mean + torch.tensor([0.3, -0.1, 0.2, 0.0], dtype=torch.float64)
    action = old_mean + std * noise
    mask = torch.ones(num, dtype=torch.bool)
    new, old = (gaussian_log_prob(action, center, std) for center in (mean, old_mean))
    return log_ratio(new, old, mask), mean, old_mean, mask


def test_golden_ratio_norm() -> None:
    # d = (1, 3): mean square 5, std 2: bias 5 / 8; 2 * (-.5 + .625). Second row: d = 0, 2 * .25.
    mean = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    change = torch.tensor([-0.5, 0.25], dtype=torch.float64)
    value = ratio_norm(change, mean, torch.zeros_like(mean), 2.0, torch.tensor([True, True]))
    assert value.tolist() == pytest.approx([0.25, 0.5], rel=1e-15)


def test_ratio_norm_is_centred_and_equally_wide_at_every_std_where_the_log_ratio_drifts() -> None:
    # mean(d^2) = .035: the log-ratio drifts by -.035 / (2 std^2); its variance is .035 / 4 / std^2,
    # the normalised one's .035 / 4.
    for std in (0.03, 0.1, 0.3):
        change, mean, old_mean, mask = guard_inputs(std)
        normed = ratio_norm(change, mean, old_mean, std, mask)
        assert change.mean().item() == pytest.approx(-0.0175 / std**2, rel=0.05)
        assert normed.mean().item() == pytest.approx(0, abs=4 * (0.00875 / 20_000) ** 0.5)
        assert normed.var().item() == pytest.approx(0.00875, rel=0.05)


def test_ratio_norm_is_per_sample_not_of_the_batch() -> None:
    change, mean, old_mean, mask = guard_inputs(0.3, num=4)
    mean = mean * torch.tensor([[1.0], [2.0], [0.0], [5.0]], dtype=torch.float64)
    std = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    together = ratio_norm(change, mean, old_mean, std, mask)
    for i in range(4):
        one = slice(i, i + 1)
        alone = ratio_norm(change[one], mean[one], old_mean[one], std[one], mask[one])
        assert torch.equal(alone, together[one])


def test_ratio_norm_has_the_gradient_of_finite_differences_and_none_in_the_old_mean() -> None:
    change, mean, old_mean, mask = guard_inputs(0.3, num=3)
    assert torch.autograd.gradcheck(
        lambda a, b: ratio_norm(a, b, old_mean, 0.3, mask),
        (change.requires_grad_(), mean.requires_grad_()),
    )
    old_mean.requires_grad_()
    assert not ratio_norm(change.detach(), mean.detach(), old_mean, 0.3, mask).requires_grad


def test_ratio_norm_is_silent_where_masked_also_without_a_density() -> None:
    change, mean, old_mean, _ = guard_inputs(0.3, num=2)
    mean.requires_grad_()
    mask, std = torch.tensor([True, False]), torch.tensor([0.3, 0.0], dtype=torch.float64)
    value = ratio_norm(change, mean, old_mean, std, mask)
    (gradient,) = torch.autograd.grad(value.sum(), mean)
    assert value[1] == 0 and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_ratio_norm_refuses_what_does_not_fit() -> None:
    change, mean, old_mean, mask = guard_inputs(0.3, num=2)
    with pytest.raises(ValueError, match="log_ratio must have the shape of mask"):
        ratio_norm(change[:1], mean, old_mean, 0.3, mask)
    with pytest.raises(ValueError, match="ref_mean must have the shape of mean"):
        ratio_norm(change, mean, old_mean[:, :2], 0.3, mask)
    with pytest.raises(ValueError, match="bias must have the shape of log_ratio"):
        ratio_norm(change, mean[:1], old_mean[:1], 0.3, mask)
    with pytest.raises(ValueError, match="mask must be bool"):
        ratio_norm(change, mean, old_mean, 0.3, mask.float())
