"""Hita: holistic slots before the patches, so that an autoregressive model says the whole first.

Paper: Hita, arXiv:2507.02358. Learnable queries gather an image in slots; slots and patches are
quantised with a table each; a causal decoder fuses them. It reads a patch some positions before
the patch's own token, so the first patches come from slots alone. Reading order: `Hita._quantized`,
`fused`, `dead_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_vis.blocks import Transformer, causal_mask
from tokenizers_vis.convs import ConvDecoder, ConvEncoder
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.quantizers.library import Vq
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer, pixel_losses
from tokenizers_vis.tokens import Segment, TokenLayout, Tokens


@dataclass(frozen=True)
class HitaConfig:
    """The numbers of a Hita; the paper's in brackets.

    Attributes:
        image_size: of the square images, pixels [336].
        channels: of the convolutions, one stride of two each [f = 16].
        num_blocks: residual blocks per stride.
        num_slots: holistic tokens [128, beside 441 patches].
        shift: k: a patch is read k positions before its own token [4]; must be far fewer than
            the patches, whose last k tokens are never read.
        slot_vocab, patch_vocab: codes [16 384 each].
        dim: of a code, the same for slots and patches [8; slots 8 or 12].
        width, num_heads: of the transformers [512].
        full_depth, causal_depth, fusion_depth: blocks that see all, causal ones, and those of the
            decoder [3 each].
        warm_up: share of the training in which ever fewer tokens pass unquantised, see
            `soft_share`.
        dead_below: as `Vq`'s.
        pixel_l1, pixel_l2: weights of the reconstruction's errors.
    """

    image_size: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    num_blocks: int = 1
    num_slots: int = 16
    shift: int = 2
    slot_vocab: int = 512
    patch_vocab: int = 512
    dim: int = 8
    width: int = 128
    num_heads: int = 4
    full_depth: int = 2
    causal_depth: int = 2
    fusion_depth: int = 2
    warm_up: float = 0.4
    dead_below: float = 0.5
    pixel_l1: float = 1.0
    pixel_l2: float = 1.0


class Hita(VisualTokenizer):
    """Slots, then patches; two tables; causal fusion with a shifted read-out. See the module.

    Differs from the published model: no features of DINOv2 stand beside the patches (its weights
    are not here; what a teacher has to say comes in by the add-on `distill`), so neither does the
    branch of Hita-Ultra that predicts them from slots; codes of one width, which the interface
    needs; tables moved by averages instead of gradients; the code's doubled squared error is a
    weight here; perceptual and adversarial losses are add-ons.
    """

    Config = HitaConfig
    name = "hita"

    def __init__(self, config: HitaConfig) -> None:
        side, rest = divmod(config.image_size, 2 ** len(config.channels))
        if rest or not side:
            raise ValueError(
                f"image_size {config.image_size} does not divide by 2^{len(config.channels)}, the "
                "strides of channels"
            )
        num_slots, num_patches = config.num_slots, side * side
        if not 0 <= config.shift <= min(num_slots, num_patches - 1):
            raise ValueError(
                f"shift {config.shift} must lie between 0 and the {num_slots} slots, and below the "
                f"{num_patches} patches"
            )
        width = config.width
        slot_table, patch_table = (
            Vq(width, vocab, dim=config.dim, dead_below=config.dead_below)
            for vocab in (config.slot_vocab, config.patch_vocab)
        )
        segments = Segment("slot", (num_slots,), 0), Segment("patch", (side, side), 1)
        super().__init__(
            config,
            layout=TokenLayout(segments),
            codebooks=[slot_table.codebook, patch_table.codebook],
            sample_shape=(3, config.image_size, config.image_size),
        )
        self.slot_table, self.patch_table = slot_table, patch_table
        self.encoder = ConvEncoder(3, config.channels, num_blocks=config.num_blocks)
        # Normalised features and small queries: with queries of spread 1 the slots of two images
        # differ by 0.08 at the start, of a length of 1, so by 0.42; what does not differ falls
        # onto one code.
        self.patch_in = nn.Sequential(
            nn.LayerNorm(config.channels[-1]), nn.Linear(config.channels[-1], width)
        )
        self.queries = nn.Parameter(0.1 * torch.randn(num_slots, width))
        trunk: dict[str, Any] = {"num_heads": config.num_heads}
        self.full = Transformer(width, config.full_depth, rotary_axes=2, **trunk)
        self.causal = Transformer(width, config.causal_depth, rotary_axes=2, **trunk)
        self.token_in = nn.Linear(config.dim, width)
        self.token_place = nn.Parameter(0.02 * torch.randn(num_slots + num_patches, width))
        self.fusion = Transformer(width, config.fusion_depth, **trunk)
        self.decoder = ConvDecoder(width, config.channels, 3, num_blocks=config.num_blocks)
        mask = causal_mask(num_slots + num_patches)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("coords", self.layout.coords[:, 1:].clone(), persistent=False)

    @property
    def dead_tokens(self) -> slice:
        """The positions that no image depends on: exactly the last `shift`, see `fused`."""
        total = self.layout.num_tokens
        return slice(total - self.config.shift, total)

    def embed(self, ids: Tensor) -> Tensor:
        slots, patches = self._parts(ids)
        return torch.cat([self.slot_table.embed(slots), self.patch_table.embed(patches)], dim=1)

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        self.check_samples(images)
        tokens, losses = self._quantized(images, sample=True)
        tokens = self.softened(tokens, progress=progress, generator=generator)
        drawn = self._image(tokens.embeddings)
        hard = 1 - self.soft_share(progress)
        losses = {name: LossTerm(hard * term.weight, term.value) for name, term in losses.items()}
        config = self.config
        pixels = pixel_losses(drawn, images, l1=config.pixel_l1, l2=config.pixel_l2)
        return TokenizerOutput(tokens, pixels, drawn).with_losses(losses)

    def softened(
        self, tokens: Tokens, *, progress: float, generator: torch.Generator | None
    ) -> Tokens:
        """Tokens of which a share, `soft_share`, is as it was before quantisation."""
        share = self.soft_share(progress)
        if not share or tokens.features is None:
            return tokens
        is_soft = torch.rand(tokens.mask.shape, generator=generator) < share
        is_soft = is_soft.to(tokens.mask.device)[..., None]
        return replace(tokens, embeddings=torch.where(is_soft, tokens.features, tokens.embeddings))

    def soft_share(self, progress: float) -> float:
        """1 - progress / warm_up, not below 0: of tokens that pass unquantised.

        Ours, not the paper's. Quantised and committed from the first step, the features of all
        images fall onto one code before the decoder has learnt to tell images apart (measured at
        32 x 32 after 130 steps: 2 bits for 4 slots, which is their number, 0 for a patch; after 450
        the error was still that of the mean image). Unquantised
        tokens alone do not help, because it is the commitment that pulls: it sets in with them.
        """
        return max(0.0, 1 - progress / self.config.warm_up) if self.config.warm_up else 0.0

    def fused(self, embeddings: Tensor) -> Tensor:
        """Features [B, N, width] of the patches, of tokens [B, S + N, C].

        Position p of a causal transformer sees the tokens up to p, and patch i is read at position
        S + i - k (k = `shift`). So it depends on the slots and on the patches 0 to i - k; the last
        patch, N - 1, on those up to N - 1 - k, and on the last k tokens nothing does. With k = 0
        patch i has its own token, and the slots have nothing to say.
        """
        x: Tensor = self.token_in(embeddings) + self.token_place
        x = self.fusion(x, mask=self.mask)
        num_slots, num_patches = (segment.num_tokens for segment in self.layout.segments)
        start = num_slots - self.config.shift
        return x[:, start : start + num_patches]

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._quantized(images, sample=sample)[0]

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        return self._image(torch.where(tokens.mask[..., None], tokens.embeddings, 0))

    def _quantized(self, images: Tensor, *, sample: bool) -> tuple[Tokens, dict[str, LossTerm]]:
        """Tokens [B, S + N, C] and the tables' losses.

        Slots and patches see each other, then, causally, those before them: in the order in which
        an autoregressive model will say them.
        """
        grid = self.encoder(images * 2 - 1).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(images), -1, -1)
        x = torch.cat([queries, self.patch_in(grid)], dim=1)
        x = self.causal(self.full(x, coords=self.coords), mask=self.mask, coords=self.coords)
        slots, patches = (
            table(part, sample=sample)
            for table, part in zip((self.slot_table, self.patch_table), self._parts(x), strict=True)
        )
        embeddings = torch.cat([slots.embeddings, patches.embeddings], dim=1)
        tokens = Tokens(
            embeddings,
            torch.ones(embeddings.shape[:2], dtype=torch.bool, device=x.device),
            self.layout,
            torch.cat([slots.ids, patches.ids], dim=1),
            torch.cat([slots.features, patches.features], dim=1),
        )
        losses = {f"slot_{name}": term for name, term in slots.losses.items()}
        return tokens, losses | {f"patch_{name}": term for name, term in patches.losses.items()}

    def _image(self, embeddings: Tensor) -> Tensor:
        side = self.layout.segments[1].shape
        grid = self.fused(embeddings).transpose(1, 2).unflatten(2, side)
        drawn: Tensor = self.decoder(grid)
        return (drawn + 1) / 2

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What stands at slots, and at patches, of [B, S + N, ...]."""
        num_slots = self.config.num_slots
        return x[:, :num_slots], x[:, num_slots:]
