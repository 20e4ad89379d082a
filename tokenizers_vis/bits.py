"""Bits as +-1, and their numbers: the lowest bit first, as BitDance has it and not MAGVIT-2."""

import torch
from torch import Tensor


def bits_of(ids: Tensor, num_bits: int) -> Tensor:
    """+-1 float [..., bits] of ids [...], the lowest bit first."""
    place = torch.arange(num_bits, device=ids.device)
    return ((ids[..., None] >> place) & 1).float() * 2 - 1


def number_of(bits: Tensor) -> Tensor:
    """Int64 ids [...] of bits [..., bits], positive = 1; the inverse of `bits_of`."""
    place = 2 ** torch.arange(bits.shape[-1], device=bits.device)
    return ((bits > 0).long() * place).sum(-1)


def check_groups(num_bits: int, group_bits: int) -> None:
    """Raises ValueError unless groups of at most 12 bits fill a token."""
    if not 1 <= group_bits <= 12 or num_bits % group_bits:
        raise ValueError(
            f"{num_bits} bits must divide into groups of 1 to 12 bits (a group's table has "
            f"2 ** bits corners), got groups of {group_bits}"
        )
