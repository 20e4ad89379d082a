"""From per-decision values to the one number that is differentiated."""

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32, require_mask


def aggregate(values: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
    """Sum of the unmasked values divided by `denominator`, a scalar.

    The denominator comes from outside because a mean must name what it is a mean over: the
    decisions of the whole optimiser step on all ranks. Then losses of chunks add up to the loss,
    however it is cut.

    Args:
        values: [...], per decision. Where masked they may be nan or infinite and get gradient
            exactly 0.
        mask: bool, as values, True = contributes.
        denominator: positive number or scalar tensor; not derived from this chunk.

    Returns:
        float32 scalar, float64 if values are.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, a denominator that is not a
            positive number or a tensor of one element.
    """
    require_mask(mask, values=values)
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(
                f"denominator must be one number, but has shape {list(denominator.shape)}; "
                "weight the values instead."
            )
        denominator = denominator.detach().reshape(())
    elif not denominator > 0:
        raise ValueError(
            f"denominator must be positive, but is {denominator}; "
            "a step without a decision to train on must be skipped by the caller."
        )
    return torch.where(mask, at_least_float32(values), 0.0).sum() / denominator
