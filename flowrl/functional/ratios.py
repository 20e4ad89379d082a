"""Importance ratios between the current policy and the one that acted.

A masked decision has ratio exactly 1 and gradient exactly 0, also when its log_prob is nan or
infinite (a deterministic step, padding): both are replaced BEFORE the arithmetic, since 0 * nan is
nan.
"""

import torch
from torch import Tensor

from flowrl.functional.regularizers import gaussian_kl
from flowrl.functional.shapes import (
    at_least_float32,
    expand_to,
    mean_over_dims,
    require_mask,
    require_same_shape,
)


def log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """(log_prob - old_log_prob) where mask, else 0.

    Args:
        log_prob: [...], carries the gradient.
        old_log_prob: as log_prob, of the behaviour policy at rollout; detached.
        mask: bool, as log_prob, True = contributes to the loss.

    Returns:
        float32 [...], float64 if log_prob is.

    Raises:
        ValueError: shapes that differ or a mask that is not bool.
    """
    require_mask(mask, log_prob=log_prob, old_log_prob=old_log_prob)
    new = torch.where(mask, at_least_float32(log_prob), 0.0)
    old = torch.where(mask, at_least_float32(old_log_prob.detach()), 0.0)
    return new - old


def importance_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """Ratio exp(log_prob - old_log_prob) where mask, else 1.

    Arguments and errors as `log_ratio`.
    """
    return torch.exp(log_ratio(log_prob, old_log_prob, mask))


def sequence_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """Geometric mean [N] of the ratios of a row's unmasked decisions; 1 if there are none.

    Paper: GSPO, arXiv:2507.18071. For a flow it is the trajectory's density ratio ^ (1 / steps).

    Args:
        log_prob: [N, S], carries the gradient.
        old_log_prob: [N, S]; detached.
        mask: bool [N, S], True = contributes.

    Raises:
        ValueError: not [N, S], shapes that differ or a mask that is not bool.
    """
    if log_prob.ndim != 2:
        raise ValueError(f"log_prob must be [N, S], but has shape {list(log_prob.shape)}.")
    total = log_ratio(log_prob, old_log_prob, mask).sum(dim=1)
    return torch.exp(total / mask.sum(dim=1).clamp(min=1))


def ratio_norm(
    log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: float | Tensor, mask: Tensor
) -> Tensor:
    """Guard's normalised log-ratio [E]: std * (log_ratio + mean((mean - old_mean)^2) / (2 std^2)).

    Paper: GRPO-Guard, arXiv:2510.22319, RatioNorm. The log-ratio of a Gaussian step has expectation
    -mean(d^2) / (2 std^2) and a spread of 1 / std, so one clip range binds at some steps and at one
    side only. What is left here is mean(d * noise), d = mean - old_mean: centred, and as wide at
    every step. Differs: flow_grpo's code subtracts one bias for the whole batch; per sample, as
    here, it is the paper's formula and does not depend on the chunk. Valid for a log_prob with the
    1 / (2 std^2), so not for CPS as published.

    Args:
        log_ratio: [E], of `log_ratio`, carries the gradient.
        mean: [E, ...], transition_mean of the current policy, carries the gradient.
        old_mean: as mean, of the behaviour policy at rollout; detached.
        std: their common transition_std: number, [E] or [E, 1, ..., 1].
        mask: bool [E], True = contributes to the loss; elsewhere the result is 0.

    Returns:
        float32 [E], float64 if an input is; its exp is a ratio.

    Raises:
        ValueError: shapes that do not fit or a mask that is not bool.
    """
    require_mask(mask, log_ratio=log_ratio)
    bias = gaussian_kl(mean, old_mean, std)
    require_same_shape(log_ratio=log_ratio, bias=bias)
    std_of_row = mean_over_dims(expand_to(std, mean, "std"))
    return torch.where(mask, std_of_row * (log_ratio + bias), 0.0)
