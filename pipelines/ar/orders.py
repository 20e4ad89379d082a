"""In which order the tokens of an image are drawn: which positions each forward gives.

The number of groups is the number of forwards: n^2 for a raster, 2n - 1 for anti-diagonals, one per
scale. Positions of a group are drawn independently of each other, given all groups before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenOrder:
    """Groups of positions, int64 [g] each; together they are 0 ... L-1, each once."""

    groups: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        everywhere = torch.cat(self.groups)
        if not torch.equal(everywhere.sort().values, torch.arange(len(everywhere))):
            raise ValueError("an order names every position from 0 on exactly once")

    @property
    def num_forwards(self) -> int:
        """Of a network, to draw one image."""
        return len(self.groups)

    @property
    def num_tokens(self) -> int:
        """Positions L."""
        return sum(len(group) for group in self.groups)

    @cached_property
    def level(self) -> Tensor:
        """Int64 [L]: the number of the group in which a position is drawn."""
        level = torch.empty(self.num_tokens, dtype=torch.int64)
        for number, group in enumerate(self.groups):
            level[group] = number
        return level

    @cached_property
    def depends(self) -> Tensor:
        """Bool [L, L]: True = the law of position l may depend on the token at position s."""
        return self.level[:, None] > self.level[None, :]


def raster(num_tokens: int) -> TokenOrder:
    """One after the other."""
    return TokenOrder(tuple(torch.arange(num_tokens).split(1)))


def antidiagonal(*sizes: int) -> TokenOrder:
    """All tokens of one Manhattan distance from the first corner together (NAR).

    Paper: NAR, arXiv:2503.10696. sum(sizes) - len(sizes) + 1 groups; in a group row by row.

    Args:
        sizes: (rows, columns) of a grid, or (frames, rows, columns) of a clip.
    """
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return _by_level(torch.stack(axes).sum(0).flatten())


def blocks(rows: int, columns: int, size: int) -> TokenOrder:
    """Squares of size x size tokens, row by row (BitDance's next-patch diffusion).

    Raises:
        ValueError: the grid does not divide into squares.
    """
    if rows % size or columns % size:
        raise ValueError(f"{rows} x {columns} tokens do not divide into squares of {size}")
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return _by_level((row // size * (columns // size) + column // size).flatten())


def segments(sizes: Sequence[int]) -> TokenOrder:
    """Segment after segment, each at once: the scales of VAR, TokenFlow, HieraTok."""
    return TokenOrder(tuple(torch.arange(sum(sizes)).split(list(sizes))))


def masked_cosine(
    num_tokens: int, num_forwards: int, *, generator: torch.Generator | None = None
) -> TokenOrder:
    """A random order whose groups grow as a cosine says (MaskGIT, MAR).

    Paper: MaskGIT, arXiv:2202.04200: after forward k of K, floor(L cos(pi k / 2K)) tokens are still
    hidden, but at least one is revealed by each forward.

    Raises:
        ValueError: more forwards than tokens.
    """
    if not 1 <= num_forwards <= num_tokens:
        raise ValueError(f"{num_tokens} tokens take 1 to {num_tokens} forwards, not {num_forwards}")
    hidden = num_tokens
    sizes = []
    for step in range(1, num_forwards + 1):
        wanted = math.floor(num_tokens * math.cos(math.pi * step / (2 * num_forwards)) + 1e-9)
        left = min(hidden - 1, max(wanted, num_forwards - step))
        sizes.append(hidden - left)
        hidden = left
    order = torch.randperm(num_tokens, generator=generator)
    return TokenOrder(tuple(order.split(sizes)))


def _by_level(level: Tensor) -> TokenOrder:
    return TokenOrder(tuple((level == n).nonzero().flatten() for n in range(int(level.max()) + 1)))
