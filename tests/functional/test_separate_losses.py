"""One clipped loss per reward from two numbers: equal to the plain sum over rewards, everywhere.

Kills, among others: the total handed to both terms; positive and negative swapped; a difference
that turns a share of zero into one of the other sign; the clamp after the weight, or on the sum; a
monitor that enters; a negative weight outside the clip; a nan reward that is not masked.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowrl.functional.advantages import (
    clip_advantages,
    global_std_normalized,
    group_centered,
    group_normalized,
    signed_sums,
)
from flowrl.functional.surrogates import ppo_clip, ppo_clip_each

LOW, HIGH = 0.2, 0.4


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sums(*advantages: float) -> tuple[Tensor, Tensor]:
    """(sum, sum of the negative ones) of one decision's advantages."""
    each = f64(*advantages)
    return each.clamp(min=0).sum() + each.clamp(max=0).sum(), each.clamp(max=0).sum()


@settings(max_examples=200, deadline=None)
@given(
    ratio=st.floats(0, 4),
    weighted=st.lists(st.tuples(st.floats(0, 3), st.floats(-5, 5)), min_size=1, max_size=6),
)
def test_two_numbers_give_the_weighted_sum_of_every_rewards_clipped_surrogate(
    ratio: float, weighted: list[tuple[float, float]]
) -> None:
    moved = f64(ratio).requires_grad_()
    plain = 0.0 * moved
    for weight, advantage in weighted:
        held = min(max(ratio, 1 - LOW), 1 + HIGH)
        is_free = ratio * advantage <= held * advantage
        plain = plain + weight * advantage * (moved if is_free else held)
    total, negative = sums(*(weight * advantage for weight, advantage in weighted))
    value = ppo_clip_each(moved, total, negative, LOW, HIGH)
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-12)
    have, want = (torch.autograd.grad(each, moved)[0] for each in (value, plain))
    if min(abs(ratio - 1 + LOW), abs(ratio - 1 - HIGH)) > 1e-9:  # there the slope jumps
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)


def test_golden_beyond_the_bounds_only_one_side_is_stopped() -> None:
    # Rewards say 3 and -2, so P + M = 1, M = -2. At 2: 1.4 * 3 - 2 * 2. At 1.1: 1.1. At .5:
    # .5 * 3 - .8 * 2. Summed, 2 would be held to 1.4 and .5 free.
    ratio = f64(2, 1.1, 0.5).requires_grad_()
    total, negative = f64(1, 1, 1), f64(-2, -2, -2)
    value = ppo_clip_each(ratio, total, negative, LOW, HIGH)
    assert value.tolist() == pytest.approx([0.2, 1.1, -0.1], abs=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), ratio)
    assert gradient.tolist() == [-2, 1, 3]
    (summed,) = torch.autograd.grad(ppo_clip(ratio, total, LOW, HIGH).sum(), ratio)
    assert summed.tolist() == [0, 1, 1]


def test_within_the_bounds_it_is_the_surrogate_of_the_sum_with_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    total, negative = advantages.sum(0), advantages.clamp(max=0).sum(0)
    for ratio in (torch.ones(50), torch.linspace(1 - LOW + 1e-6, 1 + HIGH - 1e-6, 50)):
        ratio = ratio.double().requires_grad_()
        each = ppo_clip_each(ratio, total, negative, LOW, HIGH)
        torch.testing.assert_close(each, ppo_clip(ratio, total, LOW, HIGH), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(each.sum(), ratio)
        torch.testing.assert_close(gradient, total, rtol=1e-12, atol=1e-12)


def test_where_all_rewards_agree_it_is_the_surrogate_of_the_sum_exactly() -> None:
    ratio = torch.tensor([0.1, 0.5, 1.0, 1.3, 3.0])
    for total, negative in ((0.3, 0.0), (-0.3, -0.3)):
        every = torch.full((5,), total)
        assert torch.equal(
            ppo_clip_each(ratio, every, torch.full((5,), negative), LOW, HIGH),
            ppo_clip(ratio, every, LOW, HIGH),
        )


def test_a_rows_advantages_go_to_its_row_and_get_no_gradient() -> None:
    ratio = torch.full((2, 2), 2.0, dtype=torch.float64)
    total, negative = f64(1, -1).requires_grad_(), f64(-2, -4).requires_grad_()
    value = ppo_clip_each(ratio, total, negative, LOW, HIGH)
    # 1.4 * 3 - 2 * 2 and 1.4 * 3 - 2 * 4
    assert torch.allclose(value, f64(0.2, -3.8)[:, None].expand(2, 2)) and not value.requires_grad


def test_two_numbers_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"negative must have the shape of advantage, \[2\]"):
        ppo_clip_each(torch.ones(2), torch.ones(2), torch.ones(1), LOW, HIGH)


