"""Penalties for leaving the reference policy, to be minimised.

`gaussian_kl` is exact and needs the transition means (flow); `k1`, `k2` and `k3` estimate the KL
from log-probs of sampled decisions alone (tokens, or flow). The gradient flows into the first
argument; the reference is detached. A decision without density gives nan and a gradient of exactly
zero once masked.
"""

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32, expand_to, mean_over_dims, require_same_shape


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: float | Tensor) -> Tensor:
    """KL(policy to reference) [B]: (mean - ref_mean)^2 / (2 std^2), mean over dims.

    Paper: Flow-GRPO, arXiv:2505.05470, with std = g * sqrt(-dt). Differs: divided by the number of
    dims, as log_prob is, so that one coefficient fits all resolutions.

    Args:
        mean: [B, ...], transition_mean of the current policy.
        ref_mean: as mean, of the reference; detached.
        std: their common transition_std: number, [B], or with the dims of mean. 0 gives nan.

    Returns:
        float32 [B], float64 if mean is; not negative.

    Raises:
        ValueError: shapes that do not fit.
    """
    require_same_shape(mean=mean, ref_mean=ref_mean)
    mean, ref_mean = at_least_float32(mean), at_least_float32(ref_mean.detach())
    std = expand_to(std, mean, "std")
    has_density = std > 0
    std = torch.where(has_density, std, 1.0)
    divergence = 0.5 * ((mean - ref_mean) / std) ** 2
    return mean_over_dims(torch.where(has_density, divergence, torch.nan))


def gaussian_kl_without_dt(
    mean: Tensor, ref_mean: Tensor, std: float | Tensor, dt: float | Tensor
) -> Tensor:
    """What Flow-GRPO's published code calls KL [B]: (mean - ref_mean)^2 / (2 g^2), mean over dims.

    g = std / sqrt(-dt), so this is `gaussian_kl` times -dt (0.04 to 0.27 at ten steps); the code
    forgot the dt (yifan123/flow_grpo issues 22 and 78). The published coefficients 0.04 and 0.01
    belong to it.

    Args:
        mean: [B, ...], transition_mean of the current policy.
        ref_mean: as mean, of the reference; detached.
        std: transition_std, WITH sqrt(-dt), as for `gaussian_kl`.
        dt: sigma_next - sigma, negative: number, [B], or [B, 1, ..., 1].

    Raises:
        ValueError: shapes that do not fit, or a number dt that is not negative.
    """
    if not isinstance(dt, Tensor) and not dt < 0:
        raise ValueError(f"dt must be negative, sigma_next - sigma, but is {dt}.")
    dt_of_row = mean_over_dims(expand_to(dt, mean, "dt"))
    return gaussian_kl(mean, ref_mean, std) * -dt_of_row


def k1(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """(log_prob - ref_log_prob): unbiased estimate of KL(policy to reference), of either sign.

    Paper: Schulman, "Approximating KL divergence", 2020 (so are k2 and k3). As a loss its expected
    gradient is zero on-policy: use it in the reward, not in the loss.

    Args:
        log_prob: [...], carries the gradient.
        ref_log_prob: as log_prob; detached.

    Returns:
        float32 [...], float64 if log_prob is; nan where a log-prob is not finite.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    difference = at_least_float32(log_prob) - at_least_float32(ref_log_prob.detach())
    # Backwards, where() hands exactly 0, not nan, to an entry that is not finite: masks stay exact.
    return torch.where(torch.isfinite(difference), difference, torch.nan)


def k2(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """(log_prob - ref_log_prob)^2 / 2: biased, but its on-policy gradient is that of the KL.

    Arguments, result and errors as `k1`; not negative.
    """
    return 0.5 * k1(log_prob, ref_log_prob) ** 2


def k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """(exp(d) - 1 - d) with d = ref_log_prob - log_prob: unbiased, not negative, low variance.

    The usual choice of GRPO for tokens. Arguments, result and errors as `k1`.
    """
    difference = -k1(log_prob, ref_log_prob)
    return torch.expm1(difference) - difference  # exp(d) - 1 is rounding noise at a flow's d = 1e-5
