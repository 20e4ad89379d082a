"""Importance ratios between the current policy and the one that acted.

A masked decision has ratio exactly 1 and gradient exactly 0, also when its log_prob is nan or
infinite (a deterministic step, padding): both are replaced BEFORE the arithmetic, since 0 * nan is
nan.
"""

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32, require_mask


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
