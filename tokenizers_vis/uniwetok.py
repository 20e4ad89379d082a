"""UniWeTok: tokens of many bits from a hybrid of convolutions and attention.

Paper: UniWeTok, arXiv:2602.14178. Its further parts compose: Pre-Post Distillation is the add-on
`distill`, the Generative-Aware Prior `bit_prior`. BitDance's tokenizer is the same body without
attention and SigLu, see `bitdance`. Reading order: `UniWeTokConfig`, `UniWeTok`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenizers_vis.hybrid import HybridDecoder, HybridEncoder
from tokenizers_vis.quantizers.base import Quantized
from tokenizers_vis.quantizers.binary import GroupedBinary
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer, pixel_losses
from tokenizers_vis.tokens import TokenLayout, Tokens, grid_layout

_DECODER_SEED = 0  # of the noise, where the caller gives no generator


@dataclass(frozen=True)
class UniWeTokConfig:
    """The numbers of a UniWeTok; the paper's in brackets, [?] = not published.

    Attributes:
        image_size: of the square images that `layout` speaks of, pixels [256]; others are taken.
        channels: of the convolutions, one stride of two each [a factor of 32].
        num_blocks: residual blocks per stride [?].
        attention_depth, num_heads, num_registers: of the attention on the lowest grid, in the
            encoder and in the decoder [2, 16, 4].
        num_bits, group_bits: of a token and of a group [128, ?].
        bound: "siglu" before the sign, or "none".
        entropy, diversity, commitment, temperature: as `GroupedBinary`'s [?].
        use_noise: give the decoder as many channels of noise as a token has bits [true]. Noise
            helps only against an adversary; pixel losses teach to ignore it.
        pixel_l1, pixel_l2: weights of the reconstruction's errors [?].
    """

    image_size: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    num_blocks: int = 1
    attention_depth: int = 2
    num_heads: int = 4
    num_registers: int = 4
    num_bits: int = 16
    group_bits: int = 8
    bound: Literal["siglu", "none"] = "siglu"
    entropy: float = 0.02
    diversity: float = 1.0
    commitment: float = 0.0
    temperature: float = 1.0
    use_noise: bool = True
    pixel_l1: float = 1.0
    pixel_l2: float = 1.0


class UniWeTok(VisualTokenizer):
    """Grid tokens of grouped bits, of images of any size that divides by the strides.

    Paper: UniWeTok, arXiv:2602.14178, from the abstract and the inference code. Differs: a layer
    norm instead of a group norm before the bits; cell centres as places (see `GridAttention`);
    losses and stages are our choice; no perceptual loss.
    """

    Config: ClassVar[type[UniWeTokConfig]] = UniWeTokConfig
    name = "uniwetok"

    def __init__(self, config: UniWeTokConfig) -> None:
        side, rest = divmod(config.image_size, 2 ** len(config.channels))
        if rest or not side:
            raise ValueError(
                f"image_size {config.image_size} does not divide by 2^{len(config.channels)}, the "
                "strides of channels"
            )
        quantizer = GroupedBinary(
            config.channels[-1],
            config.num_bits,
            group_bits=config.group_bits,
            bound=config.bound,
            entropy=config.entropy,
            diversity=config.diversity,
            commitment=config.commitment,
            temperature=config.temperature,
        )
        super().__init__(
            config,
            layout=grid_layout(side, side),
            codebooks=[quantizer.codebook],
            sample_shape=(3, config.image_size, config.image_size),
        )
        self.stride = 2 ** len(config.channels)
        self.quantizer = quantizer
        self.encoder = HybridEncoder(
            3,
            config.channels,
            num_blocks=config.num_blocks,
            attention_depth=config.attention_depth,
            num_heads=config.num_heads,
            num_registers=config.num_registers,
        )
        self.decoder = HybridDecoder(
            config.num_bits,
            config.channels,
            3,
            noise_channels=config.num_bits if config.use_noise else 0,
            num_blocks=config.num_blocks,
            attention_depth=config.attention_depth,
            num_heads=config.num_heads,
            num_registers=config.num_registers,
        )

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes samples of this shape: (3, H, W), both of whole cells."""
        sizes_fit = all(size > 0 and size % self.stride == 0 for size in shape[1:])
        return len(shape) == 3 and shape[0] == 3 and sizes_fit

    def layout_of(self, height: int, width: int) -> TokenLayout:
        """The layout of images of another size, in pixels."""
        return grid_layout(height // self.stride, width // self.stride)

    def embed(self, ids: Tensor) -> Tensor:
        return self.quantizer.embed(ids)

    def tokens_from_ids(
        self, ids: Tensor, length: Tensor | None = None, *, layout: TokenLayout | None = None
    ) -> Tokens:
        """As `VisualTokenizer.tokens_from_ids`, of images of any size.

        Args:
            ids: int64 [B, L, G], [B, L] of one group.
            length: int64 [B], how many of them count; None = all that are given.
            layout: `layout_of` another size; then ids of all its places.

        Raises:
            ValueError: ids of another shape, or outside the codebook.
        """
        if layout is None or layout == self.layout:
            return super().tokens_from_ids(ids, length)
        groups = self.codebooks[0].groups
        expected = (layout.num_tokens, groups)[: 2 if groups > 1 else 1]
        if ids.dtype != torch.int64 or ids.shape[1:] != expected:
            raise ValueError(
                f"expected int64 ids {['B', *expected]}, got {ids.dtype} {list(ids.shape)}"
            )
        self._check_range(ids)
        position = torch.arange(layout.num_tokens, device=ids.device)
        kept = torch.full((len(ids),), len(position), device=ids.device)
        mask = position < (kept if length is None else length)[:, None]
        return Tokens(self.embed(ids), mask, layout, ids)

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        self.check_samples(images)
        found = self._quantized(images)
        tokens = found.tokens(self.layout_of(*images.shape[2:]))
        drawn = self._image(found.embeddings, tokens.layout, generator)
        config = self.config
        losses = pixel_losses(drawn, images, l1=config.pixel_l1, l2=config.pixel_l2)
        output = TokenizerOutput(tokens, losses, drawn, found.metrics)
        return output.with_losses(found.losses)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._quantized(images).tokens(self.layout_of(*images.shape[2:]))

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        generator = generator or torch.Generator().manual_seed(_DECODER_SEED)
        seen = torch.where(tokens.mask[..., None], tokens.embeddings, 0)
        return self._image(seen, tokens.layout, generator)

    def _quantized(self, images: Tensor) -> Quantized:
        grid = self.encoder(images * 2 - 1)
        return self.quantizer(grid.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]

    def _image(
        self, embeddings: Tensor, layout: TokenLayout, generator: torch.Generator | None
    ) -> Tensor:
        grid = embeddings.transpose(1, 2).reshape(len(embeddings), -1, *layout.segments[0].shape)
        return (self.decoder(grid, generator=generator) + 1) / 2  # type: ignore[no-any-return]
