"""Token dropout that draws from given counts, and once for a batch."""

import pytest
import torch

from tokenizers_vis.addons.dropout import TokenDropout

SQUARES = (1, 4, 9, 16, 25)


def drawn(dropout, num=400):
    return dropout.draw(num, SQUARES, torch.Generator().manual_seed(0))


def test_only_the_given_counts_are_drawn():
    assert drawn(TokenDropout("uniform", counts=(16, 4))).unique().tolist() == [4, 16]
    assert drawn(TokenDropout("uniform")).unique().tolist() == list(SQUARES)
    # One count: a control that is trained at it alone.
    assert drawn(TokenDropout(counts=(9,))).unique().tolist() == [9]
    # Powers of two of the given ones, and their greatest: 4 and 9, not 25.
    assert drawn(TokenDropout("pow2", counts=(4, 9))).unique().tolist() == [4, 9]


def test_a_full_image_keeps_all_that_the_tokenizer_has():
    # Killed by taking the greatest of the given counts for all.
    assert drawn(TokenDropout("uniform", counts=(4, 9), full=1.0)).unique().tolist() == [25]


def test_a_shared_draw_is_one_number_and_each_batch_draws_anew():
    dropout = TokenDropout("uniform", is_shared=True)
    generator = torch.Generator().manual_seed(0)
    batches = [dropout.draw(8, SQUARES, generator) for _ in range(50)]
    assert all(len(batch) == 8 and batch.unique().numel() == 1 for batch in batches)
    assert {int(batch[0]) for batch in batches} == set(SQUARES)


def test_counts_that_the_tokenizer_cannot_keep_are_refused():
    with pytest.raises(ValueError, match=r"\[5\]"):
        drawn(TokenDropout(counts=(4, 5)))
