"""TokenFlow: one index that says both what is there and how it looks, coarse to fine.

Paper: TokenFlow, arXiv:2412.03069. A semantic and a pixel encoder share a grid; one id chooses a
code in a table of each (`quantizers.shared`), scale after scale of the residual
(`quantizers.multiscale`). Pixels are decoded from both, a teacher's features from the semantic
part. Reading order: `TokenFlow.forward`, `_features`, `semantics`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizers_vis.blocks import Transformer
from tokenizers_vis.convs import ConvDecoder, ConvEncoder
from tokenizers_vis.quantizers.base import LossTerm, Quantized
from tokenizers_vis.quantizers.multiscale import MultiScale
from tokenizers_vis.quantizers.shared import SharedIndexVq
from tokenizers_vis.teachers import Teacher, cosine_distance, on_grid
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer, pixel_losses
from tokenizers_vis.tokens import Tokens, grid_layout, scale_layout


@dataclass(frozen=True)
class TokenFlowConfig:
    """The numbers of a TokenFlow; the paper's, or the released code's, in brackets.

    Attributes:
        image_size: of the square images, pixels [224 to 384].
        channels: of the pixel convolutions, one stride of two each [a 16-fold LlamaGen one].
        num_blocks: residual blocks per stride.
        scales: sides of the grids, the last that of the encoders' [1, 2, 4, 6, 8, 10, 12, 14].
        vocab: codes of either table [32768].
        semantic_dim, pixel_dim: widths of a code's parts [32, 8]. semantic_dim 0 = the pixel-only
            tokenizer of the same size, to compare with.
        pixel_weight: w of the choice of a code; the semantic distance has weight 1 [1.0].
        dim, num_heads: of the transformers.
        semantic_depth: blocks of the semantic encoder, behind strides as wide as the pixel ones
            [CLIP's, ViTamin's or SigLIP's, initialised from the teacher].
        decoder_depth: blocks that lead from semantic codes to the teacher's features [3].
        teacher_dim: width of the teacher's features.
        scale_dropout: share of the training images that lose a scale [0.1].
        semantic, pixel_l1, pixel_l2: weights of the losses [semantic 1, pixel_l2 1].
        commitment: [0.25].
    """

    image_size: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    num_blocks: int = 1
    scales: tuple[int, ...] = (1, 2, 4, 8)
    vocab: int = 1024
    semantic_dim: int = 16
    pixel_dim: int = 8
    pixel_weight: float = 1.0
    dim: int = 128
    num_heads: int = 4
    semantic_depth: int = 2
    decoder_depth: int = 3
    teacher_dim: int = 128
    scale_dropout: float = 0.1
    semantic: float = 1.0
    pixel_l1: float = 0.0
    pixel_l2: float = 1.0
    commitment: float = 0.25


class SemanticEncoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1] -> features [B, n * n, dim]: strides, then a transformer.

    Of its own so that it can be a teacher's body and begin where the teacher stands, as the paper's
    does: `tokenizer.semantic_encoder.load_state_dict(teacher_body.state_dict())`.
    """

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        side = _side(config)
        self.stem = ConvEncoder(3, config.channels, num_blocks=config.num_blocks)
        self.widen = nn.Linear(config.channels[-1], config.dim)
        self.trunk = Transformer(
            config.dim, config.semantic_depth, num_heads=config.num_heads, rotary_axes=2
        )
        coords = grid_layout(side, side).coords[:, 1:]
        self.register_buffer("coords", coords, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.widen(self.stem(images * 2 - 1).flatten(2).transpose(1, 2))
        features: Tensor = self.trunk(x, coords=self.coords)
        return features


class TokenFlow(VisualTokenizer):
    """Dual encoders and codebooks, one shared index, residual scales. See the module.

    Any prefix of scales is a legal number of tokens: the residual makes it so, without training
    for it. Differs from the paper: sizes; the semantic encoder has a convolutional stem, as
    ViTamin's; perceptual and adversarial losses are add-ons. The teacher is no part of the
    tokenizer: `teach` sets it for training, and what is saved has no trace of it.
    """

    Config = TokenFlowConfig
    name = "tokenflow"

    def __init__(self, config: TokenFlowConfig) -> None:
        side = _side(config)
        if config.scales[-1] != side:
            raise ValueError(
                f"the last of scales {list(config.scales)} must be the encoders' grid, {side}: "
                f"image_size {config.image_size} over 2^{len(config.channels)}"
            )
        dims: tuple[int, ...] = (config.pixel_dim,)
        weights: tuple[float, ...] = (1.0,)
        if config.semantic_dim:
            dims = (config.semantic_dim, config.pixel_dim)
            weights = (1.0, config.pixel_weight)
        table = SharedIndexVq(dims, config.vocab, weights=weights, commitment=config.commitment)
        quantizer = MultiScale(table, config.scales, scale_dropout=config.scale_dropout)
        super().__init__(
            config,
            layout=scale_layout(config.scales),
            codebooks=[quantizer.codebook],
            token_counts=quantizer.ends,
            sample_shape=(3, config.image_size, config.image_size),
        )
        width = config.channels[-1]
        self.part_dims = dims
        self.quantizer = quantizer
        self.pixel_encoder = ConvEncoder(3, config.channels, num_blocks=config.num_blocks)
        self.pixel_in = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.pixel_dim))
        self.pixel_decoder = ConvDecoder(
            sum(dims), config.channels, 3, num_blocks=config.num_blocks
        )
        self._teacher: tuple[Teacher, ...] = ()  # in a tuple, so that no module adopts it
        if config.semantic_dim:
            dim = config.dim
            self.semantic_encoder = SemanticEncoder(config)
            self.semantic_in = nn.Sequential(
                nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, config.semantic_dim)
            )
            self.semantic_widen = nn.Linear(config.semantic_dim, dim)
            self.semantic_decoder = Transformer(
                dim, config.decoder_depth, num_heads=config.num_heads, rotary_axes=2
            )
            self.semantic_out = nn.Linear(dim, config.teacher_dim)

    def teach(self, teacher: Teacher | None) -> TokenFlow:
        """Sets the teacher of the training forward (see `teachers`); None = no semantic loss.

        Raises:
            ValueError: a pixel-only tokenizer, one whose semantic loss has no weight, or features
                that are not teacher_dim wide.
        """
        if teacher is not None and not (self.config.semantic_dim and self.config.semantic):
            raise ValueError("a teacher needs semantic_dim > 0 and a weight of the semantic loss")
        if teacher is not None:
            blank = next(self.parameters()).new_zeros(1, *self.sample_shape)
            width = on_grid(teacher(blank), self.config.scales[-1]).shape[-1]
            if width != self.config.teacher_dim:
                raise ValueError(
                    f"the teacher's features are {width} wide, teacher_dim is "
                    f"{self.config.teacher_dim}"
                )
        self._teacher = () if teacher is None else (teacher,)
        return self

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
        if num_tokens is not None:
            tokens = tokens.keep(num_tokens)
        drawn = self._image(tokens)
        config = self.config
        losses = pixel_losses(drawn, images, l1=config.pixel_l1, l2=config.pixel_l2)
        for teacher in self._teacher:
            wanted = on_grid(teacher(images), self.config.scales[-1])
            error = cosine_distance(self.semantics(tokens), wanted).mean()
            losses["semantic"] = LossTerm(self.config.semantic, error)
        return TokenizerOutput(tokens, losses, drawn, found.metrics).with_losses(found.losses)

    def semantics(self, tokens: Tokens) -> Tensor:
        """What the tokens say of the teacher's features, [B, n * n, teacher_dim]."""
        codes = self.parts(tokens)[0]
        x = self.semantic_decoder(self.semantic_widen(codes), coords=self.semantic_encoder.coords)
        features: Tensor = self.semantic_out(x)
        return features

    def parts(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """The scales' sum, part by part: semantic [B, n * n, semantic_dim], then pixel.

        A pixel-only tokenizer has but the latter.
        """
        assembled = self.quantizer.assemble(tokens.embeddings, tokens.mask)
        return assembled.split(self.part_dims, dim=-1)

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
        return self._image(tokens)

    def _features(self, images: Tensor) -> Tensor:
        """[B, n * n, C]: the semantic features, then the pixel features."""
        pixel = self.pixel_in(self.pixel_encoder(images * 2 - 1).flatten(2).transpose(1, 2))
        if not self.config.semantic_dim:
            return pixel
        return torch.cat([self.semantic_in(self.semantic_encoder(images)), pixel], dim=-1)

    def _image(self, tokens: Tokens) -> Tensor:
        assembled = self.quantizer.assemble(tokens.embeddings, tokens.mask)
        side = self.config.scales[-1]
        grid = assembled.transpose(1, 2).unflatten(2, (side, side))
        return (self.pixel_decoder(grid) + 1) / 2


def _side(config: TokenFlowConfig) -> int:
    """Of the encoders' grid.

    Raises:
        ValueError: image_size does not divide by the strides.
    """
    side, rest = divmod(config.image_size, 1 << len(config.channels))
    if rest or not side:
        raise ValueError(
            f"image_size {config.image_size} does not divide by 2^{len(config.channels)}, the "
            "strides of channels"
        )
    return side
