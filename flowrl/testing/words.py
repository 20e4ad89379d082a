"""How the checkers say what is broken: "what must be expected; got arrived"."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32


def check_images(images: Tensor, num: int, what: str) -> None:
    """Raises unless `images`, called `what`, are detached float [num, 3, H, W] in [0, 1]."""
    is_shaped = images.ndim == 4 and images.shape[:2] == (num, 3)
    require(is_shaped, what, f"[{num}, 3, H, W]", tuple(images.shape))
    require(images.is_floating_point(), what, "of a floating dtype", images.dtype)
    require(not images.requires_grad, what, "detached", "images with gradient")
    low, high = (float(each) for each in images.aminmax())
    require(low >= 0 and high <= 1, what, "in [0, 1]", f"[{low:.4g}, {high:.4g}]")


def require(holds: bool | Tensor, what: str, expected: str, arrived: object) -> None:
    """Raises an AssertionError that says what must be what, unless it holds."""
    if not holds:
        raise AssertionError(f"{what} must be {expected}; got {arrived}")


def require_same(one: Tensor, two: Tensor, tolerance: float, what: str, otherwise: str) -> None:
    """Raises unless the two are equal within the tolerance; NaN equals NaN."""
    one, two = (at_least_float32(each.detach().cpu()) for each in (one, two))
    shapes = f"{tuple(one.shape)} and {tuple(two.shape)}"
    require(one.shape == two.shape, what, f"of the same shape {otherwise}", shapes)
    is_same = torch.allclose(one, two, rtol=0, atol=tolerance, equal_nan=True)
    far = (one - two).abs().nan_to_num(torch.inf).max() if one.numel() else 0.0
    limit = f", more than {tolerance:.0e}" if tolerance else ""
    require(is_same, what, f"the same {otherwise}", f"a difference of {far:.2e}{limit}")
