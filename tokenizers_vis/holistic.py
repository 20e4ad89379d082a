"""Images and clips as a few tokens without places: queries gather, patches are drawn from them.

What LARP (arXiv:2410.21264) and TiTok (arXiv:2406.07550) share: learned queries beside the patches
in a ViT with full attention, a quantiser on what the queries gathered, and a ViT that draws every
patch from all tokens. An image is a clip of one frame. Reading order: `Patches`, `QueryEncoder`,
`PatchDecoder`, `HolisticTokenizer`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizers_vis.blocks import Transformer
from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer, pixel_losses
from tokenizers_vis.tokens import Tokens, register_layout


@dataclass(frozen=True)
class Patches:
    """How samples are cut: [B, 3, H, W] or [B, F, 3, H, W] <-> [B, P, f * 3 * p * p].

    Patches go frames first, then row by row; P is the product of `grid`.

    Attributes:
        sample_shape: (3, H, W) of an image, or (F, 3, H, W) of a clip.
        size: p, pixels.
        frames: f of a patch; 1 for images.
    """

    sample_shape: tuple[int, ...]
    size: int
    frames: int = 1

    def __post_init__(self) -> None:
        *frames, _, height, width = self.sample_shape
        count = frames[0] if frames else 1
        if height % self.size or width % self.size or count % self.frames or self.frames < 1:
            raise ValueError(
                f"{count} frame(s) of {height} x {width} do not divide into patches of "
                f"{self.frames} frame(s) of {self.size} x {self.size}"
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along frames, rows and columns."""
        *frames, _, height, width = self.sample_shape
        count = frames[0] if frames else 1
        return count // self.frames, height // self.size, width // self.size

    @property
    def dim(self) -> int:
        """Numbers of a patch."""
        return self.frames * 3 * self.size**2

    def cut(self, images: Tensor) -> Tensor:
        """[B, *sample_shape] -> [B, P, dim]."""
        frames, rows, columns = self.grid
        size = self.size
        cells = images.reshape(-1, frames, self.frames, 3, rows, size, columns, size)
        return cells.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)

    def join(self, patches: Tensor) -> Tensor:
        """The inverse of `cut`."""
        size = self.size
        cells = patches.reshape(-1, *self.grid, self.frames, 3, size, size)
        return cells.permute(0, 1, 4, 5, 2, 6, 3, 7).reshape(-1, *self.sample_shape)


