"""Weights on the decisions of a step: how much each sampler step counts in the loss.

All take and return one value per sampler step, [T], detached. Steps that are not trained have a
value too, which nobody reads; where a mean is made 1, it is the mean over the trained steps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.functional.shapes import require_same_shape


def mean_one(values: Tensor, trained: Sequence[int]) -> Tensor:
    """The values [T] divided by their mean over the `trained` steps.

    Raises:
        ValueError: no trained step, or a mean that is not positive and finite.
    """
    if not trained:
        raise ValueError("a mean over the trained steps needs one trained step at least.")
    values = values.detach()
    mean = values[list(trained)].mean()
    if not (mean > 0 and torch.isfinite(mean)):
        raise ValueError(f"the mean over the trained steps must be positive, but is {mean:g}.")
    return values / mean


def noise_aware(std: Tensor, trained: Sequence[int]) -> Tensor:
    """Weights proportional to the noise of a step, g * sqrt(-dt), with mean 1 over `trained`.

    Paper: TempFlow-GRPO, arXiv:2508.04324, eq. 10. The gradient of a step's log-prob is
    proportional to 1 / std, so steps at high noise would learn least. Differs: the mean is exact
    where the public code has the constant 2.25 of SD3.5 with 10 steps.

    Args:
        std: [T], transition_std of every step.
        trained: the steps whose mean is 1.
    """
    return mean_one(std, trained)


def inverse_sensitivity(slope: Tensor, std: Tensor, trained: Sequence[int]) -> Tensor:
    """Weights proportional to 1 / lambda, lambda = |slope| / std, with mean 1 over `trained`.

    Paper: Flash-GRPO, arXiv:2605.15980: lambda = sqrt(-dt) / g + g * sqrt(-dt) * (1 - sigma) /
    (2 sigma) for Flow-SDE, which is |d mean / d velocity| / std of its transition, and is taken so
    of every kernel.

    Args:
        slope: [T], d transition_mean / d velocity.
        std: [T], transition_std.
        trained: the steps whose mean is 1.
    """
    require_same_shape(slope=slope, std=std)
    return mean_one(std / slope.abs(), trained)


def inverse_dt(sigmas: Tensor) -> Tensor:
    """1 / -dt of every step, [T].

    Paper: GRPO-Guard, arXiv:2510.22319, eq. 13: with its normalised ratio, the gradient of a step
    is proportional to -dt.

    Args:
        sigmas: [T+1], descending.
    """
    return 1 / (sigmas[:-1] - sigmas[1:])
