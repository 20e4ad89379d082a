"""How codes are used: frequencies, entropies and correlations of bits, by hand."""

import math

import pytest
import torch

from tokenizers_vis.tokens import Codebook
from tokenizers_vis.usage import usage

VQ = Codebook("vq", 2, 8)
BITS = Codebook("lfq", 4, 4, groups=2)  # two groups of two bits


def test_codes_that_occur_and_their_entropy():
    """Shares 1/2, 1/4, 1/4 of 8 codes: 3/8 used, 1.5 bits. Mutation: nats, or used codes alone."""
    found = usage(torch.tensor([[0, 0], [5, 7]]), VQ)
    assert found == pytest.approx({"used": 3 / 8, "entropy_bits": 1.5, "perplexity": 2**1.5})


def test_masked_tokens_do_not_count():
    ids, mask = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[True, False], [True, False]])
    found = usage(ids, VQ, mask)
    assert found == pytest.approx({"used": 1 / 8, "entropy_bits": 0, "perplexity": 1})


def test_groups_are_averaged_and_bits_counted_one_by_one():
    """Group 1: ids 0 and 3, 1 bit; group 2: id 2 alone, 0 bits. Bits, lowest first: group 1 has
    both as often + as -, and always alike; group 2 is constant, - then +. Mutation: the largest
    correlation without its sign, or bits of the first group alone."""
    found = usage(torch.tensor([[[0, 2], [3, 2]]]), BITS)
    assert found["used"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert found["entropy_bits"] == pytest.approx(0.5)
    assert found["bit_entropy_min"] == 0 and found["bit_entropy_mean"] == pytest.approx(0.5)
    assert found["bit_correlation_max"] == pytest.approx(1)
    opposed = usage(torch.tensor([[[1, 2], [2, 2]]]), BITS)
    assert opposed["bit_correlation_max"] == pytest.approx(1)


def test_independent_bits_are_not_correlated():
    """All 16 tokens once: each bit a fair coin, no two related."""
    ids = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    found = usage(ids, BITS)
    assert found["bit_entropy_min"] == pytest.approx(1)
    assert found["bit_correlation_max"] == pytest.approx(0, abs=1e-9)
    assert found["entropy_bits"] == pytest.approx(2) and found["used"] == 1
    # A bit that is + in three of four: -(3/4 log2 3/4 + 1/4 log2 1/4) = .8113.
    skewed = usage(torch.tensor([[1, 1, 1, 0]]), Codebook("lfq", 1, 2))
    assert skewed["bit_entropy_min"] == pytest.approx(2 - 0.75 * math.log2(3))


def test_continuous_tokens_have_none():
    assert usage(torch.zeros(1, 2, dtype=torch.int64), Codebook("continuous", 4)) == {}
