"""HieraTok: continuous tokens of several scales; the fine ones see the coarse, not conversely.

Paper: HieraTok, arXiv:2509.23736 (no code is public). The map of a ViT is pooled to several scales,
their sequence runs through scale-causal attention on both sides of a narrow Gaussian bottleneck,
and the outputs of one scale are read out as the image. Reading order: `HieraTok.forward`,
`_latents`, `hidden`, `_read_out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.blocks import (
    Transformer,
    image_to_patches,
    level_causal_mask,
    patches_to_image,
)
from tokenizers_vis.quantizers.base import LossTerm, Quantized
from tokenizers_vis.quantizers.gaussian import Gaussian
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer, pixel_losses
from tokenizers_vis.tokens import Tokens, scale_layout


@dataclass(frozen=True)
class HieraTokConfig:
    """The numbers of a HieraTok. The paper's are not known to us; all of these are ours.

    Attributes:
        image_size: of the square images, pixels.
        patch_size: of a patch, pixels.
        scales: sides of the grids of tokens, the last that of the patches. One scale alone is the
            plain tokenizer that the paper compares with.
        latent_dim: width of a token.
        kl: weight of the divergence from N(0, 1), per dimension.
        dim, num_heads: of the transformers.
        encoder_depth: blocks over the patches, before pooling.
        scale_depth: scale-causal blocks of the encoder.
        decoder_depth: scale-causal blocks of the decoder.
        readout_depth: blocks from one scale's outputs to patches, the same for all scales.
        auxiliary: weight of the coarse scales' reconstructions, averaged over these scales; 0 =
            only prefixes that token dropout draws are trained.
        pixel_l1, pixel_l2: weights of the reconstruction's errors.
    """

    image_size: int = 64
    patch_size: int = 8
    scales: tuple[int, ...] = (1, 2, 4, 8)
    latent_dim: int = 16
    kl: float = 1e-5
    dim: int = 128
    num_heads: int = 4
    encoder_depth: int = 2
    scale_depth: int = 2
    decoder_depth: int = 3
    readout_depth: int = 1
    auxiliary: float = 0.5
    pixel_l1: float = 0.0
    pixel_l2: float = 1.0


class HieraTok(VisualTokenizer):
    """Pooled scales, scale-causal attention, continuous tokens. See the module.

    From the paper: the multi-scale down-sampling of the token map and the scale-causal attention.
    Ours, because the paper's choice is not known: which scales; a Gaussian bottleneck; scale-causal
    attention in encoder and decoder; a prefix of scales is decoded from its last scale, whose
    outputs are enlarged, joined by a query per patch, and read out; every coarse scale is trained
    to reconstruct the image itself (auxiliary losses, squared error), so that a prefix stands for
    the whole image. Perceptual and adversarial losses are add-ons.
    """

    Config = HieraTokConfig
    name = "hieratok"
    coords: Tensor
    level: Tensor
    mask: Tensor

    def __init__(self, config: HieraTokConfig) -> None:
        side, rest = divmod(config.image_size, config.patch_size)
        if rest or not config.scales or config.scales[-1] != side:
            raise ValueError(
                f"the last of scales {list(config.scales)} must be the grid of patches: image_size "
                f"{config.image_size} over patch_size {config.patch_size}"
            )
        layout = scale_layout(config.scales)
        quantizer = Gaussian(config.dim, config.latent_dim, kl=config.kl)
        super().__init__(
            config,
            layout=layout,
            codebooks=[quantizer.codebook],
            token_counts=layout.starts[1:],
            sample_shape=(3, config.image_size, config.image_size),
        )
        dim, patch_dim = config.dim, 3 * config.patch_size**2
        trunk: dict[str, Any] = {"num_heads": config.num_heads, "rotary_axes": 2}
        self.register_buffer("coords", layout.coords[:, 1:], persistent=False)
        self.register_buffer("level", layout.level, persistent=False)
        self.register_buffer("mask", level_causal_mask(layout.level), persistent=False)
        self.patch_in = nn.Linear(patch_dim, dim)
        self.encoder = Transformer(dim, config.encoder_depth, **trunk)
        self.scale_embedding = nn.Parameter(0.5 * torch.randn(len(config.scales), dim))
        self.scale_encoder = Transformer(dim, config.scale_depth, **trunk)
        self.quantizer = quantizer
        self.token_in = nn.Linear(config.latent_dim, dim)
        self.token_scale = nn.Parameter(0.5 * torch.randn(len(config.scales), dim))
        self.decoder = Transformer(dim, config.decoder_depth, **trunk)
        self.queries = nn.Parameter(0.5 * torch.randn(side * side, dim))
        self.readout = Transformer(dim, config.readout_depth, **trunk)
        self.patch_out = nn.Linear(dim, patch_dim)

    def embed(self, ids: Tensor) -> Tensor:
        return self.quantizer.embed(ids)

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        self.check_samples(images)
        found = self._latents(images, progress=progress, sample=True, generator=generator)
        tokens = found.tokens(self.layout)
        if num_tokens is not None:
            tokens = tokens.keep(num_tokens)
        scales = self._scales(tokens)
        kept = self._last_scale(tokens.mask)
        drawn = self._read_out(scales[kept, torch.arange(len(images), device=kept.device)])
        config = self.config
        losses = pixel_losses(drawn, images, l1=config.pixel_l1, l2=config.pixel_l2)
        if self.config.auxiliary and len(self.config.scales) > 1:
            error = self._coarse_error(scales[:-1], kept, images)
            losses["auxiliary"] = LossTerm(self.config.auxiliary, error)
        return TokenizerOutput(tokens, losses, drawn, found.metrics).with_losses(found.losses)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._latents(images, sample=sample, generator=generator).tokens(self.layout)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        kept = self._last_scale(tokens.mask)
        everyone = torch.arange(len(tokens), device=kept.device)
        return self._read_out(self._scales(tokens)[kept, everyone])

    def _latents(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        sample: bool,
        generator: torch.Generator | None,
    ) -> Quantized:
        """Tokens [B, L, latent_dim] of all scales."""
        patches = self.patch_in(image_to_patches(images * 2 - 1, self.config.patch_size))
        x = self.encoder(patches, coords=self._patch_coords())
        grid = _as_grid(x, self.config.scales[-1])
        pooled = [
            F.interpolate(grid, size=(size, size), mode="area") for size in self.config.scales
        ]
        x = torch.cat([each.flatten(2) for each in pooled], dim=2).transpose(1, 2)
        x = x + self.scale_embedding[self.level]
        x = self.scale_encoder(x, mask=self.mask, coords=self.coords)
        found: Quantized = self.quantizer(x, progress=progress, sample=sample, generator=generator)
        return found

    def hidden(self, tokens: Tokens) -> Tensor:
        """Outputs of the decoder's scale-causal blocks, [B, L, dim]."""
        seen = torch.where(tokens.mask[..., None], tokens.embeddings, 0)
        x = self.token_in(seen) + self.token_scale[self.level]
        outputs: Tensor = self.decoder(x, mask=self.mask, coords=self.coords)
        return outputs

    def _last_scale(self, mask: Tensor) -> Tensor:
        """Int64 [B]: the last scale of which no token is hidden; the first where there is none.

        A scale that is there in part is not looked at, nor are those after it: attention is
        scale-causal, so they change nothing in the scales before.
        """
        length = mask.sum(1, keepdim=True)
        ends = torch.tensor(self.layout.starts[1:], device=mask.device)
        return ((length >= ends).sum(1) - 1).clamp_min(0)

    def _scales(self, tokens: Tokens) -> Tensor:
        """Every scale's outputs, enlarged to the grid of patches: [S, B, P, dim]."""
        hidden, sides = self.hidden(tokens), self.config.scales
        parts = [hidden[:, self.layout.slice_of(number)] for number in range(len(sides))]
        grids = [_as_grid(part, side) for part, side in zip(parts, sides, strict=True)]
        size = (sides[-1], sides[-1])
        large = torch.stack([F.interpolate(grid, size=size, mode="nearest") for grid in grids])
        return large.flatten(3).transpose(2, 3)

    def _read_out(self, enlarged: Tensor) -> Tensor:
        """Images of one scale's outputs [B, P, dim]."""
        x = self.readout(enlarged + self.queries, coords=self._patch_coords())
        size = self.config.image_size
        patches = self.patch_out(x)
        return (patches_to_image(patches, self.config.patch_size, height=size, width=size) + 1) / 2

    def _coarse_error(self, scales: Tensor, kept: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of the images of coarse scales [S - 1, B, P, dim], where kept [B]."""
        drawn = self._read_out(scales.flatten(0, 1)).unflatten(0, scales.shape[:2])
        error = (drawn - images).square().mean((2, 3, 4))
        is_kept = torch.arange(len(scales), device=kept.device)[:, None] <= kept
        return (error * is_kept).sum() / is_kept.sum()

    def _patch_coords(self) -> Tensor:
        return self.coords[self.layout.slice_of(-1)]


def _as_grid(features: Tensor, side: int) -> Tensor:
    """[B, side * side, C] -> [B, C, side, side]."""
    return features.transpose(1, 2).unflatten(2, (side, side))
