"""The table of codes that published VQ tokenizers share, and what their training forward gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import (
    LossTerm,
    Quantized,
    Quantizer,
    in_full_precision,
    masked_mean,
)
from tokenizers_vis.tokenizer import TokenizerOutput
from tokenizers_vis.tokens import Codebook, TokenLayout


class CodeTable(Quantizer):
    """The nearest code of a table trained by gradients: VQ-VAE, arXiv:1711.00937, eq. 3.

    Its weight is `embedding.weight`, as LlamaGen, TiTok and diffusers name it.

    Args:
        vocab: codes.
        dim: of a code.
        unit_length: codes and features are scaled to length 1 first (ViT-VQGAN, arXiv:2110.04627).
        codebook, commitment: weights of |sg(feature) - code|^2 and |feature - sg(code)|^2.
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        unit_length: bool,
        codebook: float = 1.0,
        commitment: float = 0.25,
    ) -> None:
        super().__init__(Codebook("vq", dim, vocab))
        self.unit_length = unit_length
        self.codebook_weight, self.commitment = codebook, commitment
        self.embedding = nn.Embedding(vocab, dim)

    @property
    def codes(self) -> Tensor:
        """[vocab, dim] as tokens have them."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.unit_length else weight

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Ids, codes and losses of features [B, L, dim]; the choice is not stochastic."""
        features = features.float()  # near codes are confused in bfloat16
        if self.unit_length:
            features = F.normalize(features, dim=-1)
        codes = self.codes
        # |f - c|^2 without |f|^2, which is the same for every code.
        with torch.no_grad(), in_full_precision(features):
            distance = codes.square().sum(-1) - 2 * features @ codes.T
            ids = distance.argmin(-1)
        chosen = F.embedding(ids, codes)
        losses = {
            "codebook": LossTerm(
                self.codebook_weight,
                masked_mean((chosen - features.detach()).square().mean(-1), mask),
            ),
            "commitment": LossTerm(
                self.commitment, masked_mean((features - chosen.detach()).square().mean(-1), mask)
            ),
        }
        # Straight-through, written so that the value is the code to the last bit.
        embeddings = chosen.detach() + (features - features.detach())
        return Quantized(embeddings, features, ids, losses)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codes)


def reconstruction_output(
    images: Tensor, drawn: Tensor, found: Quantized, layout: TokenLayout
) -> TokenizerOutput:
    """The mean squared error of a reconstruction, beside the quantiser's losses.

    The published recipes add perceptual and adversarial losses: here these are add-ons.
    """
    losses = {"pixel_l2": LossTerm(1.0, (drawn - images).square().mean())}
    output = TokenizerOutput(found.tokens(layout), losses, drawn, found.metrics)
    return output.with_losses(found.losses)
