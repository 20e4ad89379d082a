"""Requests that wait together are scored together, and everybody gets their own scores.

Kills, among others: scores handed to the wrong request; a group merged with another; a batch above
the bound; a poisoned sample that fails its neighbours; a repeated id that is scored again; a
failure that is remembered as an answer; a component that stays behind, or lands on another request.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards.serving.batching import Answers, Batcher, Conflict
from rewards.serving.calls import RewardFailed
from rewards.serving.metrics import Metrics
from rewards.serving.pieces import cut, join
from rewards.serving.wire import Request
from tests.reward_server.kit import Brighter, Reader, Recorded, ask, flat, served

FOREVER_S = 3600.0


def run_batched(
    reward: Any, work: Callable[[Batcher], Coroutine[Any, Any, Any]], **settings: Any
) -> Any:
    """What `work` returns, run beside the open queue of a reward."""

    async def main() -> Any:
        batcher = Batcher(
            served("bright", reward),
            **({"max_batch": 8, "max_wait_s": 0.0, "metrics": Metrics()} | settings),
        )
        batcher.open()
        try:
            return await work(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main())


async def all_scores(batcher: Batcher, requests: list[Request]) -> list[Any]:
    """The scores of each request, or what was raised."""
    values = await all_values(batcher, requests)
    return [each["score"] if isinstance(each, dict) else each for each in values]


async def all_values(batcher: Batcher, requests: list[Request]) -> list[Any]:
    asked = [batcher.score(request) for request in requests]
    return await asyncio.gather(*asked, return_exceptions=True)


def test_joined_and_cut_requests_keep_every_sample_with_its_text() -> None:
    one = ask([0.1, 0.2], prompts=("a", "b"), metadata=({"n": 1}, {"n": 2}))
    two = ask([0.3], prompts=("c",), metadata=({"n": 3},))
    whole = join([one, two])
    assert whole.prompts == ("a", "b", "c") and whole.sample_ids == ("0", "1", "2")
    assert whole.metadata == ({"n": 1}, {"n": 2}, {"n": 3})
    assert whole.images["images"].equal(flat([0.1, 0.2, 0.3]))
    parts = cut(whole, 2)
    assert [part.prompts for part in parts] == [("a", "b"), ("c",)]
    assert [part.sample_ids for part in parts] == [("0", "1"), ("2",)]
    assert parts[1].images["images"].equal(flat([0.3])) and parts[1].metadata == ({"n": 3},)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_order_of_arrival_each_request_gets_its_own_scores(seed: int) -> None:
    shuffled = random.Random(seed)
    levels = [[shuffled.random() for _ in range(shuffled.randint(1, 5))] for _ in range(12)]
    requests = [ask(each, size=shuffled.choice([2, 4])) for each in levels]
    reward = Recorded()
    scores = run_batched(reward, lambda batcher: all_scores(batcher, requests))
    for own, request in zip(scores, requests, strict=True):
        assert own.equal(Recorded().score(images=request.images["images"]))
    assert len(reward.calls) < len(requests)  # some were joined
    assert max(reward.calls) <= 8 and sum(reward.calls) == sum(map(len, levels))


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [
        ((3, 4, 5, 1), [8, 5]),  # 5 does not fit beside 3 and 4, the 1 behind it does
        ((3, 4, 5, 2), [7, 7]),  # 2 does not either, and no request is torn apart to fill the call
    ],
)
def test_what_waits_together_fills_calls_in_the_order_of_arrival(
    sizes: tuple[int, ...], calls: list[int]
) -> None:
    requests = [ask([0.5] * num) for num in sizes]
    reward = Recorded()
    run_batched(reward, lambda batcher: all_scores(batcher, requests))
    assert reward.calls == calls


def test_images_of_different_sizes_are_not_joined() -> None:
    requests = [ask([0.1], size=2), ask([0.2], size=4), ask([0.3], size=2)]
    reward = Recorded()
    scores = run_batched(reward, lambda batcher: all_scores(batcher, requests))
    assert reward.calls == [2, 1]
    assert torch.cat(scores).tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_request_larger_than_a_call_is_scored_in_several() -> None:
    levels = [index / 20 for index in range(20)]
    reward = Recorded()
    [scores] = run_batched(reward, lambda batcher: all_scores(batcher, [ask(levels)]))
    assert reward.calls == [8, 8, 4]
    assert scores.tolist() == pytest.approx(levels)


def test_a_request_waits_for_company_and_no_longer_than_until_the_call_is_full() -> None:
    async def work(batcher: Batcher) -> Tensor:
        first = asyncio.ensure_future(batcher.score(ask([0.1] * 5)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert batcher.num_waiting == 1  # it would wait for an hour
        second = await batcher.score(ask([0.2] * 3))  # now the call is full
        return torch.cat([(await first)["score"], second["score"]])

    reward = Recorded()
    scores: Tensor = run_batched(reward, work, max_wait_s=FOREVER_S)
    assert reward.calls == [8]
    assert scores.tolist() == pytest.approx([0.1] * 5 + [0.2] * 3)


def test_requests_of_a_reward_of_groups_are_never_joined() -> None:
    texts = [("a", "a", "b"), ("a", "c"), ("c",)]
    requests = [
        Request("bright", "r", tuple("xyz"[: len(each)]), prompts=each, metadata=({},) * len(each))
        for each in texts
    ]
    scores = run_batched(
        Reader(), lambda batcher: all_scores(batcher, requests), max_batch=2, max_wait_s=FOREVER_S
    )
    # Joined, "a" would be 3 of 6; cut to calls of two, the first 2 of 2.
    expected = [[2 / 3, 2 / 3, 1 / 3], [0.5, 0.5], [1.0]]
    assert [each.tolist() for each in scores] == [pytest.approx(each) for each in expected]


def test_comparisons_are_joined_and_split_like_scores() -> None:
    two = {"first": flat([0.1, 0.5]), "second": flat([0.2, 0.5])}
    one = {"first": flat([0.9]), "second": flat([0.2])}
    requests = [
        ask([0, 0], images=two, prompts=("p", "p")),
        ask([0], images=one, prompts=("q",)),
    ]
    scores = run_batched(Brighter(), lambda batcher: all_scores(batcher, requests))
    assert [each.tolist() for each in scores] == [[0.0, 0.5], [1.0]]


def test_a_poisoned_sample_fails_its_own_request_alone() -> None:
    requests = [ask([0.1]), ask([0.2, 1.0]), ask([0.3]), ask([0.4, float("nan")])]
    reward = Recorded()
    scores = run_batched(reward, lambda batcher: all_scores(batcher, requests))
    assert isinstance(scores[1], RewardFailed)
    assert str(scores[1]) == "reward 'bright' raised RuntimeError: poison"
    assert scores[0].tolist() + scores[2].tolist() == pytest.approx([0.1, 0.3])
    assert scores[3].isnan().tolist() == [False, True]
    assert reward.calls == [6, 1, 2, 1, 2]  # together, then each alone


def test_after_any_failure_the_queue_goes_on() -> None:
    class Broken(Recorded):
        def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Tensor:
            level = float(images.mean())
            if level == 0:
                raise SystemExit(3)
            return {1: torch.zeros(7), 2: torch.zeros(1, dtype=torch.int64), 3: None}.get(
                round(level * 10), images.mean(dim=(1, 2, 3))
            )  # type: ignore[return-value]

    async def one_by_one(batcher: Batcher) -> list[str]:
        found = []
        for level in (0.0, 0.1, 0.2, 0.3):
            with pytest.raises(RewardFailed) as caught:
                await batcher.score(ask([level]))
            found.append(str(caught.value))
        assert (await batcher.score(ask([0.5])))["score"].tolist() == [0.5]
        return found

    expected = "reward 'bright' must return a float tensor [1], got "
    assert run_batched(Broken(), one_by_one) == [
        "reward 'bright' raised SystemExit: 3",
        expected + "torch.float32 [7]",
        expected + "torch.int64 [1]",
        expected + "NoneType",
    ]


def test_scores_of_half_precision_arrive_as_float32() -> None:
    class Half(Recorded):
        def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Tensor:
            return images.mean(dim=(1, 2, 3)).bfloat16().requires_grad_()

    [scores] = run_batched(Half(), lambda batcher: all_scores(batcher, [ask([0.5])]))
    assert scores.dtype == torch.float32 and not scores.requires_grad


class Detailed(Recorded):
    """Brightness with the three channels as components; "dark" only where all images are."""

    def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Any:
        scores = super().score(images=images)
        values = dict(zip(("red", "green", "blue"), images.mean(dim=(2, 3)).unbind(1), strict=True))
        values["itself"] = scores  # the same memory
        if (scores < 0.5).all():
            values["dark"] = 1 - scores
        return {"score": scores, **values}


def test_components_are_split_with_their_requests_and_joined_with_their_pieces() -> None:
    levels = [[0.1, 0.2], [0.3] * 9, [0.6]]  # the second takes two calls
    requests = [ask(each) for each in levels]
    for max_batch, calls in ((8, [3, 8, 1]), (64, [12])):
        reward = Detailed()
        found = run_batched(
            reward, lambda batcher: all_values(batcher, requests), max_batch=max_batch
        )
        assert reward.calls == calls
        for values, own, request in zip(found, levels, requests, strict=True):
            images = request.images["images"]
            assert values["green"].equal(images.mean(dim=(2, 3))[:, 1])
            assert values["itself"].equal(values["score"])
            assert all(each.shape == (len(own),) for each in values.values())
    assert all("dark" not in each for each in found)  # one of the call's images is not


def test_a_component_that_a_call_lacks_is_nan_and_not_zero() -> None:
    [values] = run_batched(
        Detailed(), lambda b: all_values(b, [ask([0.25, 0.25, 0.75, 0.25])]), max_batch=2
    )
    assert values["dark"].nan_to_num(-1).tolist() == [0.75, 0.75, -1, -1]


@pytest.mark.parametrize(
    ("components", "reason"),
    [
        ({"a": torch.zeros(2)}, r"float tensor \[1\] as its component 'a', got torch.float32 \[2"),
        ({"a": [0.0]}, r"as its component 'a', got list"),
        ({"a": torch.zeros(1).long()}, r"as its component 'a', got torch.int64 \[1\]"),
        ({"a/b": torch.zeros(1)}, r"a component's name must be .*; got 'a/b'"),
        ({"": torch.zeros(1)}, r"a component's name must be .*; got ''"),
        ({3: torch.zeros(1)}, r"a component's name must be .*; got 3"),
    ],
)
def test_components_that_do_not_fit_fail_the_request(
    components: dict[Any, Any], reason: str
) -> None:
    class Odd(Recorded):
        def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Any:
            return {"score": super().score(images=images), **components}

    [failed] = run_batched(Odd(), lambda batcher: all_scores(batcher, [ask([0.5])]))
    assert isinstance(failed, RewardFailed)
    with pytest.raises(RewardFailed, match=reason):
        raise failed


def test_a_mapping_without_a_score_fails_the_request() -> None:
    class Nameless(Recorded):
        def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Any:
            return {"clip": super().score(images=images)}

    [failed] = run_batched(Nameless(), lambda batcher: all_scores(batcher, [ask([0.5])]))
    assert str(failed).endswith("must call what is trained on 'score', got a mapping of 'clip'")


def test_whoever_waits_when_the_server_stops_is_told() -> None:
    async def main() -> list[Any]:
        reward = Recorded()
        batcher = Batcher(
            served("bright", reward), max_batch=8, max_wait_s=FOREVER_S, metrics=Metrics()
        )
        batcher.open()
        waiting = asyncio.ensure_future(all_scores(batcher, [ask([0.1]), ask([0.2])]))
        while batcher.num_waiting < 2:
            await asyncio.sleep(0)
        await batcher.close()
        return await waiting

    assert [str(each) for each in asyncio.run(main())] == ["the server is shutting down"] * 2


# --------------------------------------------------------------------------- answers


def counted(results: list[Any]) -> Callable[[], Coroutine[Any, Any, bytes]]:
    """Makes answers; the results are taken, and raised if they are errors, in order."""

    async def make() -> bytes:
        await asyncio.sleep(0)
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return bytes(result)

    return make


def test_a_repeated_id_is_answered_from_memory_even_while_it_is_being_made() -> None:
    async def main() -> None:
        answers, results = Answers(4), [b"one", b"two"]
        both = await asyncio.gather(*[answers.get("a", b"d", counted(results)) for _ in range(2)])
        assert both == [(b"one", False), (b"one", True)]
        assert await answers.get("a", b"d", counted(results)) == (b"one", True)
        assert await answers.get("b", b"d", counted(results)) == (b"two", False)
        with pytest.raises(Conflict, match="'a' was used for another request"):
            await answers.get("a", b"other", counted(results))

    asyncio.run(main())


def test_a_failure_is_not_remembered() -> None:
    async def main() -> None:
        answers, results = Answers(4), [RewardFailed("no"), b"yes"]
        with pytest.raises(RewardFailed):
            await answers.get("a", b"d", counted(results))
        assert await answers.get("a", b"d", counted(results)) == (b"yes", False)

    asyncio.run(main())


def test_a_client_that_goes_away_does_not_cancel_the_answer() -> None:
    async def main() -> None:
        answers, results = Answers(4), [b"one"]
        gone = asyncio.ensure_future(answers.get("a", b"d", counted(results)))
        await asyncio.sleep(0)
        gone.cancel()
        assert await answers.get("a", b"d", counted(results)) == (b"one", True)

    asyncio.run(main())


def test_memory_is_bounded_and_the_oldest_answer_goes_first() -> None:
    async def main() -> None:
        answers = Answers(3)
        for index in range(10):
            await answers.get(str(index), b"d", counted([b"x"]))
        await asyncio.sleep(0)
        assert len(answers) == 3
        assert (await answers.get("9", b"d", counted([])))[1]
        assert not (await answers.get("0", b"d", counted([b"again"])))[1]

    asyncio.run(main())
