"""What goes wrong between a run and its reward server, injected, and what must happen then.

`FAULTS` is the table: each row is injected for real, on sockets and processes, by the function in
its last column, which also asserts what the row promises. `python -m
tests.reward_server.test_faults` prints it for the documentation. Kills, among others: a retry
without a bound; a retry that scores twice; a wrong answer taken for the right one; a 4xx that is
retried; a failure that turns into a score of 0.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards.serving import balance
from rewards.serving.balance import RemoteError, RemoteFailed, RemoteRefused
from rewards.serving.calls import Served, declare
from rewards.serving.client import RemoteReward
from rewards.serving.worker import start_worker
from rewards.simple import Brightness
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


def is_refused(spoil: proxy.Spoil, reason: str) -> None:
    """Asking again would not help: an error at the first try."""
    with (
        serving(served("bright", Recorded()), max_wait_s=0.0) as server,
        proxy.Proxy(server.url, *[spoil] * 99) as between,
    ):
        with pytest.raises(RemoteRefused, match=reason):
            remote(between.url).score(images=IMAGES)
        assert between.num_asked == 1


def nobody_listens() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(RemoteError, match=rf"{url}: .* after 5 tries .*ConnectError"):
        remote(url).score(images=IMAGES)


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
        os.environ["FLOWRL_TEST_TOKEN"] = "s3cret"
        try:
            assert_same(remote(server.url, token_env="FLOWRL_TEST_TOKEN").score(images=IMAGES))
        finally:
            del os.environ["FLOWRL_TEST_TOKEN"]
        with pytest.raises(ValueError, match="no such environment variable, or it is empty"):
            remote(server.url, token_env="FLOWRL_TEST_TOKEN")


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: of the fault.
        injected: how it is brought about.
        expected: what must happen.
        check: brings it about and asserts that.
    """

    name: str
    injected: str
    expected: str
    check: Callable[[], None]


AGAIN = "asked again under the same id: the same scores, made once"
GIVES_UP = "after the allowed tries an error with the server, the tries and the last reason"
FAULTS = (
    Fault("HTTP 500", "two answers replaced by a 500", AGAIN,
          partial(is_asked_again, proxy.status(500))),
    Fault("HTTP 503", "two answers replaced by a 503", AGAIN,
          partial(is_asked_again, proxy.status(503))),
    Fault("too many requests", "two answers replaced by a 429", AGAIN,
          partial(is_asked_again, proxy.status(429))),
    Fault("lost answer", "the connection is reset after the server has scored", AGAIN,
          partial(is_asked_again, proxy.dropped)),
    Fault("half a response", "reset after half of the stated bytes", AGAIN,
          partial(is_asked_again, proxy.half_sent)),
    Fault("cut body", "the last two bytes are missing, and stated so", AGAIN,
          partial(is_asked_again, proxy.cut_off)),
    Fault("foreign answer", "200 with the HTML page of somebody else", AGAIN,
          partial(is_asked_again, proxy.not_an_answer)),
    Fault("wrong order", "sample ids and scores reversed", AGAIN,
          partial(is_asked_again, proxy.reordered)),
    Fault("wrong length", "the last sample is left out", AGAIN,
          partial(is_asked_again, proxy.too_short)),
    Fault("too few scores", "all ids, one score less", AGAIN,
          partial(is_asked_again, proxy.too_few_scores)),
    Fault("another request's answer", "sound, under another request id", AGAIN,
          partial(is_asked_again, proxy.another_request)),
    Fault("wrong dtype", "scores as float64", AGAIN, partial(is_asked_again, proxy.doubles)),
    Fault("slow server", "two answers never come", "asked again when the time of a try is up",
          partial(is_asked_again, proxy.silent, timeout_s=3.0)),
    Fault("HTTP 500 for good", "every answer is a 500", GIVES_UP,
          partial(gives_up, proxy.status(500), "status 500: injected")),
    Fault("wrong order for good", "every answer is reversed", GIVES_UP,
          partial(gives_up, proxy.reordered, "sample_ids must be those of the request")),
    Fault("bad request", "a 400", "an error at the first try",
          partial(is_refused, proxy.status(400), "status 400: injected")),
    Fault("redirect", "a 302", "an error at the first try; nothing is sent elsewhere",
          partial(is_refused, proxy.status(302), "status 302")),
    Fault("another reward", "the answer has the fingerprint of other arguments",
          "an error at the first try: the run would mix two rewards",
          partial(is_refused, proxy.another_reward, "give all servers the same config")),
    Fault("dead server", "nobody listens on the port", GIVES_UP, nobody_listens),
    Fault("one of two servers dead", "nobody listens on one of two ports",
          "the other one scores everything", one_of_two_is_dead),
    Fault("one of two servers dies", "one of two is stopped between two batches",
          "the other one scores everything", one_of_two_dies),
    Fault("server dies and comes back", "stopped, missed three times, started on the same port",
          "the batch that was under way gets its scores", dies_and_comes_back),
    Fault("poisoned sample", "the reward raises at one image",
          "an error with the reward's own words; the server scores what comes after", is_poisoned),
    Fault("sample that cannot be scored", "an image of NaN", "NaN for it, scores for the others",
          cannot_score),
    Fault("killed process", "SIGKILL to a reward's own process between two requests",
          "started anew; the request is answered at the first try", worker_is_killed),
    Fault("process dies of a sample", "the reward calls _exit at one image",
          "an error with its exit code after two deaths; then it scores again",
          worker_dies_of_a_sample),
    Fault("process hangs", "the reward never returns",
          "ended at its time limit, an error for its request; then it scores again", worker_hangs),
    Fault("token missing", "a server with a token, a client without",
          "an error at the first try that names token_env", token_is_missing),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_goes_wrong_costs_no_sample_or_stops_with_a_reason(fault: Fault) -> None:
    fault.check()


def markdown() -> str:
    """The table, for the documentation."""
    rows = [f"| {each.name} | {each.injected} | {each.expected} |" for each in FAULTS]
    return "\n".join(
        ["| fault | how it is injected | what happens |", "| --- | --- | --- |", *rows]
    )


def test_the_table_in_the_documentation_is_this_one() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "reward_server.md"
    assert page.read_text().endswith(f"\n{markdown()}\n"), "print it anew with this module"


if __name__ == "__main__":
    print(markdown())
