"""Deterministic solvers, for the steps that are not trained; they share one signature.

MixGRPO-Flash walks the part after its stochastic window with `dpmpp_2m` on fewer points;
forward-process methods draw their samples with any of them.
"""

import torch
from torch import Tensor

from flowrl.functional.flow import predict_x0
from flowrl.functional.sde import ode
from flowrl.functional.shapes import expand_to, require_same_shape


def dpmpp_2m(
    x_t: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    previous_x0: Tensor | None = None,
    previous_sigma: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pair (x_next, x0) of one DPM-Solver++ 2M (midpoint) step for rectified flow.

    Paper: DPM-Solver++, arXiv:2211.01095, algorithm 2, with alpha = 1 - sigma. There e^-h is a
    ratio of sigmas and alphas, and alpha_next * (1 - e^-h) = 1 - sigma_next / sigma, so that no
    exponential is left and sigma = 1 (h infinite) is an ordinary point:

        x_next = (sigma_next / sigma) * x_t + (1 - sigma_next / sigma) * D

    With D = x0 this is Euler's step. Order 2 extrapolates in the log signal-to-noise ratio, h long:

        D = x0 + h / (2 * previous_h) * (x0 - previous_x0)

    It is of order 1 without history, after a step that began at sigma = 1 (previous_h infinite),
    and on the step to sigma_next = 0 (h infinite).

    Args:
        x_t: [B, ...].
        velocity: as x_t.
        sigma: noise level of x_t, in (0, 1].
        sigma_next: noise level after the step, in [0, sigma).
        previous_x0: the x0 that the previous step returned.
        previous_sigma: the sigma at which the previous step began, above sigma.

    Returns:
        x_next as x_t, and x0 to hand to the next step as previous_x0.

    Raises:
        ValueError: one of previous_x0, previous_sigma without the other, or shapes that do not fit.
    """
    x0 = predict_x0(x_t, velocity, sigma)
    sigma, sigma_next = expand_to(sigma, x_t), expand_to(sigma_next, x_t, "sigma_next")
    if (previous_x0 is None) != (previous_sigma is None):
        raise ValueError("previous_x0 and previous_sigma come together; pass both or neither.")
    target = x0
    if previous_x0 is not None and previous_sigma is not None:
        require_same_shape(x_t=x_t, previous_x0=previous_x0)
        previous_sigma = expand_to(previous_sigma, x_t, "previous_sigma")
        h = _log_snr(sigma_next) - _log_snr(sigma)
        previous_h = _log_snr(sigma) - _log_snr(previous_sigma)
        slope = torch.where(sigma_next > 0, h / (2 * previous_h), 0.0)
        target = x0 + slope * (x0 - previous_x0)
    decay = sigma_next / sigma
    return decay * x_t + (1 - decay) * target, x0


def euler(
    x_t: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    previous_x0: Tensor | None = None,
    previous_sigma: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pair (x_next, x0) of one step of order 1, `sde.ode`; the history is not read.

    Arguments and errors as `dpmpp_2m`.
    """
    return ode(x_t, velocity, sigma, sigma_next)[0], predict_x0(x_t, velocity, sigma)


def resampled(sigmas: Tensor, first: int, num_steps: int) -> Tensor:
    """The schedule from entry `first` to its end in `num_steps` steps: [num_steps + 1].

    The new points are evenly spaced in UNSHIFTED time u, which falls from 1 to 0 along the
    schedule's index. A static shift s multiplies the odds, sigma / (1 - sigma) = s * u / (1 - u),
    so between the given entries the log of that factor is interpolated linearly. That is exact for
    every static (and resolution-dependent) shift without knowing it, and follows any other
    schedule; sigma itself interpolated would be off by 0.015 for s = 3 and 10 steps.

    Paper: MixGRPO, arXiv:2507.21802, its Flash schedule.

    Args:
        sigmas: [T+1], descending, last 0.
        first: entry that stays as it is, in [0, T).
        num_steps: in [1, T - first].

    Returns:
        As sigmas: sigmas[first] first, exactly 0 last.

    Raises:
        ValueError: first or num_steps out of range, or a schedule too uneven to be resampled.
    """
    total = len(sigmas) - 1
    if not 0 <= first < total or not 1 <= num_steps <= total - first:
        raise ValueError(
            f"first must be in [0, {total}) and num_steps in [1, {total} - first], "
            f"but they are {first} and {num_steps}."
        )
    place = torch.linspace(first, total, num_steps + 1, dtype=torch.float64)[1:-1]
    given = sigmas.double()
    inner = given[1:-1]  # the odds are infinite at 1 and 0
    at = torch.arange(1, total, dtype=torch.float64)
    factor = torch.logit(inner) - torch.logit(1 - at / total)
    below = (place.floor().long() - 1).clamp(0, max(total - 2, 0))
    above = (below + 1).clamp(max=max(total - 2, 0))
    share = (place - at[below]).clamp(0, 1)
    log_odds = torch.logit(1 - place / total) + torch.lerp(factor[below], factor[above], share)
    points = torch.cat([given[first : first + 1], torch.sigmoid(log_odds), given.new_zeros(1)])
    if not bool((points.diff() < 0).all()):
        raise ValueError(
            f"the schedule {sigmas.tolist()} is too uneven to be resampled to {num_steps} steps "
            f"from entry {first}; leave its end as it is."
        )
    return points.to(sigmas.dtype)


def _log_snr(sigma: Tensor) -> Tensor:
    """log((1 - sigma) / sigma): infinite at 0, minus infinite at 1."""
    return torch.log1p(-sigma) - torch.log(sigma)
