"""Win rates: pairing, orders, ties, pairs that cannot be judged, and what a group costs.

The judges here are small but real. Kills, among others: an answer of the second order that is not
turned round; a NaN that becomes a tie or a loss; an offset lost between calls; a reward that is run
once per pair instead of once per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt, PromptBatch
from rewards.base import Metadata
from rewards.pairwise import Judge, PointwiseJudge, WinRate, win_rates
from rewards.simple import Brightness

nan = float("nan")


def flat(levels: Sequence[float]) -> Tensor:
    """One flat 2 x 2 image per level."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


class LevelJudge:
    """A function of the two images' mean levels [B], which counts what it is asked."""

    inputs = ("images", "prompts", "metadata")

    def __init__(self, decide: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.decide = decide
        self.asked: list[tuple[int, list[str], int]] = []

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] = (),
    ) -> Tensor:
        self.asked.append((len(first), list(prompts), len(metadata)))
        return self.decide(*(images.mean(dim=(1, 2, 3)) for images in (first, second)))


def brighter(first: Tensor, second: Tensor) -> Tensor:
    return 0.5 + 0.5 * (first - second).sign()


def score(judge: Judge, images: Tensor, **args: object) -> list[float]:
    num = len(images)
    reward = WinRate(judge=judge, **args)  # type: ignore[arg-type]
    return reward.score(images=images, prompts=["p"] * num, metadata=[{}] * num).tolist()


def test_win_rates_by_hand() -> None:
    # 0 beats 1, ties with 2; 1 beats 2 with probability 0.7; 3 met nobody.
    rates = win_rates(
        torch.tensor([1.0, 0.5, 0.7, nan]),
        torch.tensor([0, 0, 1, 0]),
        torch.tensor([1, 2, 2, 3]),
        4,
    )
    # (1 + .5) / 2, (0 + .7) / 2, (.5 + .3) / 2, none; the pair (0, 3) counts for neither.
    torch.testing.assert_close(rates, torch.tensor([0.75, 0.35, 0.4, nan]), equal_nan=True)


@pytest.mark.parametrize("orders", ["both", "single"])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_a_shuffled_group_has_shuffled_rates_whatever_the_batches(
    orders: str, batch_size: int | None
) -> None:
    levels = [0.1, 0.2, 0.2, 0.7, 0.9]
    expected = torch.tensor([0.0, 1.5, 1.5, 3.0, 4.0]) / 4  # the two equal ones tie
    for seed in range(5):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        judge = LevelJudge(brighter)
        rates = score(judge, flat(levels)[order], orders=orders, batch_size=batch_size)
        assert rates == pytest.approx(expected[order].tolist())
        num = 20 if orders == "both" else 10
        assert sum(asked for asked, _, _ in judge.asked) == num
        assert max(asked for asked, _, _ in judge.asked) == min(batch_size or num, num)


def test_a_liking_for_the_first_image_cancels_in_both_orders_and_not_in_one() -> None:
    def first_always(first: Tensor, second: Tensor) -> Tensor:
        return torch.ones_like(first)

    images = flat([0.1, 0.9, 0.5])
    assert score(LevelJudge(first_always), images) == [0.5, 0.5, 0.5]
    assert score(LevelJudge(first_always), images, orders="single") == [1.0, 0.5, 0.0]

    def leans(first: Tensor, second: Tensor) -> Tensor:
        return (0.5 + 0.2 * (first - second).sign() + 0.3).clamp(0, 1)

    # P is 1 where the first is brighter and .6 where the second is: (1 + .4) / 2 = .7 and .3.
    assert score(LevelJudge(leans), images) == pytest.approx([0.3, 0.7, 0.5])
    backwards = score(LevelJudge(leans), images.flip(0), orders="single")[::-1]
    assert score(LevelJudge(leans), images, orders="single") != pytest.approx(backwards)


def test_a_pair_without_a_verdict_is_left_out_and_not_a_tie() -> None:
    def refuses_dark_first(first: Tensor, second: Tensor) -> Tensor:
        return brighter(first, second).where((first > 0.15) | (second < 0.6), nan)

    # (0, 3) is NaN in one order of two, so it is not judged in either: 0 loses to two, 3 beats two.
    rates = score(LevelJudge(refuses_dark_first), flat([0.1, 0.3, 0.5, 0.7]))
    assert rates == pytest.approx([0.0, 1.5 / 3 - 1 / 6, 2 / 3, 1.0])

    def never(first: Tensor, second: Tensor) -> Tensor:
        return torch.full_like(first, nan)

    assert all(math.isnan(rate) for rate in score(LevelJudge(never), flat([0.1, 0.2])))


def test_a_sample_alone_has_no_rate_and_a_broken_image_costs_only_itself() -> None:
    assert math.isnan(score(LevelJudge(brighter), flat([0.4]))[0])
    # This judge would call every pair with a broken image a tie.
    rates = score(LevelJudge(lambda a, b: brighter(a, b).nan_to_num(0.5)), flat([0.2, nan, 0.4]))
    assert rates[0] == 0 and math.isnan(rates[1]) and rates[2] == 1


