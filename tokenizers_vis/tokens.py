"""Tokens, and where they stand: the records of this package, and THE legend of shapes.

B images or clips; L positions of a layout; C width of an embedding; G groups of a token's id; K
kept tokens. Images are float [B, 3, H, W] in [0, 1], clips float [B, F, 3, H, W]. A mask is bool,
True = the token counts. Reading order: Codebook -> Segment -> TokenLayout -> Tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """What one token can be.

    Attributes:
        kind: "vq" (learned table), "fsq" (a lattice), "lfq" (bits), "continuous" (no ids).
        dim: width of an embedding.
        vocab: ids of one group; None = continuous.
        groups: ids per token; a token is one of vocab ** groups.
    """

    kind: Literal["vq", "fsq", "lfq", "continuous"]
    dim: int
    vocab: int | None = None
    groups: int = 1

    @property
    def bits(self) -> float:
        """Of one token; infinite where it is continuous."""
        return math.inf if self.vocab is None else self.groups * math.log2(self.vocab)


@dataclass(frozen=True)
class Segment:
    """A run of positions of one kind.

    Attributes:
        name: e.g. "register", "slot", "patch", "scale".
        shape: (L,) in one dimension, (rows, columns) of a grid, (frames, rows, columns) of a clip.
        codebook: index into the tokenizer's codebooks.
    """

    name: str
    shape: tuple[int, ...]
    codebook: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"segment '{self.name}' needs 1 to 3 positive sizes, got {self.shape}")

    @property
    def num_tokens(self) -> int:
        """Positions of the segment."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of an image stand: segment after segment, each row by row.

    Attributes:
        segments: in the order of the positions. Scales are segments of one name, coarse ones first.
        nested: whether a prefix stands for the whole image (ordered registers, scales).
    """

    segments: tuple[Segment, ...]
    nested: bool = False

    @property
    def num_tokens(self) -> int:
        """Positions L."""
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of every segment, and L."""
        ends = [0]
        for segment in self.segments:
            ends.append(ends[-1] + segment.num_tokens)
        return tuple(ends)

    @cached_property
    def level(self) -> Tensor:
        """Int64 [L]: the number of the segment that a position lies in."""
        sizes = torch.tensor([segment.num_tokens for segment in self.segments])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @cached_property
    def codebook(self) -> Tensor:
        """Int64 [L]: the number of the codebook of a position's segment."""
        return torch.tensor([segment.codebook for segment in self.segments])[self.level]

    @cached_property
    def coords(self) -> Tensor:
        """[L, 3]: centre (time, row, column) of a position's cell, in (0, 1).

        NaN on axes that its segment does not have.
        """
        return torch.cat([_centres(segment.shape) for segment in self.segments])

    def slice_of(self, segment: int) -> slice:
        """The positions of a segment, by its number; negative counts from the end."""
        segment %= len(self.segments)
        return slice(self.starts[segment], self.starts[segment + 1])


@dataclass(frozen=True)
class Tokens:
    """The tokens of B images.

    Attributes:
        embeddings: [B, L, C]; quantised, with a straight-through gradient in training.
        mask: bool [B, L]; what decoding sees. Dropping tokens clears it and changes nothing else.
        layout: of the positions; the first L of them where the tokens were compacted.
        ids: int64 [B, L], or [B, L, G] with several groups; None = continuous.
        features: [B, L, C'] before quantisation; None = not kept.
    """

    embeddings: Tensor
    mask: Tensor
    layout: TokenLayout
    ids: Tensor | None = None
    features: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.embeddings.shape[:2]
        if self.mask.dtype != torch.bool or self.mask.shape != shape:
            raise ValueError(
                f"tokens with embeddings {list(self.embeddings.shape)} need a bool mask "
                f"{list(shape)}, got {self.mask.dtype} {list(self.mask.shape)}"
            )
        if self.ids is not None and self.ids.shape[:2] != shape:
            raise ValueError(
                f"tokens with embeddings {list(self.embeddings.shape)} need ids "
                f"{list(shape)} or {[*shape, 'G']}, got {list(self.ids.shape)}"
            )

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def length(self) -> Tensor:
        """Int64 [B]: tokens that count."""
        return self.mask.sum(1)

    def keep(self, num_tokens: int | Tensor) -> Tokens:
        """What counts among the first `num_tokens` (one number, or int64 [B]) positions."""
        wanted = torch.as_tensor(num_tokens, device=self.mask.device).reshape(-1, 1)
        position = torch.arange(self.mask.shape[1], device=self.mask.device)
        return replace(self, mask=self.mask & (position < wanted))

    def select(self, index: Tensor) -> Tokens:
        """Those of the images at int64 `index`."""
        return replace(
            self,
            embeddings=self.embeddings[index],
            mask=self.mask[index],
            ids=None if self.ids is None else self.ids[index],
            features=None if self.features is None else self.features[index],
        )

    def compact(self) -> Tokens:
        """Without the positions behind the longest prefix, e.g. for an autoregressive model."""
        longest = int(self.length.max()) if len(self) else 0
        return replace(
            self,
            embeddings=self.embeddings[:, :longest],
            mask=self.mask[:, :longest],
            ids=None if self.ids is None else self.ids[:, :longest],
            features=None if self.features is None else self.features[:, :longest],
        )


def grid_layout(*shape: int, name: str = "patch") -> TokenLayout:
    """One grid of (rows, columns), or (frames, rows, columns)."""
    return TokenLayout((Segment(name, shape),))


def register_layout(num_tokens: int, *, nested: bool, name: str = "register") -> TokenLayout:
    """A sequence without places."""
    return TokenLayout((Segment(name, (num_tokens,)),), nested=nested)


def scale_layout(sizes: Sequence[int]) -> TokenLayout:
    """Square grids, coarse to fine; every prefix of scales stands for the whole image."""
    if list(sizes) != sorted(set(sizes)):
        raise ValueError(f"scales must ascend, got {list(sizes)}")
    return TokenLayout(tuple(Segment("scale", (size, size)) for size in sizes), nested=True)


def _centres(shape: tuple[int, ...]) -> Tensor:
    """[prod(shape), 3] cell centres; a sequence has none."""
    out = torch.full((math.prod(shape), 3), math.nan)
    if len(shape) == 1:
        return out
    axes = [(torch.arange(size) + 0.5) / size for size in shape]
    out[:, 3 - len(shape) :] = torch.cartesian_prod(*axes).reshape(-1, len(shape))
    return out
