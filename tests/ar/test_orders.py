"""Orders: how many forwards, which positions, who may see whom.

Kills, among others: an anti-diagonal that counts n^2, groups that leave a position out or name it
twice, a mask that lets a group see itself, a cosine that reveals nothing in a forward.
"""

import pytest
import torch

from pipelines.ar.orders import TokenOrder, antidiagonal, blocks, masked_cosine, raster, segments


@pytest.mark.parametrize(
    ("order", "forwards"),
    [
        (raster(16), 16),
        (antidiagonal(4, 4), 7),  # 2n - 1
        (antidiagonal(3, 5), 7),
        (antidiagonal(2, 4, 4), 8),  # 2n + t - 2
        (blocks(4, 4, 2), 4),  # (n / p)^2
        (segments([1, 4, 9]), 3),
        (masked_cosine(16, 4), 4),
    ],
)
def test_the_number_of_forwards_is_the_number_of_groups(order, forwards):
    assert order.num_forwards == forwards
    assert sorted(torch.cat(order.groups).tolist()) == list(range(order.num_tokens))


def test_groups_by_hand():
    found = [group.tolist() for group in antidiagonal(2, 3).groups]
    assert found == [[0], [1, 3], [2, 4], [5]]
    found = [group.tolist() for group in blocks(2, 4, 2).groups]
    assert found == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert segments([1, 2]).level.tolist() == [0, 1, 1]


def test_a_position_depends_on_earlier_groups_alone():
    order = antidiagonal(2, 2)
    assert order.depends.tolist() == [
        [False, False, False, False],
        [True, False, False, False],
        [True, False, False, False],
        [True, True, True, False],
    ]


def test_hidden_tokens_follow_the_cosine_and_end_at_none():
    order = masked_cosine(100, 8, generator=torch.Generator().manual_seed(0))
    hidden = 100 - torch.tensor([len(group) for group in order.groups]).cumsum(0)
    # floor(100 cos(pi k / 16)), k = 1 ... 8
    assert hidden.tolist() == [98, 92, 83, 70, 55, 38, 19, 0]
    every = masked_cosine(5, 5)
    assert [len(group) for group in every.groups] == [1] * 5
    other = masked_cosine(100, 8, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other.groups[7], order.groups[7])


def test_what_is_no_order_is_refused():
    with pytest.raises(ValueError, match="exactly once"):
        TokenOrder((torch.arange(2), torch.arange(1, 4)))
    with pytest.raises(ValueError, match="do not divide into squares of 2"):
        blocks(4, 5, 2)
    with pytest.raises(ValueError, match="1 to 4 forwards, not 5"):
        masked_cosine(4, 5)
