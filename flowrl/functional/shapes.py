"""The broadcasting rules that every function of this folder follows.

The first dim is the batch. A per-row quantity is [B] (or [B, 1, ..., 1]) and never lines up with
the last dim by accident: [B, 1, 1, 1] times [B] would silently become [B, 1, 1, B], a bug that
stood in two published trainers. Everything is computed in float32, or float64 where an input is.
"""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or unchanged if float64: log-probs of bf16 models need the bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def expand_to(value: float | Tensor, like: Tensor, name: str = "sigma") -> Tensor:
    """The value with as many dims as `like`, so that it broadcasts along the batch alone.

    Args:
        value: number or scalar tensor (becomes [1, ..., 1]), per-row [B] (becomes [B, 1, ..., 1]),
            or a tensor with the dims of `like` that broadcasts to it (kept).
        like: [B, ...], the tensor to broadcast against.
        name: what the caller calls `value`, for the error message.

    Returns:
        Tensor on the device of `like`, in the dtype of `like` but float32 at least.

    Raises:
        ValueError: `value` does not broadcast to `like` by these rules.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(value, Tensor):
        return torch.full((1,) * like.ndim, value, dtype=dtype, device=like.device)
    if value.ndim < like.ndim and value.ndim <= 1:
        value = value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
    fits = value.ndim == like.ndim and all(
        have in (1, want) for have, want in zip(value.shape, like.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} must be a number, [B] or broadcast to {list(like.shape)}, "
            f"but has shape {list(value.shape)}; pass one value per row of the batch."
        )
    return value.to(device=like.device, dtype=dtype)


def mean_over_dims(values: Tensor) -> Tensor:
    """Mean of `values` [B, ...] over all dims but the first: [B]."""
    return values.unsqueeze(-1).flatten(1).mean(dim=1)


def require_same_shape(**tensors: Tensor) -> None:
    """Refuse (ValueError) tensors, given by name, that differ in shape from the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {list(reference.shape)}, "
                f"but has {list(tensor.shape)}; broadcasting is not done here, expand it first."
            )


def require_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse (ValueError) a mask that is not bool, or tensors, given by name, of another shape."""
    if mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool (True = contributes to the loss), but is {mask.dtype}; "
            "write mask.bool() if 1 means True."
        )
    require_same_shape(mask=mask, **tensors)
