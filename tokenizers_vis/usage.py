"""How much of a codebook is used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenizers_vis.bits import bits_of
from tokenizers_vis.tokens import Codebook


def usage(ids: Tensor, codebook: Codebook, mask: Tensor | None = None) -> dict[str, float]:
    """Statistics of ids int64 [B, L] or [B, L, G]; mask bool [B, L].

    Returns:
        used: share of the codes that occur at all; entropy_bits and perplexity of their
        frequencies; for groups of bits the mean over groups, and bit_entropy_min, bit_entropy_mean
        (bits; 1 = as often +1 as -1) and bit_correlation_max of any two bits of a token. Empty
        for continuous tokens.
    """
    if codebook.vocab is None:
        return {}
    chosen = ids.flatten(0, 1) if mask is None else ids[mask]
    chosen = chosen.reshape(len(chosen), -1)
    shares, entropies = [], []
    for group in chosen.unbind(-1):
        count = torch.bincount(group, minlength=codebook.vocab).double()
        shares.append(float((count > 0).double().mean()))
        entropies.append(_entropy_bits(count / count.sum().clamp_min(1)))
    entropy = sum(entropies) / len(entropies)
    found = {
        "used": sum(shares) / len(shares),
        "entropy_bits": entropy,
        "perplexity": 2**entropy,
    }
    if codebook.kind == "lfq":
        bits = bits_of(chosen, round(math.log2(codebook.vocab))).flatten(1).double()
        positive = (bits > 0).double().mean(0)
        each = [_entropy_bits(torch.stack([p, 1 - p])) for p in positive]
        found |= {"bit_entropy_min": min(each), "bit_entropy_mean": sum(each) / len(each)}
        if bits.shape[1] > 1 and len(bits) > 1:
            centred = bits - bits.mean(0)
            spread = centred.square().mean(0).sqrt().clamp_min(1e-9)
            correlation = centred.T @ centred / len(bits) / spread[:, None] / spread
            correlation.fill_diagonal_(0)
            found["bit_correlation_max"] = float(correlation.abs().max())
    return found


def _entropy_bits(probability: Tensor) -> float:
    return float(torch.special.entr(probability).sum()) / math.log(2)
