"""The baselines that users compare with: a convolutional grid of VQ, FSQ, LFQ or Gaussian tokens.

Papers: VQGAN, arXiv:2012.09841 (without its transformer); MAGVIT-2, arXiv:2310.05737, for LFQ;
FSQ, arXiv:2309.15505; latent diffusion's KL autoencoder, arXiv:2112.10752. BitDance's tokenizer
(arXiv:2602.14041) has a body of its own, `bitdance`. Perceptual and adversarial losses are
add-ons, so a plain one is trained on pixels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenizers_vis.convs import ConvDecoder, ConvEncoder
from tokenizers_vis.quantizers.base import Quantized, Quantizer
from tokenizers_vis.quantizers.binary import GroupedBinary
from tokenizers_vis.quantizers.gaussian import Gaussian
from tokenizers_vis.quantizers.library import Fsq, Lfq, Vq
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer, pixel_losses
from tokenizers_vis.tokens import Tokens, grid_layout


@dataclass(frozen=True)
class GridConfig:
    """The numbers of a grid tokenizer.

    Attributes:
        image_size: of the square images, pixels.
        channels: of the convolutions, one stride of two each.
        num_blocks: residual blocks per stride.
        quantizer: "vq", "fsq", "lfq" (MAGVIT-2's, of the library), "binary" (UniWeTok's) or "kl".
        vocab, dim: of VQ; dim also of "kl".
        levels: of FSQ.
        num_bits, group_bits: of "lfq" and "binary".
        pixel_l1, pixel_l2: weights of the reconstruction's errors.
    """

    image_size: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    num_blocks: int = 1
    quantizer: Literal["vq", "fsq", "lfq", "binary", "kl"] = "vq"
    vocab: int = 512
    dim: int = 8
    levels: tuple[int, ...] = (8, 8, 8)
    num_bits: int = 16
    group_bits: int = 8
    pixel_l1: float = 1.0
    pixel_l2: float = 1.0


class GridTokenizer(VisualTokenizer):
    """Convolutions down to a grid, a quantiser, convolutions up. See the module."""

    Config = GridConfig
    name = "grid"

    def __init__(self, config: GridConfig) -> None:
        side, rest = divmod(config.image_size, 2 ** len(config.channels))
        if rest or not side:
            raise ValueError(
                f"image_size {config.image_size} does not divide by 2^{len(config.channels)}, the "
                "strides of channels"
            )
        quantizer = _quantizer(config)
        super().__init__(
            config,
            layout=grid_layout(side, side),
            codebooks=[quantizer.codebook],
            sample_shape=(3, config.image_size, config.image_size),
        )
        self.quantizer = quantizer
        self.encoder = ConvEncoder(3, config.channels, num_blocks=config.num_blocks)
        self.decoder = ConvDecoder(
            quantizer.codebook.dim, config.channels, 3, num_blocks=config.num_blocks
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
            self._features(images), progress=progress, sample=True, generator=generator
        )
        tokens = found.tokens(self.layout)
        drawn = self._image(found.embeddings)
        config = self.config
        losses = pixel_losses(drawn, images, l1=config.pixel_l1, l2=config.pixel_l2)
        output = TokenizerOutput(tokens, losses, drawn, found.metrics)
        return output.with_losses(found.losses)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        found: Quantized = self.quantizer(
            self._features(images), sample=sample, generator=generator
        )
        return found.tokens(self.layout)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        return self._image(torch.where(tokens.mask[..., None], tokens.embeddings, 0))

    def _features(self, images: Tensor) -> Tensor:
        """[B, L, D], row by row."""
        return self.encoder(images * 2 - 1).flatten(2).transpose(1, 2)

    def _image(self, embeddings: Tensor) -> Tensor:
        side = self.layout.segments[0].shape
        grid = embeddings.transpose(1, 2).unflatten(2, side)
        return (self.decoder(grid) + 1) / 2


def _quantizer(config: GridConfig) -> Quantizer:
    width = config.channels[-1]
    makers = {
        "vq": lambda: Vq(width, config.vocab, dim=config.dim),
        "fsq": lambda: Fsq(width, config.levels),
        "lfq": lambda: Lfq(width, config.num_bits, group_bits=config.group_bits),
        "binary": lambda: GroupedBinary(width, config.num_bits, group_bits=config.group_bits),
        "kl": lambda: Gaussian(width, config.dim),
    }
    return makers[config.quantizer]()
