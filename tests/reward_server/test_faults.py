"""What goes wrong between a run and its reward server, injected, and what must happen then.

`FAULTS` is the server's table in docs/faults.md: each row is injected for real, on sockets and
processes, by the function in its last column, which also asserts what the row promises. Kills,
among others: a retry without a bound; a retry that scores twice; a wrong answer taken for the right
one; a 4xx that is retried; a failure that turns into a score of 0.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.train.attempts import Patience
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt, PromptBatch, Scores
from rewards.serving import balance
from rewards.serving.balance import RemoteError, RemoteFailed, RemoteRefused
from rewards.serving.calls import Served, declare
from rewards.serving.client import RemoteReward
from rewards.serving.worker import start_worker
from rewards.simple import Brightness
from tests.fault_table import Fault
from tests.reward_server import proxy
from tests.reward_server.kit import (
    PATIENT_S,
    Recorded,
    Running,
    flat,
    served,
    serving,
    wait_until,
)

FRAGILE = Path(__file__).with_name("fragile.py")
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def remote(*urls: str, **args: Any) -> RemoteReward:
    """A client that does not wait long between tries."""
    fields = {"url": list(urls), "reward": "bright", "retries": 4, "backoff_s": 0.001}
    return RemoteReward(**(fields | args))


def assert_same(scores: Tensor) -> None:
    assert scores.equal(Brightness().score(images=IMAGES))


def trained_on(reward: Any, images: Tensor = IMAGES) -> Scores:
    """What a run makes of its answers."""
    number = torch.arange(len(images))
    batch = PromptBatch((Prompt("p"),) * len(images), *[number] * 4, seed=0)
    return RewardSet([("r", reward, 1.0)], patience=Patience(retries=0)).score(batch, images=images)


def assert_lost(scores: Scores, *lost: int, images: Tensor = IMAGES) -> None:
    """Exactly these samples are masked; the others have their own scores."""
    is_lost = torch.isin(torch.arange(len(images)), torch.tensor(lost))
    assert scores.valid.tolist() == (~is_lost).tolist()
    assert scores.rewards["r"][is_lost].isnan().all()
    assert scores.rewards["r"][~is_lost].equal(Brightness().score(images=images)[~is_lost])


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --------------------------------------------------------------------------- injections


def is_asked_again(spoil: proxy.Spoil, *, times: int = 2, **args: Any) -> None:
    """The answer is spoilt `times` in a row; the scores are right, and were made once."""
    reward = Recorded()
    with (
        serving(served("bright", reward), max_wait_s=0.0) as server,
        proxy.Proxy(server.url, *[spoil] * times) as between,
    ):
        assert_same(remote(between.url, **args).score(images=IMAGES))
        assert between.num_asked == times + 1
        assert reward.calls == [5]  # the id was the same, so the server remembered


def gives_up(spoil: proxy.Spoil, reason: str) -> None:
    """Spoilt for good: an error with server, tries and reason, after as many tries as allowed."""
    with (
        serving(served("bright", Recorded()), max_wait_s=0.0) as server,
        proxy.Proxy(server.url, *[spoil] * 99) as between,
    ):
        with pytest.raises((RemoteError, RemoteFailed)) as caught:
            remote(between.url, retries=2).score(images=IMAGES)
        assert between.num_asked == 3
        text = str(caught.value)
        assert text.startswith(f"{between.url}: reward 'bright': no sound answer after 3 tries in")
        assert reason in text
        assert_lost(trained_on(remote(between.url, retries=2)), 0, 1, 2, 3, 4)


def is_refused(spoil: proxy.Spoil, reason: str) -> None:
    """Asking again would not help: an error at the first try."""
    with (
        serving(served("bright", Recorded()), max_wait_s=0.0) as server,
        proxy.Proxy(server.url, *[spoil] * 99) as between,
    ):
        with pytest.raises(RemoteRefused, match=reason):
            remote(between.url).score(images=IMAGES)
        assert between.num_asked == 1
        assert_lost(trained_on(remote(between.url)), 0, 1, 2, 3, 4)


def nobody_listens() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(RemoteError, match=rf"{url}: .* after 5 tries .*ConnectError"):
        remote(url).score(images=IMAGES)
    with pytest.raises(RemoteError):
        RewardSet([("r", remote(url), 1.0)])  # a run does not begin


def one_of_two_is_dead() -> None:
    dead = f"http://127.0.0.1:{unused_port()}"
    with serving(served("bright", Recorded()), max_wait_s=0.0) as server:
        for order in ([dead, server.url], [server.url, dead]):
            client = remote(*order, images_per_request=1)
            for _ in range(3):
                assert_same(client.score(images=IMAGES))


def one_of_two_dies() -> None:
    dying = serving(served("bright", Recorded()), max_wait_s=0.0)
    with serving(served("bright", Recorded()), max_wait_s=0.0) as server:
        client = remote(dying.url, server.url, images_per_request=1)
        assert_same(client.score(images=IMAGES))
        dying.stop()
        for _ in range(3):
            assert_same(client.score(images=IMAGES))


def dies_and_comes_back() -> None:
    first = serving(served("bright", Recorded()), max_wait_s=0.0)
    client = remote(first.url, retries=1000)
    assert_same(client.score(images=IMAGES))
    first.stop()
    with ThreadPoolExecutor(1) as pool, misses() as said:
        waiting = pool.submit(client.score, images=IMAGES)
        wait_until(lambda: len(said) >= 3)
        assert said[0].startswith(f"{first.url}: reward 'bright': ConnectError")
        with serving(served("bright", Recorded()), port=first.port, max_wait_s=0.0):
            assert_same(waiting.result(PATIENT_S))


class misses(logging.Handler):
    """What clients say of failed tries while the block runs."""

    def __enter__(self) -> list[str]:
        self._said: list[str] = []
        logging.getLogger(balance.__name__).addHandler(self)
        return self._said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())

    def __exit__(self, *error: object) -> None:
        logging.getLogger(balance.__name__).removeHandler(self)


def is_poisoned() -> None:
    """One sample makes the reward raise; the requests beside it get their scores."""
    images = torch.cat([IMAGES, flat([1.0])])
    with serving(served("bright", Recorded())) as server:
        client = remote(server.url, retries=1)
        with pytest.raises(
            RemoteFailed, match="status 500: reward 'bright' raised RuntimeError: po"
        ):
            client.score(images=images)
        assert_same(client.score(images=IMAGES))
        assert_lost(trained_on(client, images), 5, images=images)


def does_not_fit() -> None:
    class Small(Recorded):
        def score(self, **inputs: Any) -> Tensor:
            if len(inputs["images"]) > 2:
                raise torch.OutOfMemoryError("tried to allocate 80 GiB")
            return super().score(**inputs)

    with serving(served("bright", Small())) as server:
        client = remote(server.url, retries=0)
        with pytest.raises(RemoteFailed, match="raised OutOfMemoryError: tried to allocate"):
            client.score(images=IMAGES)
        assert_lost(trained_on(client))


def cannot_score() -> None:
    """NaN is an answer, not a fault."""
    images = IMAGES.clone()
    images[2] = torch.nan
    reward = Recorded()
    with serving(served("bright", reward), max_wait_s=0.0) as server:
        for encoding in ("tensor", "png"):
            scores = remote(server.url, encoding=encoding).score(images=images)
            assert scores.isnan().tolist() == [False, False, True, False, False]
    assert reward.calls == [5, 5]


def with_worker(check: Callable[[Any, Running], None]) -> None:
    worker = start_worker(f"{FRAGILE}:Fragile", {})
    try:
        declared = declare("bright", worker, "f")
        with serving(Served("bright", worker, declared), max_wait_s=0.0) as server:
            check(worker, server)
    finally:
        worker.close()


def worker_is_killed() -> None:
    def check(worker: Any, server: Running) -> None:
        client = remote(server.url, retries=0)  # the server repairs it: the client sees nothing
        assert_same(client.score(images=IMAGES))
        os.kill(worker.pid, signal.SIGKILL)
        assert_same(client.score(images=IMAGES))
        assert worker.num_restarts == 1

    with_worker(check)


def worker_dies_of_a_sample() -> None:
    def check(worker: Any, server: Running) -> None:
        client = remote(server.url, retries=0)
        with pytest.raises(RemoteFailed, match=r"died twice on this request \(exit code 9\)"):
            client.score(images=flat([1.0]))
        assert_same(client.score(images=IMAGES))

    with_worker(check)


def worker_hangs() -> None:
    def check(worker: Any, server: Running) -> None:
        client = remote(server.url, retries=0)
        assert_same(client.score(images=IMAGES))
        worker._process._link.settimeout(1.0)  # the first call had its time to import torch
        with pytest.raises(RemoteFailed, match="did not answer within"):
            client.score(images=flat([0.0]))
        assert_same(client.score(images=IMAGES))
        assert worker.num_restarts == 1

    with_worker(check)


def token_is_missing() -> None:
    with serving(served("bright", Recorded()), token="s3cret") as server:
        with pytest.raises(
            RemoteRefused, match=r"status 401: .*token_env must name an environment"
        ):
            remote(server.url).score(images=IMAGES)
        with pytest.raises(RemoteRefused):
            RewardSet([("r", remote(server.url), 1.0)])  # a run does not begin
        os.environ["FLOWRL_TEST_TOKEN"] = "s3cret"
        try:
            assert_same(remote(server.url, token_env="FLOWRL_TEST_TOKEN").score(images=IMAGES))
        finally:
            del os.environ["FLOWRL_TEST_TOKEN"]
        with pytest.raises(ValueError, match="no such environment variable, or it is empty"):
            remote(server.url, token_env="FLOWRL_TEST_TOKEN")


AGAIN = "asked again under the same id: the same scores, made once"
GIVES_UP = "after the allowed tries an error with the server, the tries and the last reason"
NONE, CALL = "no sample", "all of the call: none could be scored"
NOT_BEGUN = "no sample: a run does not begin"
SPOILT: tuple[tuple[str, str, proxy.Spoil], ...] = (
    ("HTTP 500", "two answers replaced by a 500", proxy.status(500)),
    ("HTTP 503", "two answers replaced by a 503", proxy.status(503)),
    ("too many requests", "two answers replaced by a 429", proxy.status(429)),
    ("lost answer", "the connection is reset after the server has scored", proxy.dropped),
    ("half a response", "reset after half of the stated bytes", proxy.half_sent),
    ("cut body", "the last two bytes are missing, and stated so", proxy.cut_off),
    ("foreign answer", "200 with the HTML page of somebody else", proxy.not_an_answer),
    ("wrong order", "sample ids and scores reversed", proxy.reordered),
    ("wrong length", "the last sample is left out", proxy.too_short),
    ("too few scores", "all ids, one score less", proxy.too_few_scores),
    ("wrong component", "a component with one value less", proxy.too_few_of_a_component),
    ("another request's answer", "sound, under another request id", proxy.another_request),
    ("wrong dtype", "scores as float64", proxy.doubles),
)
FAULTS = (
    *(Fault(name, injected, AGAIN, NONE, partial(is_asked_again, spoil))
      for name, injected, spoil in SPOILT),
    Fault("slow server", "two answers never come", "asked again when the time of a try is up", NONE,
          partial(is_asked_again, proxy.silent, timeout_s=3.0)),
    Fault("HTTP 500 for good", "every answer is a 500", GIVES_UP, CALL,
          partial(gives_up, proxy.status(500), "status 500: injected")),
    Fault("wrong order for good", "every answer is reversed", GIVES_UP, CALL,
          partial(gives_up, proxy.reordered, "sample_ids must be those of the request")),
    Fault("bad request", "a 400", "an error at the first try", CALL,
          partial(is_refused, proxy.status(400), "status 400: injected")),
    Fault("redirect", "a 302", "an error at the first try; nothing is sent elsewhere", CALL,
          partial(is_refused, proxy.status(302), "status 302")),
    Fault("another reward", "the answer has the fingerprint of other arguments",
          "an error at the first try: the run would mix two rewards", CALL,
          partial(is_refused, proxy.another_reward, "give all servers the same config")),
    Fault("dead server", "nobody listens on the port", GIVES_UP, NOT_BEGUN, nobody_listens),
    Fault("one of two servers dead", "nobody listens on one of two ports",
          "the other one scores everything", NONE, one_of_two_is_dead),
    Fault("one of two servers dies", "one of two is stopped between two batches",
          "the other one scores everything", NONE, one_of_two_dies),
    Fault("server dies and comes back", "stopped, missed three times, started on the same port",
          "the batch that was under way gets its scores", NONE, dies_and_comes_back),
    Fault("poisoned sample", "the reward raises at one image",
          "an error with the reward's own words; the run asks in halves", "that sample",
          is_poisoned),
    Fault("server out of memory", "the reward does not fit with more than two samples",
          "an error with the reward's own words; the run asks in halves", NONE, does_not_fit),
    Fault("sample that cannot be scored", "an image of NaN", "NaN for it, scores for the others",
          "that sample", cannot_score),
    Fault("killed process", "SIGKILL to a reward's own process between two requests",
          "started anew; the request is answered at the first try", NONE, worker_is_killed),
    Fault("process dies of a sample", "the reward calls _exit at one image, alone in its request",
          "an error with its exit code after two deaths; then it scores again", "that sample",
          worker_dies_of_a_sample),
    Fault("process hangs", "the reward never returns for one image, alone in its request",
          "ended at its time limit, an error for its request; then it scores again", "that sample",
          worker_hangs),
    Fault("token missing", "a server with a token, a client without",
          "an error at the first try that names token_env", NOT_BEGUN, token_is_missing),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_goes_wrong_costs_no_sample_or_stops_with_a_reason(fault: Fault) -> None:
    fault.check()
