"""Transition kernels: p(x_next given x_t) = N(transition_mean, transition_std^2), and its density.

A kernel returns the pair and draws nothing: the caller adds `transition_std * noise` when it
samples and scores the stored x_next with `gaussian_log_prob` when it trains, both through the same
kernel. Flow-SDE, Dance-SDE and Wan's are one formula, `reverse_sde`, with different noise g(sigma);
`cps` is the one that adds no more noise than the schedule removes; `ode` is Euler's step, where
they all meet at noise level 0.

Shapes: x_t and velocity [B, ...]; sigma and noise_level a number, [B], or with the dims of x_t;
transition_mean as x_t; transition_std [1 or B, 1, ..., 1], as many dims as x_t. float32 at least.
"""

import math

import torch
from torch import Tensor

from flowrl.functional.flow import predict_x0, predict_x1
from flowrl.functional.shapes import at_least_float32, expand_to, mean_over_dims, require_same_shape


def reverse_sde(
    x_t: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    diffusion_coef: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean and std of one Euler-Maruyama step of the reverse SDE with noise g = `diffusion_coef`.

    dx = [velocity - g^2/2 * score] dsigma + g dw has the marginals of the ODE for every g(sigma);
    the score is -predict_x1 / sigma, so sigma must be positive. Paper: Flow-GRPO, arXiv:2505.05470.
    The step adds more noise than the schedule removes: of x_next's noise variance, the excess over
    sigma_next^2 is dt^2 * (g^2 / sigma + g^4 / (4 sigma^2)).

    Args:
        x_t: [B, ...].
        velocity: as x_t.
        sigma: noise level of x_t, in (0, 1].
        sigma_next: noise level after the step, below sigma.
        diffusion_coef: g(sigma), not negative, per sqrt(time): without sqrt(-dt).

    Returns:
        transition_mean as x_t and transition_std = g * sqrt(-dt).
    """
    sigma, sigma_next = expand_to(sigma, x_t), expand_to(sigma_next, x_t, "sigma_next")
    diffusion_coef = expand_to(diffusion_coef, x_t, "diffusion_coef")
    dt = sigma_next - sigma
    drift = velocity + diffusion_coef**2 / (2 * sigma) * predict_x1(x_t, velocity, sigma)
    return x_t + dt * drift, diffusion_coef * torch.sqrt(-dt)


def flow_sde(
    x_t: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float | Tensor,
    sigma_max: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Flow-GRPO's kernel: `reverse_sde` with g = noise_level * sqrt(sigma / (1 - sigma)).

    Paper: Flow-GRPO, arXiv:2505.05470. g is infinite at sigma = 1; there the published code puts
    sigma_max, the SECOND entry of the schedule, for sigma, in the denominator only. On the first
    step (sigma_next = sigma_max) transition_std is therefore noise_level exactly. Starting at 1,
    its error in the marginals shrinks as num_steps^-min(1, noise_level^2) only: slower than first
    order.

    Args:
        x_t: [B, ...].
        velocity: as x_t.
        sigma: noise level of x_t, in (0, 1].
        sigma_next: noise level after the step, below sigma.
        noise_level: the paper's a, 0.7 for SD3.5; 0 is the ODE.
        sigma_max: sigmas[1], below 1.

    Returns:
        transition_mean as x_t and transition_std.

    Raises:
        ValueError: negative noise_level, sigma_max = 1, or shapes that do not fit.
    """
    if not isinstance(sigma_max, Tensor) and sigma_max >= 1:
        raise ValueError(f"sigma_max must be below 1, but is {sigma_max}; pass sigmas[1].")
    sigma = expand_to(sigma, x_t)
    noise_level = _noise_level(noise_level, x_t)
    denominator = 1 - torch.where(sigma < 1, sigma, expand_to(sigma_max, x_t, "sigma_max"))
    diffusion_coef = noise_level * torch.sqrt(sigma / denominator)
    return reverse_sde(x_t, velocity, sigma, sigma_next, diffusion_coef=diffusion_coef)


def dance_sde(
    x_t: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """DanceGRPO's kernel: `reverse_sde` with constant g = noise_level.

    Paper: DanceGRPO, arXiv:2505.07818. noise_level is the paper's eta: 0.3 for FLUX, 0.25 for
    HunyuanVideo, 0 is the ODE. Finite everywhere, but noisy at the end: the last step leaves
    noise of std noise_level * sqrt(sigma) on the result.

    Returns:
        transition_mean as x_t and transition_std; shapes as in the module's docstring.

    Raises:
        ValueError: negative noise_level or shapes that do not fit.
    """
    noise_level = _noise_level(noise_level, x_t)
    return reverse_sde(x_t, velocity, sigma, sigma_next, diffusion_coef=noise_level)


def cps(
    x_t: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Coefficients-preserving sampling: x_next keeps signal 1 - sigma_next and noise sigma_next.

    Paper: CPS, arXiv:2509.05952. The noise sigma_next is split at right angles into the predicted
    x1, cos(noise_level * pi/2), and fresh noise, sin(noise_level * pi/2), so its total variance is
    sigma_next^2 exactly. On the last step (sigma_next = 0) std is 0 and there is no density.
    Not a discretised SDE: with more steps at one noise_level, data of any spread loses variance.

    Args:
        x_t: [B, ...].
        velocity: as x_t.
        sigma: noise level of x_t, in [0, 1].
        sigma_next: noise level after the step.
        noise_level: the paper's eta, in [0, 1]: 0 is the ODE, 0.8 usual, 1 forgets x1.

    Returns:
        transition_mean as x_t and transition_std.

    Raises:
        ValueError: noise_level outside [0, 1] or shapes that do not fit.
    """
    angle = _noise_level(noise_level, x_t, most=1.0) * (math.pi / 2)
    sigma_next = expand_to(sigma_next, x_t, "sigma_next")
    x0, x1 = predict_x0(x_t, velocity, sigma), predict_x1(x_t, velocity, sigma)
    transition_mean = (1 - sigma_next) * x0 + sigma_next * torch.cos(angle) * x1
    return transition_mean, sigma_next * torch.sin(angle)


def ode(
    x_t: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Euler's step x_t + dt * velocity and a std of zeros: no noise, and no density."""
    require_same_shape(x_t=x_t, velocity=velocity)
    dt = expand_to(sigma_next, x_t, "sigma_next") - expand_to(sigma, x_t)
    return x_t + dt * velocity, torch.zeros_like(dt)


def gaussian_log_prob(x_next: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Log density of N(mean, std^2) at x_next, divided by the number of dims: [B].

    The full form, with its constants. Mean, not sum, because a sum over D = 65,536 latent dims
    would make every ratio 0 or infinite; all published clip ranges (1e-4 to 1e-6) belong to the
    mean, whose ratio is the D-th root of the true one. Flow-GRPO's CPS scores -mean((x_next -
    mean)^2), which is this with std = sqrt(1/2), up to a constant.

    Args:
        x_next: [B, ...], the stored action; detached.
        mean: as x_next.
        std: number, [B], or with the dims of x_next. A deterministic step (std = 0) has no density:
            its value is nan, to be masked, and passes a gradient of exactly zero.

    Returns:
        float32 [B], float64 if an input is.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_same_shape(x_next=x_next, mean=mean)
    x_next, mean = at_least_float32(x_next.detach()), at_least_float32(mean)
    std = expand_to(std, mean, "std")
    has_density = std > 0
    std = torch.where(has_density, std, 1.0)
    log_prob = -0.5 * ((x_next - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return mean_over_dims(torch.where(has_density, log_prob, torch.nan))


def _noise_level(noise_level: float | Tensor, x_t: Tensor, most: float = math.inf) -> Tensor:
    """The expanded noise_level; numbers are checked, tensors not (it would wait for the GPU)."""
    if not isinstance(noise_level, Tensor) and not 0 <= noise_level <= most:
        raise ValueError(f"noise_level must be in [0, {most}], but is {noise_level}.")
    return expand_to(noise_level, x_t, "noise_level")
