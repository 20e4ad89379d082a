"""The convolutional networks of LlamaGen's VQ, under its parameter names.

They are taming-transformers' VQGAN (arXiv:2012.09841), in lists instead of named stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.blocks import attend

GROUPS = 32  # of every group norm; widths must divide by it


def group_norm(channels: int) -> nn.GroupNorm:
    """The norm of VQGAN."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions, added to the input; 1 x 1 where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = group_norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)
        self.changes_width = before != after

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(x) if self.changes_width else x)


class AttentionBlock(nn.Module):
    """Self-attention of all places with one head, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(x)
        # [B, 1, places, channels]
        query, key, value = (
            conv(inner).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v)
        )
        mixed = attend(query, key, value, None)[:, 0].transpose(1, 2)
        return x + self.proj_out(mixed.reshape(x.shape))


class Downsample(nn.Module):
    """A strided convolution, padded at the right and at the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Every place four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))  # type: ignore[no-any-return]


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention at the coarsest one."""

    def __init__(
        self, before: int, after: int, *, num_blocks: int, attends: bool, resample: str | None
    ) -> None:
        super().__init__()
        widths = [before] + [after] * num_blocks
        self.res = nn.ModuleList(ResnetBlock(*pair) for pair in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(after) for _ in range(num_blocks * attends))
        if resample == "down":
            self.downsample = Downsample(after)
        elif resample == "up":
            self.upsample = Upsample(after)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        if self.resample is None:
            return x
        return self.downsample(x) if self.resample == "down" else self.upsample(x)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResnetBlock(channels, channels), AttentionBlock(channels), ResnetBlock(channels, channels)]
    )


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, z_channels, H / f, W / f], f = 2 ** (len(widths) - 1).

    Args:
        channels: after the first convolution.
        widths: of the levels, fine to coarse.
        num_blocks: per level.
        z_channels: at the end.
    """

    def __init__(
        self, channels: int, widths: Sequence[int], *, num_blocks: int, z_channels: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        last = len(widths) - 1
        self.conv_blocks = nn.ModuleList(
            Level(
                before,
                after,
                num_blocks=num_blocks,
                attends=number == last,
                resample=None if number == last else "down",
            )
            for number, (before, after) in enumerate(pairwise([channels, *widths]))
        )
        self.mid = _middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, h * f, w * f], with one block more per level.

    Args: as `Encoder`'s; the widths are used from the last to the first.
    """

    def __init__(self, widths: Sequence[int], *, num_blocks: int, z_channels: int) -> None:
        super().__init__()
        coarse = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, coarse, 3, padding=1)
        self.mid = _middle(coarse)
        last = len(widths) - 1
        self.conv_blocks = nn.ModuleList(
            Level(
                before,
                after,
                num_blocks=num_blocks + 1,
                attends=number == 0,
                resample=None if number == last else "up",
            )
            for number, (before, after) in enumerate(pairwise([coarse, *reversed(widths)]))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]
