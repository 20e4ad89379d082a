"""What a quantiser is. It owns its projection: features [B, L, in_dim] -> embeddings [B, L, C]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenizers_vis.tokens import Codebook, TokenLayout, Tokens


class LossTerm(NamedTuple):
    """A named loss before its weight."""

    weight: float
    value: Tensor

    @property
    def weighted(self) -> Tensor:
        """Weight times value."""
        return self.weight * self.value


@dataclass(frozen=True)
class Quantized:
    """Features after quantisation.

    Attributes:
        embeddings: [B, L, C], with a straight-through gradient to the features.
        features: [B, L, C], projected, before quantisation; with gradient.
        ids: int64 [B, L] or [B, L, G]; None = continuous.
        losses: name -> term; scalars.
        metrics: name -> scalar, detached.
    """

    embeddings: Tensor
    features: Tensor
    ids: Tensor | None = None
    losses: dict[str, LossTerm] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def tokens(self, layout: TokenLayout) -> Tokens:
        """All of them, as they stand in the layout."""
        shape = self.embeddings.shape[:2]
        mask = torch.ones(shape, dtype=torch.bool, device=self.embeddings.device)
        return Tokens(self.embeddings, mask, layout, self.ids, self.features)


class Quantizer(nn.Module, ABC):
    """Base of all quantisers.

    Args:
        codebook: what a token can be.
    """

    def __init__(self, codebook: Codebook) -> None:
        super().__init__()
        self.codebook = codebook

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Quantises.

        Args:
            features: [B, L, in_dim].
            mask: bool [B, L], True = enters losses and statistics; None = all do.
            progress: of the training, in [0, 1]; drives schedules.
            sample: where the choice of a code is stochastic, draw it; else the likeliest.
            generator: of the draws.
        """

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [B, L, C] of ids int64 [B, L] or [B, L, G], as `forward` gives them."""


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, to the last bit, and the gradient of `soft` (arXiv:1308.3432)."""
    return hard.detach() + (soft - soft.detach())


def in_full_precision(like: Tensor) -> torch.autocast:
    """Where near codes are told apart: autocast makes products of float32 tensors bfloat16, too."""
    return torch.autocast(like.device.type, enabled=False)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [B, L] where the mask is True; 0 where it nowhere is."""
    if mask is None:
        return values.mean()
    weight = mask.to(values.dtype)
    return (values * weight).sum() / weight.sum().clamp_min(1)
