"""Codebooks that share one index: a code is a row of several tables at once (TokenFlow).

A part (semantic, pixel) has a width of its own and a weight in the choice. One part is the plain
VQ table of residual quantisers, so a comparison of the two changes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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

_RANKED = 1024  # vectors of a batch at most of which the ranks are logged


class SharedIndexVq(Quantizer):
    """One id for all parts: argmin_j of sum_p weight_p * |unit(z_p) - unit(c_pj)|^2.

    Paper: TokenFlow, arXiv:2412.03069, section 3.1: parts semantic and pixel with weights 1 and
    w = 1. Distances are of unit vectors. It has no projection: features are quantised where they
    stand. Differs: what is looked up is the code at its own length, so that a residual can shrink
    (the released code has an l2 flag, with which codes have length 1; its other branch does not
    run); a code that went unused is placed on a vector of the batch, all its parts on the same one.

    Which part decides depends on its width: unit vectors of D dimensions at random have distances
    of spread 2 / sqrt(D), so with widths 32 and 8 and w = 1 the pixel part rules. The metrics
    rank_0, rank_1, ... say where the chosen code stood among the codes of each part alone, as a
    share of the vocabulary (0 = it was the nearest). It logs and counts in training with `sample`
    alone: encoding is a pure function in the middle of a training, too.

    Args:
        dims: width of every part.
        vocab: codes.
        weights: of every part's distance; 0 = it has no say, infinity = the others have none.
        commitment: weight of |features - code|^2, the code held; its counterpart, which moves the
            codes, has weight 1. Both are means over all dimensions, so wide parts weigh more.
        decay: of the average of how often a code is chosen.
        dead_below: choices per batch under which a code is placed anew; 0 = never.
    """

    used: Tensor

    def __init__(
        self,
        dims: Sequence[int],
        vocab: int,
        *,
        weights: Sequence[float] | None = None,
        commitment: float = 0.25,
        decay: float = 0.99,
        dead_below: float = 0.05,
    ) -> None:
        super().__init__(Codebook("vq", sum(dims), vocab))
        self.dims = tuple(dims)
        self.weights = _shares([1.0] * len(self.dims) if weights is None else weights)
        if len(self.weights) != len(self.dims):
            raise ValueError(f"{len(self.dims)} parts need as many weights, got {weights}")
        self.commitment, self.decay, self.dead_below = commitment, decay, dead_below
        self.codes = nn.Parameter(torch.randn(vocab, sum(dims)) / math.sqrt(sum(dims)))
        self.register_buffer("used", torch.zeros(vocab))

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        features = features.float()
        ids = self.nearest(features)
        codes = self.embed(ids)
        losses = self.losses(features, codes, mask)
        chosen = (features, ids) if mask is None else (features[mask], ids[mask])
        metrics = {}
        if self.training and sample:
            metrics = self.ranks(*chosen)
            self.observe(*chosen, generator=generator)
        return Quantized(straight_through(codes, features), features, ids, losses, metrics)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Int64 [...] of vectors [..., C]: the ids that all parts choose together."""
        parts = zip(self.weights, self._cosines(vectors), strict=True)
        # |unit(z) - unit(c)|^2 = 2 - 2 cos: the smallest distance is the largest cosine.
        return torch.stack([weight * cosine for weight, cosine in parts]).sum(0).argmax(-1)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codes)

    def parts(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Embeddings or features [..., C] part by part."""
        return embeddings.split(self.dims, dim=-1)

    def losses(
        self, features: Tensor, codes: Tensor, mask: Tensor | None = None
    ) -> dict[str, LossTerm]:
        """Of features and what stands for them, both [B, L, C]: the codes' pull and commitment."""
        pull = (codes - features.detach()).square().mean(-1)
        hold = (features - codes.detach()).square().mean(-1)
        return {
            "codebook": LossTerm(1.0, masked_mean(pull, mask)),
            "commitment": LossTerm(self.commitment, masked_mean(hold, mask)),
        }

    @torch.no_grad()
    def ranks(self, vectors: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """rank_p of part p, the mean over at most 1024 of the vectors [..., C]."""
        flat, chosen = vectors.flatten(0, -2), ids.flatten()[:, None]
        stride = math.ceil(len(flat) / _RANKED)
        flat, chosen = flat[::stride], chosen[::stride]
        return {
            f"rank_{part}": (cosine > cosine.gather(1, chosen)).float().mean()
            for part, cosine in enumerate(self._cosines(flat))
        }

    @torch.no_grad()
    def observe(
        self, vectors: Tensor, ids: Tensor, *, generator: torch.Generator | None = None
    ) -> None:
        """Counts the choices ids [...] of vectors [..., C], and places dead codes anew."""
        vectors, ids = vectors.flatten(0, -2), ids.flatten()
        if not len(ids):
            return
        count = torch.bincount(ids, minlength=len(self.codes)).to(self.used)
        self.used.lerp_(count, 1 - self.decay)
        drawn = torch.randint(len(vectors), (len(self.codes),), generator=generator).to(ids.device)
        is_dead = (self.used < self.dead_below) & (count == 0)
        self.codes.copy_(torch.where(is_dead[:, None], vectors[drawn], self.codes))
        # As if chosen once: it has some time to find its place before it counts as dead again.
        self.used.masked_fill_(is_dead, 1.0)

    def _cosines(self, vectors: Tensor) -> list[Tensor]:
        """Of vectors [..., C] with every code, [..., V], part by part."""
        pairs = zip(self.parts(vectors), self.parts(self.codes), strict=True)
        with in_full_precision(vectors):
            return [F.normalize(one, dim=-1) @ F.normalize(code, dim=-1).T for one, code in pairs]


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that sum to 1; with infinite ones, those share all.

    Raises:
        ValueError: a negative weight, or none that is positive.
    """
    if any(math.isinf(weight) for weight in weights):
        weights = [float(weight == math.inf) for weight in weights]
    total = sum(weights)
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"weights of parts must be >= 0 and not all 0, got {list(weights)}")
    return tuple(weight / total for weight in weights)