@pytest.mark.parametrize(("orders", "calls"), [("both", 12 * 11), ("single", 66)])
def test_the_number_of_judge_calls_is_as_stated(orders: str, calls: int) -> None:
    judge = LevelJudge(brighter)
    reward = WinRate(judge=judge, orders=orders)
    images = flat([i / 12 for i in range(12)])
    reward.score(images=images, prompts=["p"] * 12, metadata=[{}] * 12)
    assert reward.num_calls(12) == calls == sum(asked for asked, _, _ in judge.asked)
    assert judge.asked == [(calls, ["p"] * calls, calls)]


def test_a_reward_as_judge_scores_every_sample_once() -> None:
    class Counted(Brightness):
        seen = 0

        def score(self, *, images: Tensor) -> Tensor:  # type: ignore[override]
            self.seen += len(images)
            return super().score(images=images)

    counted = Counted()
    reward = WinRate(judge=PointwiseJudge(counted))
    rates = reward.score(images=flat([0.3, 0.1, 0.2]))
    assert rates.tolist() == [1.0, 0.0, 0.5]
    assert counted.seen == reward.num_calls(3) == 3
    assert reward.inputs == ("images",)


def test_a_judge_made_from_a_reward_wins_ties_and_sigmoids() -> None:
    one, other = flat([0.5, 0.5, 0.5, nan]), flat([0.2, 0.45, 0.5, 0.5])
    prompts = ["p"] * 4
    hard = PointwiseJudge(Brightness(), margin=0.1).compare(one, other, prompts)
    torch.testing.assert_close(hard, torch.tensor([1, 0.5, 0.5, nan]), equal_nan=True)
    soft = PointwiseJudge(Brightness(), temperature=0.1).compare(one, other, prompts)
    # 1 / (1 + e^-3), 1 / (1 + e^-.5)
    expected = torch.tensor([0.952574, 0.622459, 0.5, nan])
    torch.testing.assert_close(soft, expected, equal_nan=True, atol=1e-5, rtol=0)
    back = PointwiseJudge(Brightness(), temperature=0.1).compare(other, one, prompts)
    torch.testing.assert_close(soft + back, torch.tensor([1, 1, 1, nan]), equal_nan=True)


def test_both_orders_of_a_consistent_judge_equal_one() -> None:
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for judge in (PointwiseJudge(Brightness()), PointwiseJudge(Brightness(), temperature=0.02)):
        assert score(judge, images) == pytest.approx(score(judge, images, orders="single"))
        assert sum(score(judge, images)) == pytest.approx(3.0)  # always one half on average


def test_by_name_it_conforms_and_each_group_of_a_batch_is_compared_by_itself() -> None:
    check_reward(rewards.load("win_rate", judge="brightness"))
    check_reward(rewards.load("win_rate", judge="shapes_graded", temperature=0.1))
    check_reward(WinRate(judge=LevelJudge(brighter)))
    reward = rewards.load("win_rate", judge="brightness", margin=0.01)
    batch = PromptBatch(
        prompts=tuple(Prompt(text) for text in "abababa"),
        group_id=torch.tensor([4, 9, 4, 9, 4, 9, 4]),
        sample_id=torch.arange(7),
        member=torch.arange(7) // 2,
        update=torch.zeros(7, dtype=torch.int64),
        seed=0,
    )
    rewards_of_run = RewardSet([("win", reward, 1.0)], batch_size=2)
    assert rewards_of_run.group_scope
    images = flat([0.5, 0.0, 0.6, 0.9, 0.7, 0.4, 0.1])
    rates = rewards_of_run.score(batch, images=images).rewards["win"]
    # Of the even ones .1 < .5 < .6 < .7, of the odd ones 0 < .4 < .9.
    expected = torch.tensor([1 / 3, 0, 2 / 3, 1, 1, 0.5, 0])
    torch.testing.assert_close(rates, expected)


def test_samples_of_two_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one prompt, got 2: 'a', 'b'.*once per group"):
        WinRate(judge=LevelJudge(brighter)).score(
            images=flat([0.0, 1.0]), prompts=["a", "b"], metadata=[{}, {}]
        )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda a, b: (a - b)[:, None], r"float \[6\], got shape \[6, 1\]"),
        (lambda a, b: a - b, r"in \[0, 1\] or NaN, got -0.5"),
        (lambda a, b: a.mean(), r"got shape \[\]"),
    ],
)
def test_an_answer_that_is_no_probability_is_refused(
    answer: Callable[[Tensor, Tensor], Tensor], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"LevelJudge.compare must .*{expected}"):
        score(LevelJudge(answer), flat([0.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"judge": "brightness", "orders": "twice"}, "both, single, got 'twice'"),
        ({"judge": "brightness", "batch_size": 0}, "batch_size must be at least 1"),
        ({"judge": "brightness", "margin": -1.0}, "margin must be at least 0"),
        ({"judge": "brightness", "temperature": 0.0}, "temperature positive"),
        ({"judge": "brightness", "margin": 0.1, "temperature": 1.0}, "give one"),
        ({"judge": "brightness", "judge_args": {"scale": 2}}, "'scale' is not an argument"),
        ({"judge": LevelJudge(brighter), "margin": 0.1}, "LevelJudge is a judge already"),
        ({"judge": "win_rate", "judge_args": {"judge": "brightness"}}, "scope 'sample'"),
        ({}, "needs judge"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        rewards.load("win_rate", **args)


def test_an_unknown_judge_gets_the_closest_name() -> None:
    with pytest.raises(LookupError, match="did you mean 'brightness'"):
        rewards.load("win_rate", judge="brightnes")
