"""Nested token dropout: how many tokens an image keeps in a training step.

Papers: nested dropout, arXiv:1402.0915; FlexTok, arXiv:2502.13967; TokenFLEX, arXiv:2504.03154.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenDropout:
    """Draws a number of tokens for every image, out of those that the tokenizer can keep.

    Attributes:
        mode: "uniform" = any count; "pow2" = a power of two or all, equally often (FlexTok's text);
            "pow2_ceil" = uniform, rounded up to the next such count, so that half of the images
            keep all (a mode of FlexTok's code; which one its weights had is not published).
        full: share of the images that keep all tokens, whatever is drawn.
        counts: that are drawn from, of those that the tokenizer can keep; () = all of them.
        is_shared: one draw for all images of a batch (TokenFLEX), so that their tokens are of one
            shape; else one each.
    """

    mode: Literal["uniform", "pow2", "pow2_ceil"] = "pow2"
    full: float = 0.0
    counts: tuple[int, ...] = ()
    is_shared: bool = False

    def draw(
        self, num: int, counts: Sequence[int], generator: torch.Generator | None = None
    ) -> Tensor:
        """Int64 [num], each one of the ascending `counts`.

        Raises:
            ValueError: the tokenizer keeps all tokens or none, or not the counts given here.
        """
        if len(counts) < 2:
            raise ValueError(f"token dropout needs a tokenizer of several counts, got {counts}")
        if unknown := sorted(set(self.counts) - set(counts)):
            raise ValueError(f"token dropout draws {unknown}, which the tokenizer does not keep")
        if self.is_shared:
            return replace(self, is_shared=False).draw(1, counts, generator).expand(num)
        total, counts = counts[-1], sorted(self.counts or counts)
        most = counts[-1]
        powers = [count for count in counts if count & (count - 1) == 0 or count == most]
        uniform = torch.tensor(counts)[torch.randint(len(counts), (num,), generator=generator)]
        if self.mode == "uniform":
            drawn = uniform
        elif self.mode == "pow2":
            drawn = torch.tensor(powers)[torch.randint(len(powers), (num,), generator=generator)]
        else:
            place = torch.searchsorted(torch.tensor(powers), uniform)
            drawn = torch.tensor(powers)[place]
        is_full = torch.rand(num, generator=generator) < self.full
        return torch.where(is_full, total, drawn)
