"""TiTok's networks under their published parameter names: two ViTs and MaskGIT's pixel decoder.

Paper: TiTok, arXiv:2406.07550, section 3.2. Heads are 64 wide in all published sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.blocks import patches_to_image
from tokenizers_vis.published.vqgan import group_norm

HEAD_DIM = 64


class TransformerBlock(nn.Module):
    """CLIP's pre-norm block: torch's own attention, and a GELU MLP of four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, dim // HEAD_DIM, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, 4 * dim))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.ln_1(x)
        x = x + self.attn(inner, inner, inner, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Vit(nn.Module):
    """What both networks share: a class token, places, blocks between two norms.

    Args:
        dim, depth: of the blocks; dim is a multiple of 64.
        grid: patches per side.
        num_tokens: 1-D tokens.
    """

    def __init__(self, dim: int, depth: int, *, grid: int, num_tokens: int) -> None:
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"TiTok's width is a multiple of {HEAD_DIM}, got {dim}")
        spread = dim**-0.5
        self.grid = grid
        self.class_embedding = nn.Parameter(spread * torch.randn(1, dim))
        self.positional_embedding = nn.Parameter(spread * torch.randn(grid**2 + 1, dim))
        self.latent_token_positional_embedding = nn.Parameter(spread * torch.randn(num_tokens, dim))
        self.ln_pre = nn.LayerNorm(dim)
        self.transformer = nn.ModuleList(TransformerBlock(dim) for _ in range(depth))
        self.ln_post = nn.LayerNorm(dim)

    def mixed(self, patches: Tensor, tokens: Tensor) -> Tensor:
        """[B, 1 + P + L, D] of patches [B, P, D] and tokens [B, L, D], before the last norm."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        patches = torch.cat([first, patches], dim=1) + self.positional_embedding
        x = torch.cat([patches, tokens + self.latent_token_positional_embedding], dim=1)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        return x


class TiTokEncoder(Vit):
    """Images in [0, 1] and latent tokens -> features [B, L, out_dim] of the tokens.

    Args:
        out_dim: of a token; twice its width where it is a Gaussian's mean and log-variance.
        is_legacy: the first checkpoints read the tokens' [L, D] numbers as [D, L] without turning
            them before the last projection; their weights were trained so and need it.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        grid: int,
        num_tokens: int,
        patch_size: int,
        out_dim: int,
        is_legacy: bool,
    ) -> None:
        super().__init__(dim, depth, grid=grid, num_tokens=num_tokens)
        self.is_legacy = is_legacy
        self.patch_embed = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.conv_out = nn.Conv2d(dim, out_dim, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        tokens = latent_tokens.expand(len(images), -1, -1)
        x = self.ln_post(self.mixed(patches, tokens)[:, 1 + self.grid**2 :])
        batch, length, dim = x.shape
        columns = x.reshape(batch, dim, length) if self.is_legacy else x.transpose(1, 2)
        return self.conv_out(columns[..., None])[..., 0].transpose(1, 2)  # type: ignore[no-any-return]


class TiTokDecoder(Vit):
    """Tokens [B, L, C] -> logits of MaskGIT's codes [B, V, grid, grid], or pixels if not legacy.

    Args:
        token_dim: of a token.
        patch_size: of the pixels.
        proxy_vocab: of MaskGIT's VQ, 1024; None = the newer checkpoints, which draw pixels.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        grid: int,
        num_tokens: int,
        patch_size: int,
        token_dim: int,
        proxy_vocab: int | None,
    ) -> None:
        super().__init__(dim, depth, grid=grid, num_tokens=num_tokens)
        self.patch_size = patch_size
        self.draws_pixels = proxy_vocab is None
        self.decoder_embed = nn.Linear(token_dim, dim)
        self.mask_token = nn.Parameter(dim**-0.5 * torch.randn(1, 1, dim))
        if proxy_vocab is None:
            self.ffn = nn.Sequential(nn.Conv2d(dim, 3 * patch_size**2, 1))
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.ffn = nn.Sequential(
                nn.Conv2d(dim, 2 * dim, 1), nn.Tanh(), nn.Conv2d(2 * dim, proxy_vocab, 1)
            )

    def forward(self, embeddings: Tensor) -> Tensor:
        patches = self.mask_token.expand(len(embeddings), self.grid**2, -1)
        x = self.mixed(patches, self.decoder_embed(embeddings))[:, 1 : 1 + self.grid**2]
        x = self.ln_post(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        x = self.ffn(x)
        if not self.draws_pixels:
            return x
        side, size = self.grid * self.patch_size, self.patch_size
        # A patch's numbers run (row, column, channel); ours run (channel, row, column).
        patches = x.flatten(2).transpose(1, 2).unflatten(2, (size**2, 3)).transpose(2, 3).flatten(2)
        return self.conv_out(patches_to_image(patches, size, height=side, width=side))  # type: ignore[no-any-return]


class ProxyBlock(nn.Module):
    """A residual block of MaskGIT's VQGAN as converted to torch.

    Where the width changes, the 1 x 1 convolution sees the block's own output and not its input:
    the weights were made so.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm2 = group_norm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        if before != after:
            self.nin_shortcut = nn.Conv2d(after, after, 1, bias=False)
        self.changes_width = before != after

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(inner) if self.changes_width else x)


class ProxyLevel(nn.Module):
    """Residual blocks, and a factor of two where there is a finer level."""

    def __init__(self, before: int, after: int, *, num_blocks: int, upsamples: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ProxyBlock(after if number else before, after) for number in range(num_blocks)
        )
        if upsamples:
            self.upsample_conv = nn.Conv2d(after, after, 3, padding=1)
        self.upsamples = upsamples

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if not self.upsamples:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0))  # type: ignore[no-any-return]


class ProxyDecoder(nn.Module):
    """MaskGIT's decoder, arXiv:2202.04200: [B, z, g, g] -> pixels [B, 3, g * f, g * f].

    Args:
        widths: of the levels, fine to coarse; a factor of two between each.
        num_blocks: per level, and in the middle.
        z_channels: of a code.
    """

    def __init__(self, widths: Sequence[int], *, num_blocks: int, z_channels: int) -> None:
        super().__init__()
        coarse = widths[-1]
        self.conv_in = nn.Conv2d(z_channels, coarse, 3, padding=1)
        self.mid = nn.ModuleList(ProxyBlock(coarse, coarse) for _ in range(num_blocks))
        coarser = [*widths[1:], coarse]
        self.up = nn.ModuleList(
            ProxyLevel(before, after, num_blocks=num_blocks, upsamples=number > 0)
            for number, (before, after) in enumerate(zip(coarser, widths, strict=True))
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *reversed(self.up)):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]
