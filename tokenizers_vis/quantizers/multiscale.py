"""Residual quantisation over scales of a grid, coarse to fine, with one table (VAR, TokenFlow).

What the coarse scales leave over is what the fine ones say. vector-quantize-pytorch's ResidualVQ
repeats at one resolution; here every step has one of its own. Reading order: `forward`, `assemble`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.quantizers.base import LossTerm, Quantized, Quantizer, straight_through
from tokenizers_vis.tokens import Codebook


class Table(Protocol):
    """A quantiser without projection, whose codes stand where its features do: `SharedIndexVq`."""

    codebook: Codebook

    def nearest(self, vectors: Tensor) -> Tensor:
        """Ids [...] of vectors [..., C]."""

    def embed(self, ids: Tensor) -> Tensor:
        """Codes [..., C] of ids [...], with gradient where they are parameters."""

    def losses(
        self, features: Tensor, codes: Tensor, mask: Tensor | None = None
    ) -> dict[str, LossTerm]:
        """Of features and what stands for them, [B, L, C]."""

    def ranks(self, vectors: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Metrics of the choices."""

    def observe(
        self, vectors: Tensor, ids: Tensor, *, generator: torch.Generator | None = None
    ) -> None:
        """Called once per training forward, with all its choices."""


class MultiScale(Quantizer):
    """Tokens of scales: the residual is pooled to s x s, quantised, enlarged and taken off.

    Paper: VAR, arXiv:2404.02905, algorithms 1 and 2; TokenFlow, arXiv:2412.03069. Area down,
    bicubic up, no convolution after it (TokenFlow's default). Its losses are the table's, of the
    features against the sum so far, averaged over scales. Gradients pass straight through every
    scale and telescope: with all scales, the sum's gradient with respect to the features is the
    identity, as VAR has it; with the first scales, that of what those can say.

    Args:
        table: of all scales; a module.
        sizes: of the square grids, ascending; the last is the features'.
        scale_dropout: share of the images in training that lose one scale, any one: it adds
            nothing to the sum, and the scales after it see what it left (TokenFlow has 0.1). Its
            ids are kept, its embeddings are 0.
    """

    def __init__(
        self, table: Quantizer, sizes: Sequence[int], *, scale_dropout: float = 0.0
    ) -> None:
        super().__init__(table.codebook)
        if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1:
            raise ValueError(f"scales must ascend from 1 or more, got {list(sizes)}")
        self.table: Table = table  # type: ignore[assignment]
        self.sizes, self.scale_dropout = tuple(sizes), scale_dropout
        self.ends = tuple(itertools.accumulate(size * size for size in self.sizes))

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """As `Quantizer.forward`, of features [B, n * n, C]; tokens [B, L, C] of all scales.

        It drops scales, logs ranks and lets the table observe in training with `sample` alone, so
        that encoding is a pure function in the middle of a training, too.

        Raises:
            ValueError: a mask; every position of the finest grid is part of the coarse ones.
        """
        if mask is not None:
            raise ValueError("a multi-scale quantiser takes whole grids, not a mask")
        grid = self._grid(features.float(), self.sizes[-1])
        is_learning = self.training and sample
        dropout = self.scale_dropout if is_learning else 0.0
        is_kept = self._kept(len(grid), dropout, generator)
        residual, total = grid, torch.zeros_like(grid)
        ids, embeddings, pooled, losses = [], [], [], []
        for size, kept in zip(self.sizes, is_kept.to(grid).unbind(1), strict=True):
            small = _flat(F.interpolate(residual, size=(size, size), mode="area"))
            chosen = self.table.nearest(small)
            code = self.table.embed(chosen) * kept[:, None, None]
            through = straight_through(code, small) * kept[:, None, None]
            residual = residual - self._enlarged(through, size)
            total = total + self._enlarged(code, size)
            losses.append(self.table.losses(_flat(grid), _flat(total)))
            ids.append(chosen)
            embeddings.append(through)
            pooled.append(small)
        vectors, numbers = torch.cat(pooled, 1), torch.cat(ids, 1)
        metrics = {}
        if is_learning:
            metrics = self.table.ranks(vectors.detach(), numbers)
            self.table.observe(vectors.detach(), numbers, generator=generator)
        return Quantized(torch.cat(embeddings, 1), vectors, numbers, _mean(losses), metrics)

    def assemble(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """What decoding sees [B, n * n, C]: the sum of all scales' embeddings [B, L, C], enlarged.

        Args:
            embeddings: of the tokens.
            mask: bool [B, L]; what is False adds nothing.
        """
        if mask is not None:
            embeddings = torch.where(mask[..., None], embeddings, 0)
        sizes = [size * size for size in self.sizes]
        scales = zip(embeddings.split(sizes, dim=1), self.sizes, strict=True)
        return _flat(torch.stack([self._enlarged(part, size) for part, size in scales]).sum(0))

    def embed(self, ids: Tensor) -> Tensor:
        return self.table.embed(ids)

    def _enlarged(self, embeddings: Tensor, size: int) -> Tensor:
        """[B, s * s, C] -> [B, C, n, n]."""
        most = self.sizes[-1]
        small = self._grid(embeddings, size)
        if size == most:
            return small
        return F.interpolate(small, size=(most, most), mode="bicubic", align_corners=False)

    def _grid(self, features: Tensor, size: int) -> Tensor:
        return features.transpose(1, 2).unflatten(2, (size, size))

    def _kept(self, batch: int, dropout: float, generator: torch.Generator | None) -> Tensor:
        """Bool [B, S]: False where an image loses a scale."""
        kept = torch.ones(batch, len(self.sizes), dtype=torch.bool)
        if not dropout:
            return kept
        lost = torch.randint(len(self.sizes), (batch, 1), generator=generator)
        loses = torch.rand(batch, 1, generator=generator) < dropout
        return kept.scatter(1, lost, ~loses)


def _flat(grid: Tensor) -> Tensor:
    """[B, C, s, s] -> [B, s * s, C]."""
    return grid.flatten(2).transpose(1, 2)


def _mean(losses: Sequence[dict[str, LossTerm]]) -> dict[str, LossTerm]:
    """By name, over scales."""
    return {
        name: LossTerm(term.weight, torch.stack([each[name].value for each in losses]).mean())
        for name, term in losses[0].items()
    }
