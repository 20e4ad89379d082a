"""Judges behind an endpoint, on real sockets: what is sent, how answers are read, what may fail.

Kills, among others: images that lose bits on the way; answers in order of arrival; one request at a
time; a retry of what will not pass, or none of what may; a wrong answer that becomes a score; a
failure that becomes NaN; a key that is not sent, or is shown in an error.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rewards
from rewards.pairwise import WinRate
from rewards.vlm_endpoint import Endpoint
from rewards.vlm_judge import VlmJudge, VlmPairJudge
from tests.reward_models.endpoint import (
    Reply,
    Served,
    body,
    completion,
    images_of,
    log_probs,
    serve,
)

GIVEN = {"prompts": ["a cat", "a {dog}", "three birds"]}


@pytest.fixture(scope="module")
def small() -> Tensor:
    return torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def judge(served: Served, **args: Any) -> VlmJudge:
    fields = {"base_url": served.url, "backoff_s": 0.0, **args.pop("endpoint", {})}
    made = rewards.load("vlm_judge", model="tiny", endpoint=fields, **args)
    assert isinstance(made, VlmJudge)
    return made


def always(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    """The replies one after the other, the last of them for ever."""
    left, lock = list(replies), threading.Lock()

    def reply(_: dict[str, Any]) -> Reply:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return reply


def test_what_is_sent_is_the_question_and_the_image_bit_by_bit(
    small: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    fields = {"api_key_env": "JUDGE_KEY", "concurrency": 1, "extra": {"seed": 1, "top_p": None}}
    with serve(always(completion("7"))) as served:
        reward = judge(served, mode="score", question='Rate "{prompt}"!', endpoint=fields)
        out = reward.score(images=small, **GIVEN)
        sent = served.requests
        assert len(sent) == 3
        for index, (path, headers, request) in enumerate(sent):
            assert path == "/v1/chat/completions"
            assert headers["authorization"] == "Bearer secret"
            assert headers["content-type"] == "application/json"
            content = request.pop("messages")[0]["content"]
            assert content[1] == {"type": "text", "text": f'Rate "{GIVEN["prompts"][index]}"!'}
            assert [part["type"] for part in content] == ["image_url", "text"]
            assert request == {"model": "tiny", "max_tokens": 64, "temperature": 0, "seed": 1}
    assert out["score"].tolist() == [7, 7, 7] and out["parsed"].tolist() == [1, 1, 1]


def test_images_arrive_unchanged(small: Tensor) -> None:
    with serve(always(completion("7"))) as served:
        judge(served, mode="score").score(images=small[:1], prompts=["x"])
        (image,) = served.images()
    expected = np.rint(small[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(image), expected)


def test_requests_are_under_way_together_and_answers_keep_their_order() -> None:
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 5, 4) / 255
    came = [threading.Event() for _ in range(5)]
    came[4].set()

    def reply(request: dict[str, Any]) -> Reply:
        index = images_of(request)[0].getpixel((0, 0))[0]
        came[index].set()
        assert came[index + 1].wait(30), "the next request never came: they are not concurrent"
        return completion(str(index))

    with serve(reply) as served:
        reward = judge(served, mode="score", endpoint={"concurrency": 4, "retries": 0})
        out = reward.score(images=images, prompts=["x"] * 4)
    assert out["score"].tolist() == [0, 1, 2, 3]


def test_an_answer_that_cannot_be_read_is_nan_and_counted(small: Tensor) -> None:
    replies = {"a": completion("eleven"), "b": completion("11"), "c": completion(None),
               "d": completion("4", finish="length"), "e": completion("4")}  # fmt: skip

    def reply(request: dict[str, Any]) -> Reply:
        return replies[request["messages"][0]["content"][1]["text"]]

    with serve(reply) as served:
        reward = judge(served, mode="score", question="{prompt}")
        out = reward.score(images=small[:1].expand(5, 3, 5, 4), prompts=list(replies))
        assert len(served.requests) == 5
    assert torch.isnan(out["score"]).tolist() == [True, True, True, True, False]
    assert out["parsed"].tolist() == [0, 0, 0, 0, 1] and out["score"][4] == 4


def test_a_broken_image_is_not_asked_about(small: Tensor) -> None:
    images = small.clone()
    images[1, 0, 0, 0] = math.nan
    with serve(always(completion("3"))) as served:
        out = judge(served, mode="score").score(images=images, **GIVEN)
        assert len(served.requests) == 2
        nothing = judge(served, mode="score").score(images=images[1:2], prompts=["x"])
    assert out["score"].isnan().tolist() == out["parsed"].isnan().tolist() == [False, True, False]
    assert nothing["score"].isnan().all() and nothing["parsed"].isnan().all()


def test_yes_and_no_are_summed_over_their_spellings(small: Tensor) -> None:
    tops = [("Yes", -1.0), (" yes", -2.0), ("\nNO", -1.5), ("Yesterday", -0.1), ("nope", -0.2)]
    with serve(always(completion("Yes", log_probs=log_probs(*tops)))) as served:
        out = judge(served).score(images=small, **GIVEN)
        _, _, request = served.requests[0]
        assert (request["logprobs"], request["top_logprobs"]) == (True, 20)
        assert request["max_tokens"] == 1
    yes, no = math.exp(-1) + math.exp(-2), math.exp(-1.5)
    assert out["score"].tolist() == pytest.approx([yes / (yes + no)] * 3)


def test_without_yes_and_no_there_is_no_score(small: Tensor) -> None:
    with serve(always(completion("?", log_probs=log_probs(("Maybe", -0.1))))) as served:
        out = judge(served).score(images=small, **GIVEN)
    assert out["score"].isnan().all() and out["parsed"].tolist() == [0, 0, 0]


def half() -> Reply:
    status, headers, data = completion("7")
    return status, headers, data[: len(data) // 2]


MAY_PASS = {
    "a server error": body({"error": "out of memory"}, status=500),
    "a full queue": body({"error": "busy"}, status=429, **{"Retry-After": "0"}),
    "a gateway's page": body(b"<html>bad gateway</html>", status=502),
    "half a body": half(),
    "no JSON": body(b"hello"),
    "JSON of another kind": body([1, 2]),
    "no choices": body({"choices": []}),
    "a choice without a message": body({"choices": [{}]}),
    "content that is no text": completion({"x": 1}),
}


@pytest.mark.parametrize("name", MAY_PASS)
def test_what_may_pass_is_tried_again(name: str, small: Tensor) -> None:
    with serve(always(MAY_PASS[name], MAY_PASS[name], completion("7"))) as served:
        reward = judge(served, mode="score", endpoint={"retries": 2})
        out = reward.score(images=small[:1], prompts=["x"])
        assert out["score"].tolist() == [7] and len(served.requests) == 3


@pytest.mark.parametrize("name", MAY_PASS)
def test_what_does_not_pass_is_an_error_that_names_the_endpoint(name: str, small: Tensor) -> None:
    with serve(always(MAY_PASS[name])) as served:
        reward = judge(served, mode="score", endpoint={"retries": 1})
        with pytest.raises(ConnectionError, match="2 tries failed") as caught:
            reward.score(images=small[:1], prompts=["x"])
        assert served.url in str(caught.value) and "VlmJudge" in str(caught.value)
        assert len(served.requests) == 2


def test_silence_is_a_timeout(small: Tensor) -> None:
    over = threading.Event()

    def reply(_: dict[str, Any]) -> Reply:
        over.wait(60)
        return completion("7")

    with serve(reply) as served:
        fields = {"retries": 1, "timeout_s": 0.2}
        reward = judge(served, mode="score", endpoint=fields)
        try:
            with pytest.raises(TimeoutError, match=r"2 tries .* no answer in 0.2 s") as caught:
                reward.score(images=small[:1], prompts=["x"])
        finally:
            over.set()
        assert served.url in str(caught.value)


def test_a_refusal_is_not_tried_again_and_stops_the_others(small: Tensor) -> None:
    with serve(always(body({"error": "no such model"}, status=404))) as served:
        reward = judge(served, mode="score", endpoint={"concurrency": 1, "retries": 5})
        with pytest.raises(ConnectionError, match=r"it refused: HTTP 404: .*no such model"):
            reward.score(images=small[:1].expand(50, 3, 5, 4), prompts=["x"] * 50)
        assert len(served.requests) == 1


def test_a_request_that_fails_for_good_stops_the_others(small: Tensor) -> None:
    with serve(always(body({"error": "out of memory"}, status=500))) as served:
        reward = judge(served, mode="score", endpoint={"concurrency": 1, "retries": 1})
        with pytest.raises(ConnectionError, match="2 tries failed"):
            reward.score(images=small[:1].expand(50, 3, 5, 4), prompts=["x"] * 50)
        assert len(served.requests) == 2


def test_nobody_there_is_an_error(small: Tensor) -> None:
    with serve(always(completion("7"))) as served:
        pass  # the port is free again
    reward = judge(served, mode="score", endpoint={"retries": 1})
    with pytest.raises(ConnectionError, match=r"2 tries failed, the last with: ConnectError"):
        reward.score(images=small[:1], prompts=["x"])


@pytest.mark.parametrize("given", [None, {"content": None}])
def test_a_server_without_log_probabilities_is_named(given: object, small: Tensor) -> None:
    with serve(always(completion("Yes", log_probs=given))) as served:
        with pytest.raises(ConnectionError, match=r"no log-probabilities.*use mode 'score'"):
            judge(served).score(images=small[:1], prompts=["x"])
        assert len(served.requests) == 1


def test_a_key_that_is_not_set_is_named_before_anything_is_sent(small: Tensor) -> None:
    with serve(always(completion("7"))) as served:
        reward = judge(served, mode="score", endpoint={"api_key_env": "NO_SUCH_KEY"})
        with pytest.raises(ValueError, match=r"environment variable 'NO_SUCH_KEY' \(api_key_env"):
            reward.score(images=small[:1], prompts=["x"])
        assert served.requests == []


def test_a_pause_doubles_and_is_bounded() -> None:
    endpoint = Endpoint("http://x", backoff_s=0.5)
    assert [endpoint.pause(retry, None) for retry in (0, 1, 2, 10)] == [0.5, 1, 2, 30]
    assert endpoint.pause(3, 0.0) == 0 and endpoint.pause(0, 1e9) == 30


def test_pairs_are_asked_in_order_and_make_win_rates() -> None:
    images = torch.tensor([0.2, 0.6, 0.4]).view(3, 1, 1, 1).expand(3, 3, 5, 4)

    def reply(request: dict[str, Any]) -> Reply:
        first, second = (image.getpixel((0, 0))[0] for image in images_of(request))
        return completion("Image 1" if first > second else "Image 2")

    with serve(reply) as served:
        args = {"model": "tiny", "endpoint": {"base_url": served.url}}
        pair = VlmPairJudge(**args, question="{prompt}: which?")
        wins = pair.compare(images[:2], images[1:], ["x", "x"])
        assert wins.tolist() == [0, 1]
        content = served.requests[0][2]["messages"][0]["content"]
        assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
        assert content[2]["text"] == "x: which?"
        rates = WinRate(judge="vlm_pair_judge", judge_args=args)
        assert rates.score(images=images, prompts=["x"] * 3).tolist() == [0, 1, 0.5]


def test_verdicts_of_ones_own_and_none() -> None:
    replies = always(completion("Draw"), completion("Both"), completion("left"))
    images = torch.full((1, 3, 5, 4), 0.5)
    with serve(replies) as served:
        pair = VlmPairJudge(
            model="tiny", pattern="^(left|right|draw|both)$", endpoint={"base_url": served.url},
            verdicts={"LEFT": 1, "right": 0, "draw": 0.5},
        )  # fmt: skip
        wins = [pair.compare(images, images, ["x"]).item() for _ in range(3)]
        broken = pair.compare(images, images * math.inf, ["x"])
        assert len(served.requests) == 3
    assert wins[0] == 0.5 and math.isnan(wins[1]) and wins[2] == 1 and broken.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    at = {"endpoint": {"base_url": "http://x"}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mode": "pairwise"}, "mode must be one of yes_no, score"),
        ({"question": "{text}?"}, r"got \{text\} in"),
        ({"words": "yes"}, "words must be two"),
        ({"low": 3, "high": 3}, "low must be below high"),
        ({"endpoint": {"url": "http://x"}}, "mapping with base_url .* got url"),
        ({"endpoint": {"base_url": "x:80"}}, "begin with http"),
        ({"endpoint": {"base_url": "http://x", "concurrency": 0}}, "concurrency >= 1"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            VlmJudge(**{**at, **args})
    with pytest.raises(ValueError, match=r"P\(first wins\), in \[0, 1\]"):
        VlmPairJudge(**at, verdicts={"Image 1": 2})
    one = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        VlmJudge(**at).score(images=one, prompts=["x", "y"])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        VlmPairJudge(**at).compare(one, one.expand(2, 3, 4, 4), ["x"])
