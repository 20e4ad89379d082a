"""Convolutions with attention at the lowest resolution: the body of UniWeTok and BitDance.

Papers: UniWeTok, arXiv:2602.14178, and BitDance, arXiv:2602.14041, from their inference code; the
adaptive group norm is MAGVIT-2's, arXiv:2310.05737. Reading order: `HybridEncoder`,
`HybridDecoder`, then their parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizers_vis.blocks import Transformer
from tokenizers_vis.convs import ConvEncoder, ResidualBlock, norm_groups
from tokenizers_vis.tokens import grid_layout


class HybridEncoder(nn.Module):
    """[B, in_channels, H, W] -> [B, channels[-1], H / 2^S, W / 2^S], S = len(channels).

    Args:
        in_channels, channels, num_blocks: as `ConvEncoder`'s.
        attention_depth: attention blocks on the last grid; 0 = convolutions alone.
        num_heads, num_registers: of them.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        *,
        num_blocks: int = 1,
        attention_depth: int = 2,
        num_heads: int = 4,
        num_registers: int = 4,
    ) -> None:
        super().__init__()
        self.convs = ConvEncoder(in_channels, channels, num_blocks=num_blocks)
        self.attention = _attention(channels[-1], attention_depth, num_heads, num_registers)

    def forward(self, images: Tensor) -> Tensor:
        return self.attention(self.convs(images))  # type: ignore[no-any-return]


class HybridDecoder(nn.Module):
    """[B, in_channels, h, w] -> [B, out_channels, h * 2^S, w * 2^S], S = len(channels).

    Args:
        in_channels: of the grid.
        channels: of the encoder, in its order; used from the last to the first.
        out_channels: of the images.
        noise_channels: of Gaussian noise beside the grid.
        num_blocks: residual blocks before every upsampling, and before the first.
        attention_depth, num_heads, num_registers: as `HybridEncoder`'s.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        *,
        noise_channels: int = 0,
        num_blocks: int = 1,
        attention_depth: int = 2,
        num_heads: int = 4,
        num_registers: int = 4,
    ) -> None:
        super().__init__()
        self.noise_channels = noise_channels
        width = channels[-1]
        self.first = nn.Conv2d(in_channels + noise_channels, width, 3, padding=1)
        self.attention = _attention(width, attention_depth, num_heads, num_registers)
        self.middle = nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
        self.styles, self.stages = nn.ModuleList(), nn.ModuleList()
        for after in [*reversed(channels[:-1]), channels[0]]:
            self.styles.append(AdaptiveGroupNorm(width, in_channels))
            blocks = [ResidualBlock(width) for _ in range(num_blocks)]
            up = [nn.Conv2d(width, 4 * after, 3, padding=1), nn.PixelShuffle(2)]
            self.stages.append(nn.Sequential(*blocks, *up))
            width = after
        self.last = nn.Sequential(
            nn.GroupNorm(norm_groups(width), width),
            nn.SiLU(),
            nn.Conv2d(width, out_channels, 3, padding=1),
        )

    def forward(self, grid: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Takes a generator of the noise."""
        x = grid
        if self.noise_channels:
            shape = (len(grid), self.noise_channels, *grid.shape[2:])
            noise = torch.randn(shape, generator=generator).to(grid)
            x = torch.cat([grid, noise], dim=1)
        x = self.middle(self.attention(self.first(x)))
        for style, stage in zip(self.styles, self.stages, strict=True):
            x = stage(style(x, grid))
        return self.last(x)  # type: ignore[no-any-return]


class GridAttention(nn.Module):
    """Attention blocks over a grid of any size, and registers that all places see.

    The places are the cells' centres in [0, 1], so that the same weights serve other resolutions.
    Differs: the published encoder and decoder stretch the corner cells to fixed corners of an
    8 x 8 grid, which moves the centres when the resolution changes.

    Args:
        channels: width.
        depth, num_heads: of the blocks.
        num_registers: learned, without a place.
    """

    def __init__(self, channels: int, depth: int, *, num_heads: int, num_registers: int) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(num_registers, channels))
        self.blocks = Transformer(channels, depth, num_heads=num_heads, rotary_axes=2)

    def forward(self, grid: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        num = len(self.registers)
        registers = self.registers.expand(len(grid), -1, -1)
        x = torch.cat([registers.to(grid), grid.flatten(2).transpose(1, 2)], dim=1)
        centres = grid_layout(*grid.shape[2:]).coords[:, 1:]
        coords = torch.cat([torch.full((num, 2), torch.nan), centres])
        x = self.blocks(x, coords=coords)[:, num:]
        return x.transpose(1, 2).reshape(grid.shape)  # type: ignore[no-any-return]


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose gain and offset are read from a style's spread and mean over the image.

    Gain and offset start at 1 and 0. Differs: the population's deviation, as a grid of one token
    has no other.

    Args:
        channels: that are normalised.
        style_channels: of the style.
    """

    def __init__(self, channels: int, style_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(channels), channels, affine=False)
        self.gain = nn.Linear(style_channels, channels)
        self.offset = nn.Linear(style_channels, channels)
        for layer in (self.gain, self.offset):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.ones_(self.gain.bias)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """[B, C, H, W], with a style [B, S, h, w]."""
        flat = style.flatten(2)
        spread = (flat.var(-1, correction=0) + 1e-6).sqrt()
        gain, offset = self.gain(spread), self.offset(flat.mean(-1))
        return gain[..., None, None] * self.norm(x) + offset[..., None, None]  # type: ignore[no-any-return]


def _attention(channels: int, depth: int, num_heads: int, num_registers: int) -> nn.Module:
    if depth == 0:
        return nn.Identity()
    return GridAttention(channels, depth, num_heads=num_heads, num_registers=num_registers)