# ----------------------------------------------------------------------------- the two sums

GROUP_ID = torch.tensor([7, 2, 7, 2])
# Deviations: a (-1, -4, 1, 4), b (30, -10, -30, 10).
REWARDS = {"a": f64(0, 0, 2, 8), "b": f64(60, 0, 0, 20)}


def of(
    weights: dict[str, float], *, limit: float = 5.0, valid: Tensor | None = None
) -> tuple[list[float], list[float]]:
    total, negative = signed_sums(
        REWARDS, GROUP_ID, valid, weights=weights, normalize=group_centered, limit=limit
    )
    return total.tolist(), negative.tolist()


def test_golden_sums_clamp_each_reward_before_its_weight() -> None:
    # a clamped to 3: (-1, -3, 1, 3); b: (3, -3, -3, 3), then halved.
    assert of({"a": 1.0, "b": 0.5}, limit=3.0) == (
        [0.5, -4.5, -0.5, 4.5],
        [-1, -4.5, -1.5, 0],
    )


def test_a_negative_weight_is_a_negated_reward_and_a_monitor_does_not_enter() -> None:
    negated = {"a": REWARDS["a"], "b": -REWARDS["b"]}
    expected = signed_sums(
        negated, GROUP_ID, weights={"a": 1.0, "b": 0.5}, normalize=group_centered, limit=3.0
    )
    total, negative = of({"a": 1.0, "b": -0.5}, limit=3.0)
    assert total == expected[0].tolist() and negative == expected[1].tolist()
    watched = {**REWARDS, "c": f64(torch.nan, 1, 2, 3)}
    alone = signed_sums(
        watched,
        GROUP_ID,
        weights={"a": 0.0, "b": 1.0, "c": 0.0},
        normalize=group_centered,
        limit=50.0,
    )
    assert alone[0].tolist() == [30, -10, -30, 10] and alone[1].tolist() == [0, -10, -30, 0]


def test_a_nan_that_is_marked_invalid_counts_for_nobody_and_an_unmarked_one_is_refused() -> None:
    rewards = {"a": f64(0, 0, 2, 8), "b": f64(60, 0, 0, torch.nan)}
    valid = torch.tensor([True, True, True, False])
    weights = {"a": 1.0, "b": 1.0}
    total, negative = signed_sums(
        rewards, GROUP_ID, valid, weights=weights, normalize=group_centered, limit=50.0
    )
    # Group 2 has one member left, which deviates by 0.
    assert total.tolist() == [29, 0, -29, 0] and negative.tolist() == [-1, 0, -30, 0]
    with pytest.raises(ValueError, match="not finite at"):
        signed_sums(rewards, GROUP_ID, weights=weights, normalize=group_centered, limit=50.0)
    with pytest.raises(ValueError, match="weights must name exactly the rewards"):
        signed_sums(rewards, GROUP_ID, weights={"a": 1.0}, normalize=group_centered, limit=5.0)


@pytest.mark.parametrize("normalize", [group_normalized, global_std_normalized, group_centered])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_share_of_each_sign_has_its_sign_in_float32_whatever_the_rewards(
    normalize: object, data: st.DataObject
) -> None:
    columns = st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4)
    rewards = {str(k): torch.tensor(data.draw(columns)) for k in range(3)}
    weights = dict(zip(rewards, (1.0, 1e-4, -300.0), strict=True))
    total, negative = signed_sums(
        rewards,
        GROUP_ID,
        weights=weights,
        normalize=normalize,  # type: ignore[arg-type]
        limit=5.0,
    )
    assert (negative <= 0).all() and (total - negative >= 0).all()
    each = [
        weights[name] * clip_advantages(normalize(rewards[name], GROUP_ID), 5.0)  # type: ignore[operator]
        for name in rewards
    ]
    torch.testing.assert_close(total, torch.stack(each).sum(0), rtol=1e-5, atol=1e-3)
    is_blamed = torch.stack(each).min(0).values < 0
    assert torch.equal(negative < 0, is_blamed)
