"""A small convolutional encoder and decoder, VQGAN-like: residual blocks between strides of two."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, group norms and SiLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first_norm = nn.GroupNorm(norm_groups(channels), channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second_norm = nn.GroupNorm(norm_groups(channels), channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(F.silu(self.first_norm(x)))
        return x + self.second(F.silu(self.second_norm(inner)))


class ConvEncoder(nn.Module):
    """[B, in_channels, H, W] -> [B, channels[-1], H / 2^S, W / 2^S], S = len(channels).

    Args:
        in_channels: of the images.
        channels: after every stride.
        num_blocks: residual blocks after every stride.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], *, num_blocks: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for width in channels:
            layers.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            layers += [ResidualBlock(width) for _ in range(num_blocks)]
            before = width
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # type: ignore[no-any-return]


class ConvDecoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h * 2^S, w * 2^S], S = len(channels).

    Args:
        in_channels: of the grid.
        channels: of the encoder, in its order; used from the last to the first.
        out_channels: of the images.
        num_blocks: residual blocks before every upsampling.
    """

    def __init__(
        self, in_channels: int, channels: Sequence[int], out_channels: int, *, num_blocks: int = 1
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels[-1], 3, padding=1)]
        widths = [*reversed(channels), channels[0]]
        for width, after in itertools.pairwise(widths):
            layers += [ResidualBlock(width) for _ in range(num_blocks)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, after, 3, padding=1)]
        layers += [
            nn.GroupNorm(norm_groups(widths[-1]), widths[-1]),
            nn.SiLU(),
            nn.Conv2d(widths[-1], out_channels, 3, padding=1),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, grid: Tensor) -> Tensor:
        return self.layers(grid)  # type: ignore[no-any-return]


def norm_groups(channels: int) -> int:
    """Groups of a group norm: 8, or the largest smaller power of two that divides."""
    return next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
