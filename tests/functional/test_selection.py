"""selection.py: who is chosen by rank, and that the invalid never are.

Kills, among others: groups by position; ranks ascending; a bottom counted from the invalid; a tie
that takes both; all maxima but the first dropped from SFT; a pair in a group of equals.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional.selection import (
    best_and_worst,
    best_of_group,
    best_of_n,
    reward_weights,
)

# Groups 7 = {1, 3} and 2 = {2, 4, 9}, interleaved.
REWARDS = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0], dtype=torch.float64)
GROUP_ID = torch.tensor([7, 2, 7, 2, 2])
ALL: dict[str, Callable[..., Tensor]] = {
    "best_of_n": lambda *args: best_of_n(*args, top=1, bottom=1),
    "best_of_group": best_of_group,
    "reward_weights": reward_weights,
    "best_and_worst": best_and_worst,
}


def test_golden_choices() -> None:
    one_each = best_of_n(REWARDS, GROUP_ID, top=1, bottom=1)
    assert one_each.tolist() == [True, True, True, False, True]
    assert best_of_n(REWARDS, GROUP_ID, top=2, bottom=0).tolist() == [True, False, True, True, True]
    assert best_of_n(REWARDS, GROUP_ID, top=0, bottom=1).tolist() == [True, True] + [False] * 3
    assert best_of_group(REWARDS, GROUP_ID).tolist() == [0, 0, 1, 0, 1]
    assert best_and_worst(REWARDS, GROUP_ID).tolist() == [-1, -1, 1, 0, 1]
    assert reward_weights(REWARDS, GROUP_ID).tolist() == REWARDS.tolist()


def test_an_invalid_extreme_leaves_its_place_to_the_next() -> None:
    valid = torch.tensor([True, True, True, True, False])
    for bad in (torch.nan, 1e9, 0.0):
        rewards = torch.where(valid, REWARDS, bad)
        assert best_of_group(rewards, GROUP_ID, valid).tolist() == [0, 0, 1, 1, 0]
        assert best_and_worst(rewards, GROUP_ID, valid).tolist() == [-1, -1, 1, 1, 0]
        bottom = best_of_n(rewards, GROUP_ID, valid, top=0, bottom=1)
        assert bottom.tolist() == [True, True, False, False, False]
        assert reward_weights(rewards, GROUP_ID, valid).tolist() == [1, 2, 3, 4, 0]


def test_ties_fall_to_the_lower_index_and_equals_are_all_best_but_no_pair() -> None:
    equal, group_id = torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64)
    assert best_of_n(equal, group_id, top=1, bottom=0).tolist() == [True, False, False, False]
    assert best_of_n(equal, group_id, top=0, bottom=1).tolist() == [False, False, False, True]
    assert best_of_group(equal, group_id).tolist() == [1, 1, 1, 1]
    assert best_and_worst(equal, group_id).tolist() == [0, 0, 0, 0]


samples = st.lists(
    st.tuples(st.integers(0, 4), st.integers(-2, 2), st.booleans()), min_size=1, max_size=14
)


@given(drawn=samples, top=st.integers(0, 3), bottom=st.integers(1, 3))
def test_best_of_n_keeps_that_many_and_nobody_left_out_beats_them(
    drawn: list[tuple[int, int, bool]], top: int, bottom: int
) -> None:
    rewards, group_id, valid = (torch.tensor(column) for column in zip(*drawn, strict=True))
    keep = best_of_n(rewards.double(), group_id, valid, top=top, bottom=bottom)
    assert not (keep & ~valid).any()
    for group in group_id.unique():
        mine = (group_id == group) & valid
        kept, left = rewards[mine & keep], rewards[mine & ~keep]
        assert len(kept) == min(top + bottom, int(mine.sum()))
        if len(left):
            assert kept.sort().values[:bottom].max() <= left.min()
            assert top == 0 or kept.sort().values[-top:].min() >= left.max()


@given(drawn=samples)
def test_a_pair_has_one_winner_and_one_loser_or_nobody(drawn: list[tuple[int, int, bool]]) -> None:
    rewards, group_id, valid = (torch.tensor(column) for column in zip(*drawn, strict=True))
    sign = best_and_worst(rewards.double(), group_id, valid)
    for group in group_id.unique():
        mine = sign[group_id == group].tolist()
        members = rewards[(group_id == group) & valid]
        is_pair = len(members) > 1 and bool((members != members[0]).any())
        assert sorted(x for x in mine if x) == ([-1, 1] if is_pair else [])


@pytest.mark.parametrize("name", ALL)
def test_bad_inputs_are_refused_and_nothing_carries_a_gradient(name: str) -> None:
    assert not ALL[name](REWARDS.clone().requires_grad_(), GROUP_ID).requires_grad
    with pytest.raises(ValueError, match="group_id must have the shape of rewards"):
        ALL[name](REWARDS, GROUP_ID[:3])
    with pytest.raises(ValueError, match=r"not finite at \[1\]"):
        ALL[name](torch.tensor([1.0, torch.nan, 2, 3, 4]), GROUP_ID)


def test_counts_and_weights_out_of_range_are_refused() -> None:
    for top, bottom in ((0, 0), (-1, 2), (2, -1)):
        with pytest.raises(ValueError, match="count samples"):
            best_of_n(REWARDS, GROUP_ID, top=top, bottom=bottom)
    with pytest.raises(ValueError, match="must not be negative"):
        reward_weights(-REWARDS, GROUP_ID)
