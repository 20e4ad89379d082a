"""Distortion of single images, and intervals of means; pure functions on tensors.

Images are float [B, 3, H, W] or clips [B, F, 3, H, W], in [0, 1]; every metric gives one number per
image or clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.errors import ShapeError

_LEAST_ERROR = 1e-10  # PSNR is at most 100 dB
_WINDOW, _SPREAD = 11, 1.5  # SSIM's Gaussian window, pixels


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def mse(images: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error [B]."""
    _check(images, originals)
    return (images - originals).square().flatten(1).mean(1)


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B], dB, of a peak of 1: -10 log10(mse), at most 100."""
    return -10 * torch.log10(mse(images, originals).clamp_min(_LEAST_ERROR))


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity [B], mean over channels and places (and frames).

    Paper: Wang et al. 2004, eq. 13, with its Gaussian window (11 x 11, sigma 1.5), K1 = 0.01 and
    K2 = 0.03, where the window fits. Equals scikit-image's with `gaussian_weights=True` and
    `use_sample_covariance=False`.

    Raises:
        ShapeError: shapes that differ, or images smaller than the window.
    """
    _check(images, originals)
    if min(images.shape[-2:]) < _WINDOW:
        raise ShapeError(
            f"SSIM needs images of {_WINDOW} x {_WINDOW} or more, got {list(images.shape)}"
        )
    x, y = (each.double().reshape(-1, 1, *each.shape[-2:]) for each in (images, originals))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * cov + c2) / (var_x + var_y + c2)
    return (luminance * structure).reshape(len(images), -1).mean(1).float()


def mean_interval(values: Tensor, *, seed: int = 0, num: int = 2000) -> Interval:
    """Mean of values [N] and the 2.5 and 97.5 % quantiles of its bootstrap (Efron 1979)."""
    data = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data), (num, len(data)), generator=generator)
    low, high = data[index].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=data.dtype))
    return Interval(float(data.mean()), float(low), float(high))


def share_interval(hits: Tensor) -> Interval:
    """Share of True in bool [N] and Wilson's 95 % interval, which holds at 0 and 1, too."""
    num, share, z = len(hits), float(hits.double().mean()), 1.959964
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def statistic_interval(
    statistic: Callable[[Tensor], float], num_rows: int, *, seed: int = 0, num: int = 100
) -> Interval:
    """A statistic of all rows, with the bootstrap's basic interval 2 s - quantiles.

    A Frechet distance of resampled rows is biased upwards, as rows repeat; the basic interval
    reflects that bias, where the plain quantiles would keep it.

    Args:
        statistic: of int64 row numbers.
        num_rows: that there are.
        seed: of the resampling.
        num: resamples.
    """
    generator = torch.Generator().manual_seed(seed)
    value = statistic(torch.arange(num_rows))
    drawn = torch.tensor(
        [statistic(torch.randint(num_rows, (num_rows,), generator=generator)) for _ in range(num)],
        dtype=torch.float64,
    )
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value, max(0.0, 2 * value - high), max(0.0, 2 * value - low))


def _blur(x: Tensor) -> Tensor:
    """[N, 1, H, W] under the window, where it fits."""
    at = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    weight = torch.exp(-0.5 * (at / _SPREAD) ** 2)
    weight = weight / weight.sum()
    rows = F.conv2d(x, weight.view(1, 1, -1, 1))
    return F.conv2d(rows, weight.view(1, 1, 1, -1))


def _check(images: Tensor, originals: Tensor) -> None:
    if images.shape != originals.shape or images.ndim not in (4, 5):
        raise ShapeError(
            "expected two equal shapes [B, 3, H, W] or [B, F, 3, H, W], got "
            f"{list(images.shape)} and {list(originals.shape)}"
        )
