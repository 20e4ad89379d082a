"""What rewards do wrong while a run goes on, and what becomes of their samples.

The rewards here misbehave for real: they raise, hang, run out of memory. Kills, among others: a
failed score that becomes 0; a poisoned sample that costs its neighbours the score; a score that
lands on another sample; tries without end; a group that is trained on the one score left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.errors import RewardError
from flowrl.train.attempts import Patience, within
from flowrl.train.collect import Breaker, thin_groups
from flowrl.train.scoring import RewardSet
from flowrl.types import Failures, Prompt, PromptBatch, Scores

QUICK = Patience(backoff_s=0)
NUM = 11
TRUTH = torch.arange(1.0, NUM + 1)
IMAGES = (TRUTH / 100)[:, None, None, None].expand(NUM, 3, 2, 2).contiguous()


def batch(num: int = NUM, group_id: Tensor | None = None) -> PromptBatch:
    number = torch.arange(num)
    zeros = torch.zeros(num, dtype=torch.int64)
    group_id = zeros if group_id is None else group_id
    return PromptBatch(tuple(Prompt("same") for _ in number), group_id, number, number, zeros, 0)


class Numbered:
    """Reads a sample's number off its image; `fault(numbers, call)` is called first."""

    inputs = ("images", "prompts")
    scope = "sample"
    range = (0.0, 100.0)

    def __init__(self, fault: Callable[[Tensor, int], None]) -> None:
        self.fault = fault
        self.sizes: list[int] = []

    def score(self, **inputs: Any) -> Any:
        numbers = (inputs["images"].mean(dim=(1, 2, 3)) * 100).round()
        self.sizes.append(len(numbers))
        self.fault(numbers, len(self.sizes))
        return numbers


def scored(reward: Any, patience: Patience = QUICK, **options: Any) -> tuple[Scores, Failures]:
    rewards = RewardSet([("mine", reward, 1.0)], patience=patience, **options)
    scores = rewards.score(batch(), images=IMAGES)
    return scores, scores.failures.get("mine", Failures())


def only_lost(scores: Scores, *numbers: int) -> bool:
    """Whether exactly these have no score, and all others their own."""
    lost = torch.isin(TRUTH, torch.tensor(numbers, dtype=torch.float32))
    values = scores.rewards["mine"]
    return bool(
        values[lost].isnan().all()
        and torch.equal(values[~lost], TRUTH[~lost])
        and torch.equal(scores.valid, ~lost)
    )


def raises(error: Exception, *, on: tuple[int, ...] = (), calls: int = 10**6) -> Any:
    """A fault: raises in the first calls, and with `on` only where one of these samples is in."""

    def fault(numbers: Tensor, call: int) -> None:
        if call <= calls and (not on or torch.isin(numbers, torch.tensor(on)).any()):
            raise error

    return fault


def test_one_blip_costs_nothing() -> None:
    reward = Numbered(raises(ConnectionError("reset by peer"), calls=2))
    scores, failed = scored(reward)
    assert only_lost(scores)
    assert failed == Failures(2, 0, "ConnectionError: reset by peer")
    assert reward.sizes == [NUM] * 3


@pytest.mark.parametrize("numbers", [(1,), (4, 5), (2, 7, 11)])
def test_a_sample_that_breaks_its_reward_costs_no_other_the_score(numbers: tuple[int, ...]) -> None:
    scores, failed = scored(Numbered(raises(ValueError("cannot be read"), on=numbers)))
    assert only_lost(scores, *numbers)
    assert failed.samples == len(numbers)
    assert failed.reason == "ValueError: cannot be read"


def test_a_batch_that_does_not_fit_into_memory_is_scored_in_halves() -> None:
    def out_of_memory(numbers: Tensor, _: int) -> None:
        if len(numbers) > 3:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    reward = Numbered(out_of_memory)
    scores, failed = scored(reward)
    assert only_lost(scores) and failed.samples == 0
    assert reward.sizes[-1] <= 3 and failed.calls == 3 + 2  # thrice whole, once each half


def test_a_reward_that_is_away_is_not_asked_for_every_part_of_the_batch() -> None:
    reward = Numbered(raises(ConnectionError("refused")))
    scores, failed = scored(reward)
    assert only_lost(scores, *range(1, NUM + 1))
    assert reward.sizes == [NUM] * 3 and failed.calls == 3


def test_a_reward_that_always_raises_ends_and_leaves_no_zero() -> None:
    reward = Numbered(raises(TypeError("bug")))
    scores, failed = scored(reward)
    assert only_lost(scores, *range(1, NUM + 1))
    assert failed.samples == NUM
    assert len(reward.sizes) == failed.calls <= 6 * NUM


def test_a_call_that_hangs_is_left_behind_and_its_late_answer_thrown_away() -> None:
    release = threading.Event()

    def hang(numbers: Tensor, call: int) -> None:
        if call == 1:
            release.wait(timeout=60)
            numbers += 50  # what it returns in the end

    scores, failed = scored(Numbered(hang), Patience(retries=1, backoff_s=0, timeout_s=0.5))
    release.set()
    assert only_lost(scores)
    assert failed == Failures(1, 0, "TimeoutError: no answer within 0.5 s")


def test_a_reward_that_hangs_for_good_loses_its_samples_and_not_the_run() -> None:
    release = threading.Event()
    reward = Numbered(lambda numbers, call: release.wait(timeout=60) and None)
    scores, failed = scored(reward, Patience(retries=1, backoff_s=0, timeout_s=0.1))
    release.set()
    assert only_lost(scores, *range(1, NUM + 1))
    assert failed.calls == 2 and reward.sizes == [NUM] * 2


