"""The learned stochastic VQ of LARP: in training a code is drawn, the closer the likelier."""

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
    straight_through,
)
from tokenizers_vis.tokens import Codebook


class StochasticVq(Quantizer):
    """A table of directions that is learned by gradient, and of which codes are drawn.

    Paper: LARP, arXiv:2410.21264, section 3.2: id ~ Cat(softmax(z . c / temperature)) with z and c
    of unit length. The library's VQ draws codes only from a table that moves by averages. Whether
    the squared errors are summed or averaged over channels is not verified: here they are averaged.

    Args:
        in_dim: width of the features.
        vocab: codes.
        dim: of a code.
        temperature: of the draw; towards 0 it is the nearest code.
        commitment: weight of |z - code|^2, which moves the features.
        codebook: weight of the same error, which moves the code.
    """

    def __init__(
        self,
        in_dim: int,
        vocab: int,
        *,
        dim: int = 16,
        temperature: float = 0.03,
        commitment: float = 0.025,
        codebook: float = 0.1,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"the temperature must be positive, got {temperature}")
        super().__init__(Codebook("vq", dim, vocab))
        self.temperature = temperature
        self.commitment, self.codebook_weight = commitment, codebook
        self.project = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, dim))
        self.codes = nn.Parameter(F.normalize(torch.randn(vocab, dim), dim=-1))

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        # The scores are divided by 0.03: bfloat16 would round them to steps of 0.13.
        projected = F.normalize(self.project(features).float(), dim=-1)
        with in_full_precision(projected):
            scores = projected.detach() @ self.table.detach().T
        if sample:
            ids = draw_ids(torch.softmax(scores / self.temperature, dim=-1), generator)
        else:
            ids = scores.argmax(-1)
        codes = self.embed(ids)
        commitment = (projected - codes.detach()).square().mean(-1)
        moved = (projected.detach() - codes).square().mean(-1)
        losses = {
            "commitment": LossTerm(self.commitment, masked_mean(commitment, mask)),
            "codebook": LossTerm(self.codebook_weight, masked_mean(moved, mask)),
        }
        is_nearest = (ids == scores.argmax(-1)).float()
        return Quantized(
            straight_through(codes, projected),
            projected,
            ids,
            losses,
            {"nearest_code": masked_mean(is_nearest, mask)},
        )

    @property
    def table(self) -> Tensor:
        """Codes of unit length [vocab, dim]."""
        return F.normalize(self.codes.float(), dim=-1)

    def embed(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def draw_ids(probability: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Int64 [...] drawn from probabilities [..., V], by one uniform number each.

    The inverse of the cumulative sum: a draw of V numbers each, as the Gumbel trick needs, would be
    half a billion for 64 clips of 1,024 tokens.
    """
    cumulative = probability.float().cumsum(-1)
    uniform = torch.rand(probability.shape[:-1], generator=generator).to(probability.device)
    wanted = uniform[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[..., 0].clamp(
        max=probability.shape[-1] - 1
    )