class QueryEncoder(nn.Module):
    """What learned queries gather from the patches of a sample: [B, *sample_shape] -> [B, K, D].

    Patches and queries see one another without a mask (LARP, section 3.1; TiTok, section 3.2).

    Args:
        patches: how samples are cut.
        num_queries: K.
        dim, depth, num_heads: of the transformer.
    """

    places: Tensor

    def __init__(
        self, patches: Patches, num_queries: int, *, dim: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.patches = patches
        self.patch_in = nn.Linear(patches.dim, dim)
        self.register_buffer("places", sincos_places(patches.grid, dim), persistent=False)
        # Of spread 1: queries of spread 0.02 start alike and stay alike (tokens that repeat one
        # another, measured in a run of 1,500 steps).
        self.queries = nn.Parameter(torch.randn(num_queries, dim))
        self.trunk = Transformer(dim, depth, num_heads=num_heads)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.patch_in(self.patches.cut(images) * 2 - 1) + self.places
        queries = self.queries.expand(len(images), -1, -1)
        return self.trunk(torch.cat([seen, queries], dim=1))[:, -len(self.queries) :]  # type: ignore[no-any-return]


class PatchDecoder(nn.Module):
    """A sample drawn from its tokens: [B, K, C] and bool [B, K] -> [B, *sample_shape].

    One query per patch, its fixed place plus a learned vector that all patches share: LARP's patch
    queries with their type embedding, and TiTok's mask tokens. A token beyond the mask is replaced
    by one learned vector, so that attention needs no mask.

    Args:
        patches: how samples are cut.
        num_tokens: K.
        in_dim: C.
        dim, depth, num_heads: of the transformer.
    """

    patch_places: Tensor
    token_places: Tensor

    def __init__(
        self,
        patches: Patches,
        num_tokens: int,
        in_dim: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.token_in = nn.Linear(in_dim, dim)
        self.patch_kind = nn.Parameter(0.02 * torch.randn(dim))
        self.token_kind = nn.Parameter(0.02 * torch.randn(dim))
        self.dropped = nn.Parameter(0.02 * torch.randn(dim))
        places = sincos_places(patches.grid, dim)
        self.register_buffer("patch_places", places, persistent=False)
        self.register_buffer("token_places", sincos_places((num_tokens,), dim), persistent=False)
        self.trunk = Transformer(dim, depth, num_heads=num_heads)
        self.patch_out = nn.Linear(dim, patches.dim)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        seen = torch.where(mask[..., None], self.token_in(embeddings), self.dropped)
        tokens = seen + self.token_places[: embeddings.shape[1]] + self.token_kind
        queries = (self.patch_places + self.patch_kind).expand(len(embeddings), -1, -1)
        x = self.trunk(torch.cat([tokens, queries], dim=1))[:, embeddings.shape[1] :]
        return (self.patches.join(self.patch_out(x)) + 1) / 2


@dataclass(frozen=True)
class HolisticConfig:
    """What the numbers of holistic tokenizers have in common.

    Attributes:
        image_size: of the square frames, pixels.
        patch_size: pixels.
        num_tokens: queries.
        vocab, code_dim: of the codebook.
        dim, num_heads: of both transformers.
        encoder_depth, decoder_depth: blocks.
        nested: a prefix of the tokens can stand for all; then train with `TokenDropout`
            (One-D-Piece's tail drop, arXiv:2501.10064; in neither LARP nor TiTok).
        pixel_l1, pixel_l2: weights of the reconstruction's errors.
    """

    image_size: int = 64
    patch_size: int = 8
    num_tokens: int = 32
    vocab: int = 1024
    code_dim: int = 16
    dim: int = 128
    num_heads: int = 4
    encoder_depth: int = 3
    decoder_depth: int = 3
    nested: bool = False
    pixel_l1: float = 1.0
    pixel_l2: float = 0.0


class HolisticTokenizer(VisualTokenizer):
    """A query encoder, a quantiser and a patch decoder. `Larp` and `TiTok` choose the quantiser.

    Args:
        config: of the tokenizer.
        quantizer: of features [B, K, config.dim].
        patches: how samples are cut.
    """

    def __init__(self, config: HolisticConfig, *, quantizer: Quantizer, patches: Patches) -> None:
        num = config.num_tokens
        super().__init__(
            config,
            layout=register_layout(num, nested=config.nested, name="query"),
            codebooks=[quantizer.codebook],
            token_counts=range(1, num + 1) if config.nested else (num,),
            sample_shape=patches.sample_shape,
        )
        dim, heads = config.dim, config.num_heads
        self.encoder = QueryEncoder(
            patches, num, dim=dim, depth=config.encoder_depth, num_heads=heads
        )
        self.quantizer = quantizer
        self.decoder = PatchDecoder(
            patches,
            num,
            quantizer.codebook.dim,
            dim=dim,
            depth=config.decoder_depth,
            num_heads=heads,
        )

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
        found = self.quantizer(
            self.encoder(images), progress=progress, sample=True, generator=generator
        )
        tokens = found.tokens(self.layout)
        if num_tokens is not None:
            tokens = tokens.keep(num_tokens)
        drawn = self.decoder(tokens.embeddings, tokens.mask)
        config = self.config
        losses = pixel_losses(drawn, images, l1=config.pixel_l1, l2=config.pixel_l2)
        return TokenizerOutput(tokens, losses, drawn, found.metrics).with_losses(found.losses)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        found: Quantized = self.quantizer(self.encoder(images), sample=sample, generator=generator)
        return found.tokens(self.layout)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        return self.decoder(tokens.embeddings, tokens.mask)  # type: ignore[no-any-return]


def sincos_places(shape: Sequence[int], dim: int) -> Tensor:
    """[prod(shape), dim]: sinusoids of the places of a grid, an equal share for each axis.

    Paper: Attention is all you need, arXiv:1706.03762, section 3.5, on several axes as in MAE
    (arXiv:2111.06377). An axis of one place has no share; channels that are left over are zero.

    Raises:
        ValueError: fewer than two channels per axis.
    """
    places = torch.zeros(math.prod(shape), dim)
    sizes = [size for size in shape if size > 1]
    if not sizes:
        return places
    half = dim // (2 * len(sizes))
    if half < 1:
        raise ValueError(f"width {dim} is too narrow for places on {len(sizes)} axes")
    # With one axis cartesian_prod gives [N], not [N, 1].
    index = torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, len(sizes))
    frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    angle = index.float()[..., None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)
    places[:, : waves.shape[1]] = waves
    return places
