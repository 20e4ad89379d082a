"""A tokenizer whose segments have codebooks of their own: ranges, embeddings, usage, bits."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.tokens import Codebook, Segment, TokenLayout

SLOTS_AND_PATCHES = TokenLayout((Segment("slot", (2,), 0), Segment("patch", (1, 3), 1)))


@dataclass(frozen=True)
class Numbers:
    pass


class TwoTables(VisualTokenizer):
    """Two slots of 4 codes, three patches of 8: nothing but the tables."""

    Config = Numbers
    name = "two tables"

    def __init__(self, codebooks, layout=SLOTS_AND_PATCHES):
        super().__init__(Numbers(), layout=layout, codebooks=codebooks, sample_shape=(3, 8, 8))
        self.tables = nn.ModuleList(nn.Embedding(each.vocab, each.dim) for each in codebooks)

    def embed(self, ids):
        parts = [ids[:, :2], ids[:, 2:]]
        return torch.cat([table(part) for table, part in zip(self.tables, parts, strict=True)], 1)

    def _encode(self, images, num_tokens, *, sample, generator):
        raise NotImplementedError

    def _decode(self, tokens, *, solver, generator):
        raise NotImplementedError

    def forward(self, images, *, progress=0.0, num_tokens=None, generator=None):
        raise NotImplementedError


def two_tables():
    torch.manual_seed(0)
    return TwoTables([Codebook("vq", 3, 4), Codebook("vq", 3, 8)])


def test_a_position_names_its_codebook():
    assert SLOTS_AND_PATCHES.codebook.tolist() == [0, 0, 1, 1, 1]


def test_ids_are_checked_against_the_codebook_of_their_segment():
    tokenizer = two_tables()
    tokens = tokenizer.tokens_from_ids(torch.tensor([[3, 0, 7, 4, 0]]))
    assert torch.equal(tokens.embeddings[:, :2], tokenizer.tables[0](torch.tensor([[3, 0]])))
    assert torch.equal(tokens.embeddings[:, 2:], tokenizer.tables[1](torch.tensor([[7, 4, 0]])))
    # 4 is a patch and no slot: kills a check of all ids against the first or the largest codebook.
    with pytest.raises(ValueError, match=r"ids of 'slot' must lie in \[0, 4\), got 3 to 4"):
        tokenizer.tokens_from_ids(torch.tensor([[3, 4, 7, 4, 0]]))
    with pytest.raises(ValueError, match=r"ids of 'patch' must lie in \[0, 8\)"):
        tokenizer.tokens_from_ids(torch.tensor([[3, 0, 8, 4, 0]]))


def test_fewer_ids_than_positions_end_in_either_segment():
    tokenizer = two_tables()
    for given in (1, 2, 4):
        tokens = tokenizer.tokens_from_ids(torch.full((2, given), 3))
        assert tokens.mask.tolist() == [[position < given for position in range(5)]] * 2
        assert tokens.embeddings.shape == (2, 5, 3)


def test_bits_are_counted_token_by_token():
    tokenizer = two_tables()
    assert tokenizer.bits == 2 * 2 + 3 * 3
    assert [tokenizer.bits_of(num) for num in (1, 2, 3)] == [2, 4, 7]


def test_usage_is_told_apart_by_codebook():
    tokenizer = two_tables()
    # Slots: 0 0 | 0 1: two of 4 codes, shares 3/4 and 1/4, entropy .8113 bits.
    # Patches: six different ones of 8: entropy log2 6.
    ids = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 3, 4, 5]])
    found = tokenizer.usage(ids)
    assert found["slot/used"] == 0.5 and found["patch/used"] == 0.75
    assert found["slot/entropy_bits"] == pytest.approx(0.8112781)
    assert found["patch/perplexity"] == pytest.approx(6)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    # Of the patches 0 and 3 alone are left.
    assert tokenizer.usage(ids, mask)["patch/used"] == 0.25
    assert set(tokenizer.usage(ids[:, :2])) == {f"slot/{key}" for key in
                                                ("used", "entropy_bits", "perplexity")}  # fmt: skip


def test_segments_of_one_codebook_are_counted_together():
    # Two scales share the table; counted scale by scale the second overwrote the first.
    layout = TokenLayout((Segment("scale", (1, 1)), Segment("scale", (2, 2))))
    other = Segment("slot", (1,), 1)
    tokenizer = TwoTables(
        [Codebook("vq", 3, 4), Codebook("vq", 3, 2)], TokenLayout((*layout.segments, other))
    )
    found = tokenizer.usage(torch.tensor([[3, 0, 0, 0, 0, 1]]))
    assert found["scale/used"] == 0.5 and found["slot/used"] == 0.5


@pytest.mark.parametrize(
    "codebooks",
    [
        [Codebook("vq", 3, 4)],
        [Codebook("vq", 3, 4), Codebook("vq", 2, 8)],
        [Codebook("vq", 3, 4), Codebook("lfq", 3, 4, groups=2)],
    ],
    ids=["one is missing", "two widths", "two groupings"],
)
def test_codebooks_that_do_not_make_one_tensor_are_refused(codebooks):
    with pytest.raises(ValueError, match="codebooks"):
        TwoTables(codebooks)
