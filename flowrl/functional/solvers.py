"""Deterministic solvers of higher order than Euler, for the steps that are not trained.

MixGRPO-Flash walks the part after its stochastic window with `dpmpp_2m` on fewer points.
"""

import torch
from torch import Tensor

from flowrl.functional.flow import predict_x0
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


def _log_snr(sigma: Tensor) -> Tensor:
    """log((1 - sigma) / sigma): infinite at 0, minus infinite at 1."""
    return torch.log1p(-sigma) - torch.log(sigma)