def test_within_a_time_limit_errors_and_values_pass_through() -> None:
    assert within(60, lambda: 3) == within(None, lambda: 3) == 3
    with pytest.raises(KeyError, match="inside"):
        within(60, lambda: {}["inside"])


def test_no_gradient_is_kept_in_the_thread_of_a_timed_call() -> None:
    weight = torch.ones((), requires_grad=True)
    seen = []

    class Differentiable(Numbered):
        def score(self, **inputs: Any) -> Tensor:
            values = super().score(**inputs) * weight
            seen.append(values.requires_grad)
            return values

    scored(Differentiable(lambda *_: None), Patience(timeout_s=60))
    assert seen == [False]


def test_a_broken_promise_is_not_tried_again() -> None:
    class Short(Numbered):
        def score(self, **inputs: Any) -> Tensor:
            values: Tensor = super().score(**inputs)
            return values[:-1]

    reward = Short(lambda *_: None)
    with pytest.raises(RewardError, match=r"must return a float tensor \[11\]"):
        scored(reward)
    assert reward.sizes == [NUM]


def test_a_group_is_scored_whole_or_not_at_all() -> None:
    class Relative(Numbered):
        scope = "group"

    group_id = torch.tensor([3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3])
    reward = Relative(raises(ValueError("no"), on=(2,)))  # of group 1
    rewards = RewardSet([("mine", reward, 1.0)], patience=QUICK)
    scores = rewards.score(batch(group_id=group_id), images=IMAGES)
    assert only_lost(scores, 2, 4, 6, 8, 10)
    assert reward.sizes == [5, 5, 5, 6]


def test_components_are_put_in_the_samples_order_and_lost_with_the_score() -> None:
    class Halved(Numbered):
        def score(self, **inputs: Any) -> dict[str, Tensor]:
            values = super().score(**inputs)
            return {"score": values, "half": values / 2}

    reward = Halved(raises(ValueError("no"), on=(5,)))
    scores, _ = scored(reward, batch_size=4)
    assert only_lost(scores, 5)
    half = scores.components["mine/half"]
    assert torch.equal(half[~half.isnan()] * 2, TRUTH[TRUTH != 5])


def test_a_mapping_without_a_score_is_refused() -> None:
    class Nameless(Numbered):
        def score(self, **inputs: Any) -> dict[str, Tensor]:
            return {"clip": super().score(**inputs)}

    with pytest.raises(RewardError, match=r"returned a mapping of 'clip'; .* called 'score'"):
        scored(Nameless(lambda *_: None))


@pytest.mark.parametrize("key", ["a/b", "", "mean", "failed_calls", 3, "a\nb"])
def test_a_component_that_could_not_be_logged_is_refused_before_the_run(key: Any) -> None:
    class Odd(Numbered):
        def score(self, **inputs: Any) -> dict[Any, Tensor]:
            values = super().score(**inputs)
            return {"score": values, key: values}

    rewards = RewardSet([("mine", Odd(lambda *_: None), 1.0)])
    with pytest.raises(RewardError, match=r"'mine' calls a component .*give it another name"):
        rewards.probe(Prompt("p"), images=IMAGES[:2])


def test_what_the_model_does_not_make_is_refused_before_the_run() -> None:
    class Films(Numbered):
        inputs = ("videos",)

    with pytest.raises(
        RewardError, match="'mine' reads videos, and this model makes images and lat"
    ):
        RewardSet([("mine", Films(lambda *_: None), 1.0)])
    films = RewardSet([("mine", Films(lambda *_: None), 1.0)], provides=("videos", "images"))
    assert films.names == ("mine",)


# ------------------------------------------------------------------------- when it is too much


def test_a_group_counts_while_enough_of_it_has_scores() -> None:
    group = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
    valid = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]).bool()
    assert thin_groups(valid, group, 0.5).tolist() == [True, True] + [False] * 6
    assert torch.equal(thin_groups(valid, group, 0.25), valid)
    assert not thin_groups(valid, group, 0.75).any()
    assert torch.equal(thin_groups(valid, group, 0.0), valid)


def lost(num: int, of: int = 10) -> dict[str, Tensor]:
    values = torch.ones(of)
    values[:num] = torch.nan
    return {"a": values, "b": torch.ones(of)}


def test_the_breaker_bears_its_share_of_a_full_window_and_no_more() -> None:
    breaker = Breaker(max_share=0.1, window=10)  # 10 of the 100 samples of ten steps
    breaker.observe(lost(10), {})
    for _ in range(9):
        breaker.observe(lost(0), {})
    breaker.observe(lost(10), {})  # the first step has left the window
    with pytest.raises(
        RewardError, match=r"'a' could not score 11 samples of the last 10 steps.*HTTP 500.*max_inv"
    ):
        breaker.observe(lost(1), {"a": "HTTP 500"})


def test_the_breaker_goes_on_after_a_resume() -> None:
    first, second = (Breaker(max_share=0.1, window=10) for _ in range(2))
    first.observe(lost(10), {})
    second.load_state_dict(first.state_dict())
    with pytest.raises(RewardError, match="11 samples of the last 2 steps"):
        second.observe(lost(1), {})
    second.load_state_dict(None)
    second.observe(lost(1), {})
