"""sde.py: golden numbers, exact identities of the transition, log-density and gradients.

Kills, among others: sigma_max put into the numerator too, or for sigma < 1; sigma instead of
sigma_next in cps; cos and sin swapped; std without sqrt(-dt); sum instead of mean, or log std
missing, in the log-density; a gradient through the stored action; nan gradients from a masked
deterministic step.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional.flow import interpolate, linear_schedule
from flowrl.functional.ratios import importance_ratio
from flowrl.functional.sde import cps, dance_sde, flow_sde, gaussian_log_prob, ode, reverse_sde

Kernel = Callable[[Tensor, Tensor, float | Tensor, float | Tensor], tuple[Tensor, Tensor]]
KERNELS: dict[str, Callable[[float], Kernel]] = {
    "flow_sde": lambda noise_level: partial(flow_sde, noise_level=noise_level, sigma_max=0.9),
    "dance_sde": lambda noise_level: partial(dance_sde, noise_level=noise_level),
    "cps": lambda noise_level: partial(cps, noise_level=noise_level),
}
ALL = {**{name: make(0.7) for name, make in KERNELS.items()}, "ode": ode}


def scalar(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def step(kernel: Kernel, sigma: float, sigma_next: float) -> tuple[float, float]:
    mean, std = kernel(scalar(1.0), scalar(0.5), sigma, sigma_next)
    return mean.item(), std.item()


def test_golden_numbers_from_half_to_quarter() -> None:
    # x_t = 1, velocity = .5, sigma = .5, sigma_next = .25: x0 = .75, x1 = 1.25, dt = -.25. ode: 1 -
    # .125. flow, a = 1: g = 1, drift = .5 + 1 / (2 * .5) * 1.25 = 1.75, std = sqrt(.25). dance, eta
    # = .5: drift = .5 + .25 * 1.25 = .8125, std = .5 * .5. cps, eta = 2/3: sin 60 = sqrt(3)/2, cos
    # 60 = 1/2: .75 * .75 + .25 * .5 * 1.25, std = .25 sqrt(3)/2.
    flow = partial(flow_sde, noise_level=1.0, sigma_max=0.9)
    assert step(ode, 0.5, 0.25) == (0.875, 0.0)
    assert step(flow, 0.5, 0.25) == pytest.approx((1 - 0.25 * 1.75, 0.5), abs=1e-15)
    assert step(partial(dance_sde, noise_level=0.5), 0.5, 0.25) == (1 - 0.25 * 0.8125, 0.25)
    assert step(partial(cps, noise_level=2 / 3), 0.5, 0.25) == pytest.approx(
        (0.71875, 0.125 * math.sqrt(3)), abs=1e-15
    )


def test_golden_numbers_of_the_first_flow_sde_step() -> None:
    # sigma = 1, sigma_next = sigma_max = .75, a = .5: only the denominator uses sigma_max, so
    # g = .5 * sqrt(1 / .25) = 1 (with the numerator too it would be .866); x1 = x_t = 1;
    # drift = .5 + 1 / 2 * 1 = 1; mean = 1 - .25; std = 1 * sqrt(.25).
    kernel = partial(flow_sde, noise_level=0.5, sigma_max=0.75)
    assert step(kernel, 1.0, 0.75) == (0.75, 0.5)


@pytest.mark.parametrize("noise_level", [0.1, 0.7, 1.2])
@pytest.mark.parametrize("num_steps", [1, 6, 25])
def test_first_std_of_flow_sde_is_the_noise_level(noise_level: float, num_steps: int) -> None:
    sigmas = linear_schedule(num_steps, shift=3.0).double()
    _, std = flow_sde(
        random(2, 3),
        random(2, 3),
        sigmas[0],
        sigmas[1],
        noise_level=noise_level,
        sigma_max=sigmas[1],
    )
    assert std.item() == pytest.approx(noise_level, rel=1e-15)


def test_sigma_max_matters_only_at_pure_noise() -> None:
    a, b = (
        flow_sde(random(1, 4), random(1, 4), 0.99, 0.9, noise_level=1, sigma_max=s)
        for s in (0.5, 0.9)
    )
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_flow_and_dance_are_one_formula() -> None:
    x_t, velocity = random(2, 3), random(2, 3, seed=1)
    flow = flow_sde(x_t, velocity, 0.8, 0.6, noise_level=0.7, sigma_max=0.9)
    same = dance_sde(x_t, velocity, 0.8, 0.6, noise_level=0.7 * math.sqrt(0.8 / 0.2))
    torch.testing.assert_close(flow, same)


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25, deadline=None)
@given(sigma=st.floats(0.01, 1), fraction=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_kernels_without_noise_are_the_ode(
    name: str, sigma: float, fraction: float, seed: int
) -> None:
    x_t, velocity = random(2, 3, seed=seed), random(2, 3, seed=seed + 100)
    mean, std = KERNELS[name](0.0)(x_t, velocity, sigma, sigma * fraction)
    torch.testing.assert_close(mean, ode(x_t, velocity, sigma, sigma * fraction)[0])
    assert (std == 0).all()


def signal_and_noise(kernel: Kernel, sigma: float, sigma_next: float) -> tuple[float, float]:
    """Coefficient of x0 and total noise variance of x_next, when velocity is the true x1 - x0."""
    x0, x1 = torch.eye(2, dtype=torch.float64)[:, :, None].unbind(1)
    mean, std = kernel(interpolate(x0, x1, sigma), x1 - x0, sigma, sigma_next)
    return mean[0].item(), mean[1].item() ** 2 + std.item() ** 2


@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0.05, 1), fraction=st.floats(0, 0.95), g=st.floats(0, 2))
def test_reverse_sde_keeps_the_signal_and_adds_the_excess_noise_of_the_identity(
    sigma: float, fraction: float, g: float
) -> None:
    sigma_next = sigma * fraction
    excess = (sigma - sigma_next) ** 2 * (g**2 / sigma + g**4 / (4 * sigma**2))
    kernel = partial(reverse_sde, diffusion_coef=g)
    signal, noise = signal_and_noise(kernel, sigma, sigma_next)
    assert signal == pytest.approx(1 - sigma_next, abs=1e-12)
    assert noise == pytest.approx(sigma_next**2 + excess, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "g"), [("flow_sde", 0.7 * math.sqrt(0.6 / 0.4)), ("dance_sde", 0.7)]
)
def test_flow_and_dance_add_the_excess_noise_of_their_coefficient(name: str, g: float) -> None:
    excess = 0.2**2 * (g**2 / 0.6 + g**4 / (4 * 0.6**2))
    signal, noise = signal_and_noise(KERNELS[name](0.7), 0.6, 0.4)
    assert (signal, noise) == pytest.approx((0.6, 0.4**2 + excess), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0, 1), sigma_next=st.floats(0, 1), noise_level=st.floats(0, 1))
def test_cps_preserves_both_coefficients_exactly(
    sigma: float, sigma_next: float, noise_level: float
) -> None:
    signal, noise = signal_and_noise(partial(cps, noise_level=noise_level), sigma, sigma_next)
    assert (signal, noise) == pytest.approx((1 - sigma_next, sigma_next**2), abs=1e-13)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_mean_moves_with_the_velocity_by_the_closed_form(name: str) -> None:
    sigma, sigma_next, noise_level = 0.6, 0.4, 0.7
    g = noise_level * (math.sqrt(sigma / (1 - sigma)) if name == "flow_sde" else 1)
    slope = (sigma_next - sigma) * (1 + g**2 * (1 - sigma) / (2 * sigma))
    if name == "cps":
        cosine = math.cos(noise_level * math.pi / 2)
        slope = -sigma * (1 - sigma_next) + (1 - sigma) * sigma_next * cosine
    velocity = random(2, 3, seed=1).requires_grad_()
    mean, std = KERNELS[name](noise_level)(random(2, 3), velocity, sigma, sigma_next)
    (gradient,) = torch.autograd.grad(mean.sum(), velocity)
    torch.testing.assert_close(gradient, torch.full_like(gradient, slope))
    assert not std.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_per_row_sigmas_give_the_rows_of_separate_calls(name: str) -> None:
    x_t, velocity = random(3, 3, 3), random(3, 3, 3, seed=1)
    sigma = torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    sigma_next = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    mean, std = ALL[name](x_t, velocity, sigma, sigma_next)
    assert std.shape == (3, 1, 1)
    for i in range(3):
        row = slice(i, i + 1)
        alone = ALL[name](x_t[row], velocity[row], sigma[i].item(), sigma_next[i].item())
        assert torch.equal(mean[row], alone[0])
        assert torch.equal(std[row], alone[1])


@pytest.mark.parametrize("name", ALL)
def test_float_sigmas_give_a_std_that_broadcasts_in_float32_at_least(name: str) -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x_t = random(2, 4, 3, 3).to(dtype)
        mean, std = ALL[name](x_t, x_t, 0.8, 0.6)
        assert std.shape == (1, 1, 1, 1)
        assert mean.shape == x_t.shape
        assert mean.dtype == std.dtype == expected


@pytest.mark.parametrize("name", ALL)
def test_kernels_refuse_shapes_that_do_not_fit(name: str) -> None:
    with pytest.raises(ValueError, match="velocity must have the shape of x_t"):
        ALL[name](random(2, 3), random(2, 1), 0.8, 0.6)
    with pytest.raises(ValueError, match=r"sigma_next must be a number, \[B\]"):
        ALL[name](random(2, 3), random(2, 3), 0.8, torch.full((3,), 0.6))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_refuse_a_negative_noise_level(name: str) -> None:
    with pytest.raises(ValueError, match="noise_level must be in"):
        KERNELS[name](-0.1)(random(2, 3), random(2, 3), 0.8, 0.6)


def test_cps_refuses_a_noise_level_above_one_and_flow_sde_a_sigma_max_of_one() -> None:
    with pytest.raises(ValueError, match=r"noise_level must be in \[0, 1.0\], but is 1.2"):
        cps(random(2, 3), random(2, 3), 0.8, 0.6, noise_level=1.2)
    with pytest.raises(ValueError, match="sigma_max must be below 1"):
        flow_sde(random(2, 3), random(2, 3), 1.0, 0.9, noise_level=0.7, sigma_max=1.0)


def test_gaussian_log_prob_golden() -> None:
    # Two dims, std .5, deviations .5 and 1: mean of (-1/2, -2) is -1.25; -log .5 = .6931; -.9189.
    value = gaussian_log_prob(random(1, 2) * 0 + torch.tensor([0.5, 1.0]), random(1, 2) * 0, 0.5)
    assert value.item() == pytest.approx(
        -1.25 + math.log(2) - 0.5 * math.log(2 * math.pi), abs=1e-15
    )


def test_gaussian_log_prob_is_torchs_density_averaged_over_all_dims_but_the_first() -> None:
    x_next, mean = random(3, 4, 2, 2), random(3, 4, 2, 2, seed=1)
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std.view(3, 1, 1, 1)).log_prob(x_next)
    for shape in ((3,), (3, 1, 1, 1)):
        value = gaussian_log_prob(x_next, mean, std.view(shape))
        assert value.shape == (3,)
        torch.testing.assert_close(value, expected.mean(dim=(1, 2, 3)))


def test_cps_published_score_is_the_density_with_std_root_half_up_to_a_constant() -> None:
    x_next, mean = random(3, 5), random(3, 5, seed=1)
    difference = gaussian_log_prob(x_next, mean, math.sqrt(0.5)) + ((x_next - mean) ** 2).mean(1)
    torch.testing.assert_close(difference, difference[:1].expand(3))


def test_log_ratio_is_quadratic_minus_linear_in_the_moved_mean() -> None:
    # l - l_old = -mean(dmu^2) / (2 std^2) + mean(dmu * noise) / std
    old_mean, moved, noise, std = random(3, 5), random(3, 5, seed=1), random(3, 5, seed=2), 0.3
    x_next = old_mean + std * noise
    log_ratio = gaussian_log_prob(x_next, old_mean + moved, std) - gaussian_log_prob(
        x_next, old_mean, std
    )
    expected = -(moved**2).mean(1) / (2 * std**2) + (moved * noise).mean(1) / std
    torch.testing.assert_close(log_ratio, expected)


def test_gaussian_log_prob_gradient_is_the_score_and_none_reaches_the_action() -> None:
    x_next, mean = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    gaussian_log_prob(x_next, mean, 0.5).sum().backward()
    assert x_next.grad is None
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, (x_next - mean).detach() / 0.5**2 / 3)
    assert torch.autograd.gradcheck(
        lambda m, s: gaussian_log_prob(x_next, m, s),
        (mean, torch.tensor(0.5).double().requires_grad_()),
    )


def test_gaussian_log_prob_of_bfloat16_is_float32() -> None:
    x_next, mean = random(2, 3).bfloat16(), random(2, 3, seed=1).bfloat16()
    value = gaussian_log_prob(x_next, mean, 0.5)
    assert value.dtype == torch.float32
    assert torch.equal(value, gaussian_log_prob(x_next.float(), mean.float(), 0.5))


def test_masked_deterministic_step_has_ratio_one_and_leaves_all_gradients_finite() -> None:
    mean = random(2, 3).requires_grad_()
    std = torch.tensor([0.5, 0.0], dtype=torch.float64)
    log_prob = gaussian_log_prob(mean.detach() + std[:, None], mean, std)
    assert log_prob.isnan().tolist() == [False, True]
    ratio = importance_ratio(log_prob, log_prob, torch.tensor([True, False]))
    (gradient,) = torch.autograd.grad(ratio.sum(), mean)
    assert ratio.tolist() == [1.0, 1.0]
    assert (gradient[1] == 0).all()
    torch.testing.assert_close(gradient[0], torch.full((3,), 1 / 0.5 / 3, dtype=torch.float64))


def test_gaussian_log_prob_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="mean must have the shape of x_next"):
        gaussian_log_prob(random(2, 3), random(2, 1), 0.5)
    with pytest.raises(ValueError, match=r"std must be a number, \[B\]"):
        gaussian_log_prob(random(2, 3), random(2, 3), torch.ones(3))
