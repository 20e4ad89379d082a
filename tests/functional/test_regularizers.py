"""regularizers.py: KL closed forms, Schulman's estimators and their gradients.

Kills, among others: 2 std^2 written std^2 or std; sum over dims; dt divided instead of multiplied,
or squared; k3 with the sign of d swapped; exp(d) - 1 instead of expm1; gradient into the reference;
nan under a mask.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowrl.functional.aggregate import aggregate
from flowrl.functional.regularizers import gaussian_kl, gaussian_kl_without_dt, k1, k2, k3
from flowrl.functional.sde import flow_sde

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_gaussian_kl() -> None:
    # Differences 1 and 3, std .5: (1 + 9) / 2 / (2 * .25) = 10. With dt = -.25, g^2 = 1: 5 / 2 =
    # 2.5.
    mean, ref_mean = f64(1, 3)[None], f64(0, 0)[None]
    assert gaussian_kl(mean, ref_mean, 0.5).tolist() == [10.0]
    assert gaussian_kl_without_dt(mean, ref_mean, 0.5, -0.25).tolist() == [2.5]


def test_gaussian_kl_is_torchs_averaged_over_dims() -> None:
    mean, ref_mean = random(3, 4, 2), random(3, 4, 2, seed=1)
    std = f64(0.1, 1, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, std.view(3, 1, 1)), normal(ref_mean, std.view(3, 1, 1))
    )
    for shape in ((3,), (3, 1, 1)):
        torch.testing.assert_close(
            gaussian_kl(mean, ref_mean, std.view(shape)), expected.mean(dim=(1, 2))
        )


def test_gaussian_kl_without_dt_divides_by_the_diffusion_coef_of_the_published_code() -> None:
    x_t, velocity, ref_velocity = random(2, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    sigma, sigma_next = f64(0.9, 0.5), f64(0.8, 0.2)
    mean, std = flow_sde(x_t, velocity, sigma, sigma_next, noise_level=0.7, sigma_max=0.9)
    ref_mean, _ = flow_sde(x_t, ref_velocity, sigma, sigma_next, noise_level=0.7, sigma_max=0.9)
    g_squared = 0.7**2 * sigma / (1 - sigma)
    expected = ((mean - ref_mean) ** 2).mean(1) / (2 * g_squared)
    dt = sigma_next - sigma
    for shape in ((2,), (2, 1)):
        actual = gaussian_kl_without_dt(mean, ref_mean, std, dt.view(shape))
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(expected, gaussian_kl(mean, ref_mean, std) * -dt)


def test_gaussian_kl_gradient_is_analytic_and_none_reaches_the_reference() -> None:
    mean, ref_mean = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    gaussian_kl(mean, ref_mean, 0.5).sum().backward()
    assert ref_mean.grad is None
    torch.testing.assert_close(mean.grad, (mean - ref_mean).detach() / 0.25 / 3)


def test_golden_estimators() -> None:
    # log_prob - ref = log 2: k1 = log 2, k2 = log(2)^2 / 2, k3 = 1/2 - 1 + log 2.
    log_prob, ref = f64(math.log(0.5)), f64(math.log(0.25))
    assert k1(log_prob, ref).item() == pytest.approx(math.log(2))
    assert k2(log_prob, ref).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(log_prob, ref).item() == pytest.approx(math.log(2) - 0.5)


def test_k1_and_k3_have_the_kl_as_their_mean() -> None:
    p, q = f64(0.7, 0.2, 0.1), f64(0.3, 0.3, 0.4)
    kl = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * k1(p.log(), q.log())).sum(), kl)
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), kl)


def test_k2_has_the_gradient_of_the_kl_on_policy() -> None:
    logits, q = random(3).requires_grad_(), f64(0.3, 0.3, 0.4)
    log_p = logits.log_softmax(0)
    p = log_p.exp()
    (expected,) = torch.autograd.grad((p * (log_p - q.log())).sum(), logits, retain_graph=True)
    (actual,) = torch.autograd.grad((p.detach() * k2(log_p, q.log())).sum(), logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("name", "slope"), [("k1", 1.0), ("k2", 0.5), ("k3", 1 - math.exp(-0.5))])
def test_estimator_gradients_are_analytic_and_none_reaches_the_reference(
    name: str, slope: float
) -> None:
    log_prob, ref = f64(-1.0).requires_grad_(), f64(-1.5).requires_grad_()
    ESTIMATORS[name](log_prob, ref).sum().backward()
    assert ref.grad is None
    assert log_prob.grad is not None
    assert log_prob.grad.item() == pytest.approx(slope)
    assert torch.autograd.gradcheck(
        lambda new: ESTIMATORS[name](new, random(4, seed=1)), random(4).requires_grad_()
    )


def test_all_vanish_at_the_reference_and_k2_k3_are_not_negative() -> None:
    log_prob, ref = random(50), random(50, seed=1)
    for name, estimator in ESTIMATORS.items():
        assert (estimator(log_prob, log_prob) == 0).all()
        if name != "k1":
            assert (estimator(log_prob, ref) > 0).all()


def test_k3_keeps_its_digits_at_a_flows_tiny_log_ratios_in_float32() -> None:
    # d = 2^-17 = 7.6e-6: k3 = d^2 / 2 = 2.9e-11, far below float32's 6e-8 around 1.
    d = torch.tensor([2.0**-17])
    assert k3(-d, torch.zeros(1)).item() == pytest.approx(2.0**-35, rel=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_masked_decision_without_density_gets_exactly_zero_gradient(
    name: str, bad: float
) -> None:
    log_prob = f64(-1.0, bad).requires_grad_()
    penalty = ESTIMATORS[name](log_prob, f64(-1.5, bad))
    assert penalty.isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(
        aggregate(penalty, torch.tensor([True, False]), 1.0), log_prob
    )
    assert gradient[0] != 0
    assert gradient[1] == 0


@pytest.mark.parametrize("std_of_masked", [0.0, math.nan])
def test_a_masked_deterministic_step_gets_exactly_zero_gradient(std_of_masked: float) -> None:
    mean = random(2, 3).requires_grad_()
    penalty = gaussian_kl(mean, random(2, 3, seed=1), f64(0.5, std_of_masked))
    assert penalty.isnan().tolist() == [False, True]
    (gradient,) = torch.autograd.grad(aggregate(penalty, torch.tensor([True, False]), 1.0), mean)
    assert (gradient[0] != 0).all()
    assert (gradient[1] == 0).all()


def test_bfloat16_is_computed_in_float32() -> None:
    a, b = random(2, 3).bfloat16(), random(2, 3, seed=1).bfloat16()
    assert torch.equal(gaussian_kl(a, b, 0.5), gaussian_kl(a.float(), b.float(), 0.5))
    for estimator in ESTIMATORS.values():
        assert torch.equal(estimator(a, b), estimator(a.float(), b.float()))


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="ref_mean must have the shape of mean"):
        gaussian_kl(random(2, 3), random(2, 1), 0.5)
    with pytest.raises(ValueError, match=r"std must be a number, \[B\]"):
        gaussian_kl(random(2, 3), random(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="dt must be negative"):
        gaussian_kl_without_dt(random(2, 3), random(2, 3), 0.5, 0.25)
    for estimator in ESTIMATORS.values():
        with pytest.raises(ValueError, match="ref_log_prob must have the shape of log_prob"):
            estimator(random(2, 3), random(2))
