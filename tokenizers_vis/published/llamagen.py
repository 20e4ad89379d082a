"""LlamaGen's image tokenizer: a VQGAN with short codes of unit length, ids row by row.

Paper: LlamaGen, arXiv:2406.06525, section 2.1. Checkpoints: vq_ds16_c2i.pt, vq_ds16_t2i.pt and
vq_ds8_c2i.pt of FoundationVision/LlamaGen, a torch file {"model": weights} ("ema" before it where
there is one), and the same weights as safetensors. The networks see and give [-1, 1]. The code is
public; what it fixes (32 groups, codes of unit length) is fixed here, and the rest is read from the
weights, also the factor 8 or 16. Training adds perceptual and adversarial losses in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizers_vis.published.codebook import CodeTable, reconstruction_output
from tokenizers_vis.published.sources import count_of, find_file
from tokenizers_vis.published.vqgan import Decoder, Encoder
from tokenizers_vis.quantizers.base import Quantized
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import Tokens, grid_layout
from tokenizers_vis.weights import fit_weights, load_tensors

FILE = "vq_ds16_c2i.pt"
_HOLDERS = ("ema", "model", "state_dict")  # the keys of a torch file, in the published code's order
_BOOKKEEPING = "quantize.codebook_used"  # the ids last seen in training


@dataclass(frozen=True)
class LlamaGenConfig:
    """The numbers of LlamaGen's VQ-16; VQ-8 has the widths (128, 256, 256, 512).

    Attributes:
        image_size: of the square images, pixels; the networks take any that the factor divides.
        channels: after the first convolution.
        widths: of the levels, fine to coarse; a factor of two between each.
        num_blocks: residual blocks per level.
        z_channels: between the networks and the codes' width.
        vocab, dim: of the codes.
    """

    image_size: int = 256
    channels: int = 128
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    num_blocks: int = 2
    z_channels: int = 256
    vocab: int = 16384
    dim: int = 8


class LlamaGenVq(VisualTokenizer):
    """A grid of ids. See the module."""

    Config = LlamaGenConfig
    name = "llamagen_vq"

    def __init__(self, config: LlamaGenConfig) -> None:
        side, rest = divmod(config.image_size, 2 ** (len(config.widths) - 1))
        if rest or not side:
            raise ValueError(
                f"image_size {config.image_size} does not divide by 2^{len(config.widths) - 1}"
            )
        quantize = CodeTable(config.vocab, config.dim, unit_length=True)
        super().__init__(
            config,
            layout=grid_layout(side, side),
            codebooks=[quantize.codebook],
            sample_shape=(3, config.image_size, config.image_size),
        )
        sizes = {"num_blocks": config.num_blocks, "z_channels": config.z_channels}
        self.encoder = Encoder(config.channels, config.widths, **sizes)
        self.decoder = Decoder(config.widths, **sizes)
        self.quantize = quantize
        self.quant_conv = nn.Conv2d(config.z_channels, config.dim, 1)
        self.post_quant_conv = nn.Conv2d(config.dim, config.z_channels, 1)

    @classmethod
    def from_published(
        cls, source: Path | str, *, revision: str | None = None, image_size: int = 256
    ) -> LlamaGenVq:
        """Reads a published file.

        Args:
            source: the file, a folder with vq_ds16_c2i.pt, or on the Hub
                "FoundationVision/LlamaGen/vq_ds8_c2i.pt" (without the file: vq_ds16_c2i.pt).
            revision: on the Hub.
            image_size: that the tokenizer is to take; not in the file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: weights that are not these, or a file that holds more than tensors.
        """
        path = find_file(source, FILE, revision=revision)
        stored = load_tensors(path)
        holder = next((key for key in _HOLDERS if key in stored), None)
        if holder is None and not all(isinstance(value, Tensor) for value in stored.values()):
            raise ValueError(f"{path} has none of the keys {', '.join(_HOLDERS)}: {list(stored)}")
        weights = dict(stored if holder is None else stored[holder])
        weights.pop(_BOOKKEEPING, None)
        tokenizer = cls(_config_of(weights, image_size=image_size, where=str(path)))
        fit_weights(tokenizer, weights, where=str(path))
        return tokenizer.eval()

    def embed(self, ids: Tensor) -> Tensor:
        return self.quantize.embed(ids)

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        self.check_samples(images)
        found = self._found(images)
        return reconstruction_output(images, self._image(found.embeddings), found, self.layout)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._found(images).tokens(self.layout)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        return self._image(torch.where(tokens.mask[..., None], tokens.embeddings, 0))

    def _found(self, images: Tensor) -> Quantized:
        grid = self.quant_conv(self.encoder(images * 2 - 1))
        found: Quantized = self.quantize(grid.flatten(2).transpose(1, 2))
        return found

    def _image(self, embeddings: Tensor) -> Tensor:
        grid = embeddings.transpose(1, 2).unflatten(2, self.layout.segments[0].shape)
        return (self.decoder(self.post_quant_conv(grid)) + 1) / 2


def _config_of(weights: Mapping[str, Tensor], *, image_size: int, where: str) -> LlamaGenConfig:
    """The numbers that the shapes of the weights say."""
    levels = count_of(weights, "encoder.conv_blocks", where=where)
    num_blocks = count_of(weights, "encoder.conv_blocks.0.res", where=where)
    needed = [f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(levels)]
    needed += ["quantize.embedding.weight", "encoder.conv_out.weight"]
    if missing := [key for key in needed if key not in weights]:
        raise ValueError(f"{where} does not fit: {missing[0]} is missing")
    vocab, dim = weights["quantize.embedding.weight"].shape
    return LlamaGenConfig(
        image_size=image_size,
        channels=weights[needed[0]].shape[1],
        widths=tuple(weights[key].shape[0] for key in needed[:levels]),
        num_blocks=num_blocks,
        z_channels=weights["encoder.conv_out.weight"].shape[0],
        vocab=vocab,
        dim=dim,
    )
