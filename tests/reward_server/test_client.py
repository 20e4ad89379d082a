"""A remote reward is a reward: the same declaration, the same scores, the same errors.

Kills, among others: pieces put together in another order; a group torn apart; all requests to the
first of two servers; a server that failed and is asked again at once; a client that draws from the
run's random numbers; a connection before the first use; components that stay at the server.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import rewards
from flowrl.testing import check_reward
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt, PromptBatch
from rewards.pairwise import PointwiseJudge, WinRate
from rewards.serving import balance
from rewards.serving.balance import RemoteRefused
from rewards.serving.client import RemoteJudge, RemoteReward
from rewards.serving.wire import decode_request
from rewards.simple import Brightness
from tests.reward_server import proxy
from tests.reward_server.kit import (
    PATIENT_S,
    Reader,
    Recorded,
    Running,
    flat,
    served,
    serving,
)

LEVELS = [index / 16 for index in range(13)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    judge = PointwiseJudge(Brightness(), temperature=0.1)
    shapes = rewards.load("shapes_graded")
    size = rewards.load("jpeg_compressibility")
    everything = [
        served("bright", Recorded()), served("same", Reader()), served("judge", judge),
        served("shapes", shapes), served("size", size),
    ]  # fmt: skip
    with serving(*everything, max_wait_s=0.0, max_body=2_000_000) as running:
        yield running


@pytest.mark.parametrize("name", ["shapes", "bright"])
@pytest.mark.parametrize("encoding", ["tensor", "png"])
def test_it_conforms_and_declares_what_the_reward_declares(
    server: Running, name: str, encoding: str
) -> None:
    reward = rewards.load("remote", url=server.url, reward=name, encoding=encoding)
    check_reward(reward)
    original = {"shapes": rewards.load("shapes_graded"), "bright": Brightness()}[name]
    for member in ("inputs", "scope", "range", "higher_is_better"):
        assert getattr(reward, member) == getattr(original, member)


def test_an_open_range_stays_open(server: Running) -> None:
    assert RemoteReward(url=server.url, reward="size").range == (-float("inf"), 0.0)


@pytest.mark.parametrize("size", [None, 1, 4, 13, 100])
def test_pieces_are_put_together_in_order(server: Running, size: int | None) -> None:
    reward = RemoteReward(url=server.url, reward="bright", images_per_request=size)
    scores = reward.score(images=flat(LEVELS))
    assert scores.equal(Brightness().score(images=flat(LEVELS)))


class Detailed(Recorded):
    """Brightness, and what it says of the single channels."""

    def score(self, **inputs: Any) -> Any:
        images = inputs["images"]
        scores = super().score(**inputs)
        return {"score": scores, "red": images[:, 0].mean(dim=(1, 2)), "itself": scores}


@pytest.mark.parametrize("size", [None, 1, 4])
def test_components_arrive_bit_by_bit_however_the_batch_is_cut(size: int | None) -> None:
    images = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[2] = torch.nan
    here = Detailed().score(images=images)
    with serving(served("bright", Detailed())) as running:
        reward = RemoteReward(url=running.url, reward="bright", images_per_request=size)
        there = reward.score(images=images)
        assert isinstance(there, dict) and list(there) == ["score", "itself", "red"]
        for name, values in here.items():
            assert torch.equal(there[name].view(torch.int32), values.view(torch.int32)), name
        assert there["score"].isnan().tolist() == [i == 2 for i in range(7)]
        check_reward(reward)
        # What a run logs of it is what it would log in process.
        batch = PromptBatch((Prompt("p"),) * 6, *[torch.arange(6)] * 4, seed=0)
        whole = torch.cat([images[:2], images[3:]])
        logged = [
            RewardSet([("r", each, 1.0)]).score(batch, images=whole)
            for each in (reward, Detailed())
        ]
        assert list(logged[0].components) == ["r/itself", "r/red"]
        for key, values in logged[1].components.items():
            assert values.equal(logged[0].components[key])


def test_a_group_is_asked_for_as_a_whole(server: Running) -> None:
    reward = RemoteReward(url=server.url, reward="same", images_per_request=1)
    scores = reward.score(prompts=["a", "b", "a", "a"], metadata=[{}] * 4)
    assert scores.tolist() == [0.75, 0.25, 0.75, 0.75]


def test_half_precision_images_and_an_empty_batch(server: Running) -> None:
    reward = RemoteReward(url=server.url, reward="bright")
    assert reward.score(images=flat([0.25]).bfloat16()).tolist() == [0.25]
    empty = reward.score(images=torch.empty(0, 3, 4, 4))
    assert empty.shape == (0,) and empty.dtype == torch.float32


def test_png_gives_the_same_scores_of_8_bit_images_with_fewer_bytes(server: Running) -> None:
    levels = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = levels.float() / 255
    scores = [
        RemoteReward(url=server.url, reward="size", encoding=encoding).score(images=images)
        for encoding in ("tensor", "png")
    ]
    assert scores[0].equal(scores[1])
    assert scores[0].equal(rewards.load("jpeg_compressibility").score(images=images))


def test_a_remote_judge_gives_the_win_rates_of_a_judge_here(server: Running) -> None:
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    here = WinRate(judge=PointwiseJudge(Brightness(), temperature=0.1)).score(images=images)
    there = rewards.load(
        "win_rate", judge="remote_judge", judge_args={"url": server.url, "reward": "judge"}
    )
    assert there.inputs == ("images",)
    torch.testing.assert_close(there.score(images=images), here, rtol=0, atol=1e-6)
    judge = RemoteJudge(url=server.url, reward="judge")
    assert judge.compare(images, images, ["p"] * 5).tolist() == [0.5] * 5


def test_nothing_is_asked_before_it_is_needed_and_no_random_number_is_drawn(
    server: Running,
) -> None:
    RemoteReward(url="http://127.0.0.1:1", reward="bright")
    before = random.getstate(), torch.get_rng_state()
    with proxy.Proxy(server.url, proxy.status(503)) as between:
        reward = RemoteReward(url=between.url, reward="bright", backoff_s=0.001)
        reward.score(images=flat(LEVELS))
        assert between.num_asked == 2
    assert random.getstate() == before[0] and torch.get_rng_state().equal(before[1])


# --------------------------------------------------------------------------- several servers


def test_the_server_with_the_fewest_open_requests_is_asked() -> None:
    both = [Recorded(), Recorded()]
    for reward in both:
        reward.go.clear()
    first, second = (serving(served("bright", each), max_wait_s=0.0) for each in both)
    with first, second:
        client = RemoteReward(url=[first.url, second.url], reward="bright", images_per_request=1)
        scoring = threading.Thread(target=lambda: client.score(images=flat([0.1, 0.2])))
        scoring.start()
        for reward in both:  # neither gets both requests while it is busy with one
            assert reward.entered.wait(PATIENT_S)
            reward.go.set()
        scoring.join()
        assert [reward.calls for reward in both] == [[1], [1]]
        whole = RemoteReward(url=[first.url, second.url], reward="bright")
        assert whole.score(images=flat(LEVELS)).tolist() == pytest.approx(LEVELS)
        assert sorted(reward.calls[1] for reward in both) == [6, 7]  # an equal part each


def test_a_server_that_fails_is_left_alone_until_its_time_is_up(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "_LONGEST_PAUSE_S", 0.001)
    for ban_s, is_banned in ((1e6, True), (0.0, False)):
        monkeypatch.setattr(balance, "_LONGEST_BAN_S", ban_s)
        with proxy.Proxy(server.url, *[proxy.status(503)] * 100) as between:
            client = RemoteReward(url=[between.url, server.url], reward="bright", backoff_s=1e6,
                                  total_s=1e9, images_per_request=1, parallel=1)  # fmt: skip
            assert client.score(images=flat(LEVELS)).tolist() == pytest.approx(LEVELS)
            assert (between.num_asked == 1) == is_banned


def test_when_one_piece_is_refused_nobody_waits_for_the_others(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "_LONGEST_PAUSE_S", 1e6)
    is_missed = threading.Event()

    def spoil(handler: proxy.Handler, question: bytes, answer: bytes) -> None:
        if decode_request(question).sample_ids == ("0",):
            assert is_missed.wait(PATIENT_S)
            proxy.status(400)(handler, question, answer)
        else:
            is_missed.set()
            proxy.status(503)(handler, question, answer)  # asked again after eleven days

    raised: list[Exception] = []

    def score(reward: RemoteReward) -> None:
        try:
            reward.score(images=flat([0.1, 0.2]))
        except Exception as error:
            raised.append(error)

    with proxy.Proxy(server.url, spoil, spoil) as between:
        reward = RemoteReward(url=between.url, reward="bright", backoff_s=1e6, total_s=1e9,
                              images_per_request=1)  # fmt: skip
        scoring = threading.Thread(target=score, args=(reward,), daemon=True)
        scoring.start()
        scoring.join(PATIENT_S)
    assert not scoring.is_alive()
    assert [type(error) for error in raised] == [RemoteRefused]


# --------------------------------------------------------------------------- refusals


def test_what_cannot_be_asked_is_refused_here_with_the_reason(server: Running) -> None:
    with pytest.raises(ValueError, match="'brigth' is not served there; served: bright, judge"):
        rewards.load("remote", url=server.url, reward="brigth")
    with pytest.raises(RemoteRefused, match="'judge' is a judge; use 'remote_judge' for it"):
        rewards.load("remote", url=server.url, reward="judge")
    with pytest.raises(RemoteRefused, match="'bright' is a reward; use 'remote' for it"):
        assert RemoteJudge(url=server.url, reward="bright").inputs
    reward = RemoteReward(url=server.url, reward="shapes")
    with pytest.raises(ValueError, match="'shapes' reads metadata, which is missing"):
        reward.score(images=flat([0.5], 64))
    with pytest.raises(ValueError, match=r"as many of each, got {'images': 1, 'metadata': 2}"):
        reward.score(images=flat([0.5], 64), metadata=[{}, {}])
    large = RemoteReward(url=server.url, reward="bright")
    with pytest.raises(ValueError, match="takes 2000000; lower images_per_request, use encoding="):
        large.score(images=flat([0.5], 500))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"url": []}, "expected one URL or more"),
        ({"url": ["http://a", "http://a/"]}, "each once"),
        ({"url": "127.0.0.1:8700"}, "expected URLs such as 'http://127.0.0.1:8700', got"),
        ({"url": "http://a", "encoding": "jpeg"}, "one of tensor, png, got 'jpeg'"),
        ({"url": "http://a", "images_per_request": 0}, "images_per_request must be at least 1"),
        ({"url": "http://a", "parallel": 0}, "parallel must be at least 1"),
        ({"url": "http://a", "timeout_s": 0.0}, "must be positive"),
        ({"url": "http://a", "retries": -1}, "retries at least 0"),
        ({"url": "http://a", "token_env": "FLOWRL_NO_SUCH"}, "token_env='FLOWRL_NO_SUCH'"),
        ({"url": "http://a", "tokn_env": "X"}, "did you mean 'token_env'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rewards.load("remote", reward="bright", **args)
