"""advantages.py: golden numbers, invariances and the silence of invalid samples.

Kills, among others: groups taken by position instead of id; the baseline over the batch; ddof
swapped; an invalid reward in the mean, the std or the count; nan * 0; n / (n - 1) inverted; eps
multiplied; gdpo without its second pass, or with it per group; gains negated, or normalised
over all steps.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional.advantages import (
    clip_advantages,
    dense_gains,
    gdpo,
    global_std_normalized,
    group_centered,
    group_normalized,
    leave_one_out,
    sum_of_normalized,
    weighted_sum,
    zero_std_groups,
)

ALL: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (group_normalized, global_std_normalized, group_centered, leave_one_out)
}
# Groups 7 = {1, 3} and 2 = {2, 4, 9}, interleaved, with ids that are not 0, 1.
REWARDS = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0], dtype=torch.float64)
GROUP_ID = torch.tensor([7, 2, 7, 2, 2])


def assert_golden(actual: Tensor, *expected: float) -> None:
    assert actual.tolist() == pytest.approx(list(expected), abs=1e-12)


def test_golden_group_centered() -> None:
    # Means 2 and 5.
    assert_golden(group_centered(REWARDS, GROUP_ID), -1, -3, 1, -1, 4)


def test_golden_group_normalized() -> None:
    # Deviations (-1, 1) and (-3, -1, 4): variances 2/2 and 26/3, with ddof=1 2/1 and 26/2.
    a, b = 1 + 0.5, (26 / 3) ** 0.5 + 0.5
    assert_golden(
        group_normalized(REWARDS, GROUP_ID, eps=0.5), -1 / a, -3 / b, 1 / a, -1 / b, 4 / b
    )
    a, b = 2**0.5, 13**0.5
    unbiased = group_normalized(REWARDS, GROUP_ID, eps=0.0, ddof=1)
    assert_golden(unbiased, -1 / a, -3 / b, 1 / a, -1 / b, 4 / b)
    assert torch.equal(
        group_normalized(REWARDS, GROUP_ID), group_normalized(REWARDS, GROUP_ID, eps=1e-4, ddof=0)
    )


def test_golden_global_std_normalized() -> None:
    # All five: mean 3.8, squares 7.84 + 3.24 + .64 + .04 + 27.04 = 38.8; std of the raw rewards,
    # not of the deviations from their groups.
    std = (38.8 / 5) ** 0.5 + 0.5
    expected = [d / std for d in (-1, -3, 1, -1, 4)]
    assert_golden(global_std_normalized(REWARDS, GROUP_ID, eps=0.5), *expected)
    std = (38.8 / 4) ** 0.5
    expected = [d / std for d in (-1, -3, 1, -1, 4)]
    assert_golden(global_std_normalized(REWARDS, GROUP_ID, eps=0.0, ddof=1), *expected)


def test_golden_leave_one_out() -> None:
    # Group 7: 1 - 3, 3 - 1. Group 2: 2 - 6.5, 4 - 5.5, 9 - 3.
    assert_golden(leave_one_out(REWARDS, GROUP_ID), -2, -4.5, 2, -1.5, 6)


samples = st.lists(
    st.tuples(st.floats(-5, 5, width=32), st.integers(-3, 3), st.booleans()),
    min_size=1,
    max_size=12,
)


def unzip(drawn: list[tuple[float, int, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    rewards, group_id, valid = zip(*drawn, strict=True)
    return torch.tensor(rewards).double(), torch.tensor(group_id), torch.tensor(valid)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(drawn=samples)
def test_advantages_sum_to_zero_in_every_group_and_are_zero_where_invalid(
    name: str, drawn: list[tuple[float, int, bool]]
) -> None:
    rewards, group_id, valid = unzip(drawn)
    advantages = ALL[name](rewards, group_id, valid)
    assert (advantages[~valid] == 0).all()
    for group in group_id.unique():
        assert advantages[group_id == group].sum().item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=40, deadline=None)
@given(drawn=samples, bad=st.sampled_from([float("nan"), float("inf"), -1e30]))
def test_an_invalid_sample_is_as_if_absent(
    name: str, drawn: list[tuple[float, int, bool]], bad: float
) -> None:
    rewards, group_id, valid = unzip(drawn)
    poisoned = torch.where(valid, rewards, bad)
    advantages = ALL[name](poisoned, group_id, valid)
    torch.testing.assert_close(advantages[valid], ALL[name](rewards[valid], group_id[valid]))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(drawn=samples, seed=st.integers(0, 99))
def test_advantages_do_not_depend_on_order_or_on_the_names_of_groups(
    name: str, drawn: list[tuple[float, int, bool]], seed: int
) -> None:
    rewards, group_id, valid = unzip(drawn)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    moved = ALL[name](rewards[order], 1000 - 7 * group_id[order], valid[order])
    torch.testing.assert_close(moved, ALL[name](rewards, group_id, valid)[order])


@pytest.mark.parametrize("name", ALL)
def test_a_shift_of_one_groups_rewards_changes_nothing_in_its_deviations(name: str) -> None:
    moved = REWARDS + torch.where(GROUP_ID == 7, 2.0, 0.0)
    a, b = ALL[name](REWARDS, GROUP_ID), ALL[name](moved, GROUP_ID)
    if name == "global_std_normalized":  # its scale is the batch's
        a, b = a / a.norm(), b / b.norm()
    torch.testing.assert_close(a, b)


def test_group_normalized_ignores_scale_and_has_unit_variance() -> None:
    a, b = (group_normalized(scale * REWARDS, GROUP_ID, eps=0.0) for scale in (1.0, 1e-3))
    torch.testing.assert_close(a, b)
    for group in (7, 2):
        assert a[GROUP_ID.eq(group)].var(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize("name", ALL)
def test_equal_rewards_and_groups_of_one_get_exactly_zero_in_float32(name: str) -> None:
    # .1 is not representable: 7 * .1 / 7 rounds, and 1e-9 / (1e-9 + 1e-8) would be an advantage of
    # .1.
    rewards = torch.cat([torch.full((7,), 0.1), torch.tensor([0.7])])
    group_id = torch.tensor([0] * 7 + [1])
    kwargs = {"eps": 1e-8} if "normalized" in name else {}
    advantages = ALL[name](rewards, group_id, **kwargs)
    assert advantages.dtype == torch.float32
    assert (advantages == 0).all()


@pytest.mark.parametrize("name", ALL)
def test_advantages_are_detached_and_float32_at_least(name: str) -> None:
    rewards = REWARDS.bfloat16().requires_grad_()
    advantages = ALL[name](rewards, GROUP_ID)
    assert advantages.dtype == torch.float32
    assert not advantages.requires_grad


@pytest.mark.parametrize("name", ALL)
def test_no_valid_sample_and_no_sample_give_zeros_and_nothing(name: str) -> None:
    nobody = ALL[name](REWARDS, GROUP_ID, torch.zeros(5, dtype=torch.bool))
    assert (nobody == 0).all()
    assert ALL[name](REWARDS[:0], GROUP_ID[:0]).shape == (0,)


@pytest.mark.parametrize("name", ALL)
def test_bad_inputs_are_refused(name: str) -> None:
    function = ALL[name]
    with pytest.raises(ValueError, match=r"rewards must be \[N\]"):
        function(REWARDS[:, None], GROUP_ID)
    with pytest.raises(ValueError, match="group_id must have the shape of rewards"):
        function(REWARDS, GROUP_ID[:3])
    with pytest.raises(ValueError, match="valid must have the shape of rewards"):
        function(REWARDS, GROUP_ID, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="group_id must be int64"):
        function(REWARDS, GROUP_ID.float())
    with pytest.raises(ValueError, match="valid bool"):
        function(REWARDS, GROUP_ID, torch.ones(5))
    with pytest.raises(ValueError, match=r"not finite at \[1\].*mark it False in valid"):
        function(torch.tensor([1.0, float("nan"), 2, 3, 4]), GROUP_ID)


def test_zero_std_groups_golden() -> None:
    # Group 0 equal, 1 spread, 2 single, 3 spread but with one valid member, 4 spread below the
    # floor.
    rewards = torch.tensor(
        [0.1, 1, 5, 1, 0.1, 2, 3, float("nan"), 0.1, 0.1 + 1e-7], dtype=torch.float64
    )
    group_id = torch.tensor([0, 1, 2, 3, 0, 1, 3, 1, 4, 4])
    valid = torch.tensor([True] * 6 + [False, False, True, True])
    expected = [True, False, True, True, True, False, True, False, True, True]
    assert zero_std_groups(rewards, group_id, valid).tolist() == expected
    lower = zero_std_groups(rewards, group_id, valid, floor=1e-8)
    assert lower.tolist() == [*expected[:8], False, False]


def test_a_group_with_one_valid_member_teaches_nothing_at_any_floor() -> None:
    valid = torch.tensor([True, True, False, True, True])
    flat = zero_std_groups(REWARDS, GROUP_ID, valid, floor=0.0)
    assert flat.tolist() == [True, False, True, False, False]


def test_a_group_without_zero_std_has_a_nonzero_advantage() -> None:
    flat = zero_std_groups(REWARDS, GROUP_ID)
    assert not flat.any()
    assert group_normalized(REWARDS, GROUP_ID).count_nonzero() == 5


def test_clip_advantages_golden_and_refusal() -> None:
    assert clip_advantages(torch.tensor([-9.0, -5, 0.5, 7]), 5.0).tolist() == [-5, -5, 0.5, 5]
    with pytest.raises(ValueError, match="limit must be positive"):
        clip_advantages(REWARDS, 0.0)


def test_weighted_sum_golden() -> None:
    rewards = {"pick": torch.tensor([1.0, 2.0]), "ocr": torch.tensor([10.0, -10.0])}
    assert weighted_sum(rewards, {"ocr": 0.5, "pick": 2.0}).tolist() == [7.0, -1.0]


def test_a_reward_of_weight_zero_does_not_enter_even_as_nan() -> None:
    rewards = {"pick": REWARDS, "watched": torch.full_like(REWARDS, torch.nan)}
    weights = {"pick": 2.0, "watched": 0.0}
    assert torch.equal(weighted_sum(rewards, weights), 2 * REWARDS)
    normalized = sum_of_normalized(rewards, GROUP_ID, weights=weights)
    assert torch.equal(normalized, 2 * group_normalized(REWARDS, GROUP_ID))


def test_sum_of_normalized_adds_the_normalized_rewards_so_that_scale_does_not_matter() -> None:
    other, weights = REWARDS.flip(0), {"a": 1.0, "b": 0.5}
    expected = group_normalized(REWARDS, GROUP_ID) + 0.5 * group_normalized(other, GROUP_ID)
    actual = sum_of_normalized({"a": REWARDS, "b": other}, GROUP_ID, weights=weights)
    torch.testing.assert_close(actual, expected)
    large = sum_of_normalized({"a": REWARDS, "b": 1e3 * other}, GROUP_ID, weights=weights, eps=0.0)
    small = sum_of_normalized({"a": REWARDS, "b": other}, GROUP_ID, weights=weights, eps=0.0)
    torch.testing.assert_close(large, small)


def test_sum_of_normalized_passes_valid_eps_and_ddof_on() -> None:
    valid = torch.tensor([True, True, True, False, True])
    poisoned = torch.where(valid, REWARDS, torch.nan)
    actual = sum_of_normalized(
        {"a": poisoned}, GROUP_ID, valid, weights={"a": 3.0}, eps=0.5, ddof=1
    )
    expected = 3 * group_normalized(REWARDS, GROUP_ID, valid, eps=0.5, ddof=1)
    torch.testing.assert_close(actual, expected)


def test_rewards_and_weights_must_name_the_same_things() -> None:
    with pytest.raises(ValueError, match=r"rewards \['ocr'\], but name \['orc'\]"):
        weighted_sum({"ocr": REWARDS}, {"orc": 1.0})
    with pytest.raises(ValueError, match="must name exactly the rewards"):
        weighted_sum({}, {})
    with pytest.raises(ValueError, match="b must have the shape of a"):
        weighted_sum({"a": REWARDS, "b": REWARDS[:1]}, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match="must name exactly the rewards"):
        sum_of_normalized({"a": REWARDS, "b": REWARDS}, GROUP_ID, weights={"a": 1.0})


def test_golden_gdpo() -> None:
    # Groups (0, 2) and (0, 6): both rewards z = (-1, 1); sum with weights 1 and 2 of equal z:
    # (-3, 3) and, where b is reversed, (1, -1): mean 0, variance (9 + 9 + 1 + 1) / 4 = 5.
    a = torch.tensor([0.0, 2.0, 0.0, 6.0], dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, 9.0, 7.0], dtype=torch.float64)
    group_id = torch.tensor([4, 4, 1, 1])
    value = gdpo({"a": a, "b": b}, group_id, weights={"a": 1.0, "b": 2.0}, eps=0.0)
    assert_golden(value, *(x / 5**0.5 for x in (-3, 3, 1, -1)))


def test_gdpo_has_the_same_scale_for_one_reward_and_for_three() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 12, dtype=torch.float64, generator=generator)
    group_id = torch.arange(12) // 4
    for count in (1, 3):
        rewards = {str(i): drawn[i] for i in range(count)}
        value = gdpo(rewards, group_id, weights=dict.fromkeys(rewards, 1.0), eps=0.0)
        assert value.var(correction=0).item() == pytest.approx(1)


def test_gdpo_leaves_invalid_samples_at_zero_and_out_of_the_second_pass() -> None:
    valid = torch.tensor([True, True, True, True, False])
    poisoned = torch.where(valid, REWARDS, torch.nan)
    value = gdpo({"a": poisoned}, GROUP_ID, valid, weights={"a": 1.0})
    kept = gdpo({"a": REWARDS[valid]}, GROUP_ID[valid], weights={"a": 1.0})
    assert value[4] == 0
    torch.testing.assert_close(value[valid], kept)


def test_golden_dense_gains() -> None:
    # Gains of step 0: (1, 3), of step 1: (4, -4); each column has mean 2 or 0 and std 1 or 4.
    rewards = torch.tensor([[0.0, 1.0, 5.0], [2.0, 5.0, 1.0]], dtype=torch.float64)
    value = dense_gains(rewards, torch.tensor([3, 3]), eps=0.0)
    assert value.tolist() == [[-1, 1], [1, -1]]


def test_dense_gains_ignore_where_a_sample_starts_and_invalid_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    offset = torch.arange(5.0, dtype=torch.float64)[:, None]
    expected = dense_gains(rewards, GROUP_ID)
    torch.testing.assert_close(dense_gains(rewards + offset, GROUP_ID), expected)
    valid = torch.tensor([True, True, True, True, False])
    value = dense_gains(torch.where(valid[:, None], rewards, torch.nan), GROUP_ID, valid)
    assert (value[4] == 0).all()
    torch.testing.assert_close(value[valid], dense_gains(rewards[valid], GROUP_ID[valid]))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 2)])
def test_dense_gains_need_a_reward_before_and_after(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, T \+ 1\]"):
        dense_gains(torch.zeros(shape), GROUP_ID)
