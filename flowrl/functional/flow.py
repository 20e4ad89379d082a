"""Rectified flow in one notation: x_t = (1 - sigma) * x0 + sigma * x1, velocity = x1 - x0.

x0 is data, x1 is Gaussian noise, sigma = 1 is pure noise; sampling walks sigma from 1 down to 0, so
dt = sigma_next - sigma is negative. A sigma is a number, one value per row [B], or a tensor with
the dims of x. The two schedules at the end look alike and differ; see `diffusers_schedule`.
"""

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32, expand_to, require_same_shape


def interpolate(x0: Tensor, x1: Tensor, sigma: float | Tensor) -> Tensor:
    """(1 - sigma) * x0 + sigma * x1 [B, ...]: x_t, the straight path from data x0 to noise x1."""
    require_same_shape(x0=x0, x1=x1)
    sigma = expand_to(sigma, x0)
    return (1 - sigma) * x0 + sigma * x1


def velocity_target(x0: Tensor, x1: Tensor) -> Tensor:
    """(x1 - x0) [B, ...]: the derivative of x_t by sigma, which the network regresses."""
    require_same_shape(x0=x0, x1=x1)
    return at_least_float32(x1) - x0


def predict_x0(x_t: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """(x_t - sigma * velocity) [B, ...]: the clean data that `velocity` points to."""
    require_same_shape(x_t=x_t, velocity=velocity)
    return x_t - expand_to(sigma, x_t) * velocity


def predict_x1(x_t: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """(x_t + (1 - sigma) * velocity) [B, ...]: the noise that `velocity` comes from.

    The score of x_t is -predict_x1 / sigma.
    """
    require_same_shape(x_t=x_t, velocity=velocity)
    return x_t + (1 - expand_to(sigma, x_t)) * velocity


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Shifted sigmas, shift * sigma / (1 + (shift - 1) * sigma).

    Keeps 0 and 1; shift > 1 dwells on noise. Paper: SD3, arXiv:2403.03206, eq. 23. Shifts compose
    by multiplication: a after b is a * b.

    Args:
        sigmas: any shape, in [0, 1].
        shift: positive; 1 changes nothing, 3 is SD3.5's and 5 HunyuanVideo's.

    Raises:
        ValueError: shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, but is {shift}; 1.0 leaves sigmas as they are.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def linear_schedule(num_steps: int, *, shift: float = 1.0) -> Tensor:
    """Equally spaced sigmas from 1 to 0, then shifted: float32 [num_steps + 1].

    The schedule of DanceGRPO, MixGRPO, BranchGRPO and Pref-GRPO. Its last step is a real one:
    sigmas[-2] is 0.167 for 16 steps with shift 3.

    Raises:
        ValueError: num_steps < 1 or shift is not positive.
    """
    _require_steps(num_steps)
    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift_sigmas(sigmas, shift).float()


def diffusers_schedule(
    num_steps: int, *, shift: float = 3.0, num_train_timesteps: int = 1000
) -> Tensor:
    """Sigmas of diffusers' FlowMatchEulerDiscreteScheduler, static shift: float32 [num_steps + 1].

    The schedule of Flow-GRPO and of every SD3 pipeline. It shifts TWICE: the scheduler's
    constructor shifts its table, whose smallest sigma 1/1000 becomes 0.003; set_timesteps(T) spaces
    T points from 1 to that already shifted minimum, shifts them again and appends 0. So with shift
    3 the T-th sigma is 0.0089, and "10 steps" are 9 real ones and a negligible one; a run on this
    schedule cannot be compared with a run on `linear_schedule` of equal num_steps.

    Raises:
        ValueError: num_steps < 1 or shift is not positive.
    """
    _require_steps(num_steps)
    ends = torch.tensor([1.0, 1 / num_train_timesteps], dtype=torch.float64)
    sigma_max, sigma_min = shift_sigmas(ends, shift).tolist()
    sigmas = torch.linspace(sigma_max, sigma_min, num_steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(sigmas, shift), sigmas.new_zeros(1)]).float()


def _require_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, but is {num_steps}.")
