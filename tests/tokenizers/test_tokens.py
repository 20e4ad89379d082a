"""The records: layouts, prefixes, and what is refused."""

import math

import pytest
import torch

from tokenizers_vis.tokens import (
    Codebook,
    Segment,
    TokenLayout,
    Tokens,
    grid_layout,
    register_layout,
    scale_layout,
)


def test_bits_count_groups_and_continuous_tokens_have_no_end():
    assert Codebook("lfq", 32, 256, 4).bits == 32
    assert Codebook("fsq", 4, 1000).bits == pytest.approx(9.9658, abs=1e-4)
    assert Codebook("continuous", 16).bits == math.inf


def test_a_grid_has_the_centres_of_its_cells():
    """By hand: 2 x 2 cells have centres at 1/4 and 3/4, row by row; a still has no time."""
    coords = grid_layout(2, 2).coords
    assert coords[:, 0].isnan().all()
    assert coords[:, 1:].tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]
    clip = grid_layout(2, 1, 1).coords
    assert clip.tolist() == [[0.25, 0.5, 0.5], [0.75, 0.5, 0.5]]
    assert register_layout(3, nested=True).coords.isnan().all()


def test_levels_and_slices_follow_the_segments():
    layout = scale_layout([1, 2, 4])
    assert layout.num_tokens == 21 and layout.nested
    assert layout.level.tolist() == [0] + [1] * 4 + [2] * 16
    assert layout.slice_of(1) == slice(1, 5) and layout.slice_of(-1) == slice(5, 21)
    with pytest.raises(ValueError, match="ascend"):
        scale_layout([2, 1])
    with pytest.raises(ValueError, match="positive"):
        Segment("patch", (0, 2))


def make(batch=3, length=4):
    embeddings = torch.arange(batch * length * 2.0).reshape(batch, length, 2)
    ids = torch.arange(batch * length).reshape(batch, length)
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Tokens(embeddings, mask, register_layout(length, nested=True), ids)


def test_keep_clears_the_mask_behind_the_prefix_and_nothing_else():
    tokens = make()
    kept = tokens.keep(torch.tensor([1, 4, 2]))
    assert kept.length.tolist() == [1, 4, 2]
    assert kept.mask[2].tolist() == [True, True, False, False]
    assert kept.embeddings is tokens.embeddings
    # A prefix of a prefix cannot bring tokens back.
    assert kept.keep(3).length.tolist() == [1, 3, 2]


def test_compact_cuts_to_the_longest_prefix():
    short = make().keep(torch.tensor([1, 3, 2])).compact()
    assert short.embeddings.shape == (3, 3, 2) and short.ids.shape == (3, 3)
    assert short.length.tolist() == [1, 3, 2]


def test_tokens_of_shapes_that_do_not_fit_are_refused():
    layout = TokenLayout((Segment("patch", (2, 2)),))
    with pytest.raises(ValueError, match="bool mask"):
        Tokens(torch.zeros(1, 4, 2), torch.ones(1, 4), layout)
    with pytest.raises(ValueError, match="need ids"):
        ids = torch.zeros(1, 3, dtype=torch.int64)
        Tokens(torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), layout, ids)
