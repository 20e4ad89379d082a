"""The reward server on a real port: what it answers, what it refuses, and that it stays up.

Kills, among others: a body read to its end although it is too large; a token compared by its start;
a 4xx without a reason; a repeated id that is scored again; a poisoned sample that fails those who
waited beside it; a server that one bad request takes down.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

import rewards
from rewards.serving.server import create_app
from rewards.serving.wire import (
    MEDIA_TYPE,
    Request,
    decode_answer,
    encode_answer,
    encode_request,
)
from rewards.simple import Brightness
from tests.reward_server.kit import (
    PATIENT_S,
    Brighter,
    Reader,
    Recorded,
    Running,
    ask,
    flat,
    http,
    served,
    serving,
    wait_until,
)

OF_WIRE = {"Content-Type": MEDIA_TYPE}
MAX_BODY = 20_000


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Three rewards; what is asked of it must not depend on what was asked before."""
    everything = [
        served("bright", Recorded()), served("same", Reader()), served("brighter", Brighter())
    ]  # fmt: skip
    with serving(*everything, max_body=MAX_BODY, max_wait_s=0.0, version="1.2") as running:
        yield running


def post(running: Running, body: bytes, path: str = "/v1/score", **headers: str) -> httpx.Response:
    return http.post(running.url + path, content=body, headers=OF_WIRE | headers)


def post_raw(running: Running, *parts: bytes) -> bytes:
    """What comes back for raw bytes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENT_S) as link:
        for part in parts:
            link.sendall(part)
        received = b""
        while part := link.recv(65536):
            received += part
        return received


def assert_serves(running: Running) -> None:
    """It is up, and scores."""
    assert http.get(running.url + "/health").json() == {"status": "ok"}
    request = ask([0.25], request_id=f"up{random.getrandbits(64)}")
    scores = decode_answer(post(running, encode_request(request)).content, request).scores
    assert scores.tolist() == [0.25]


def test_a_score_over_the_wire_is_the_score_bit_by_bit_and_nan_stays_nan(server: Running) -> None:
    images = torch.rand(7, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    images[3, 0, 0, 0] = torch.nan
    request = ask([0] * 7, "bits", images={"images": images})
    answer = post(server, encode_request(request))
    assert answer.status_code == 200 and answer.headers["content-type"] == MEDIA_TYPE
    scores = decode_answer(answer.content, request).scores
    expected = Brightness().score(images=images)
    assert scores.isnan().tolist() == [index == 3 for index in range(7)]
    assert scores.nan_to_num(-1).equal(expected.nan_to_num(-1))


def test_equal_prompts_are_samples_of_their_own(server: Running) -> None:
    texts = ("a cat", "a cat", "a dog", "a cat")
    request = Request("same", "dup", tuple("abcd"), prompts=texts, metadata=({},) * 4)
    scores = decode_answer(post(server, encode_request(request)).content, request).scores
    assert scores.tolist() == [0.75, 0.75, 0.25, 0.75]


def test_pairs_are_compared(server: Running) -> None:
    images = {"first": flat([0.1, 0.5, 0.9]), "second": flat([0.5, 0.5, 0.5])}
    request = ask([0] * 3, "pairs", reward="brighter", images=images, prompts=("p",) * 3)
    answer = post(server, encode_request(request), "/v1/compare")
    assert decode_answer(answer.content, request).scores.tolist() == [0.0, 0.5, 1.0]


def test_it_tells_what_it_serves_and_how(server: Running) -> None:
    told = http.get(server.url + "/v1/rewards").json()["rewards"]
    assert told["bright"] == {
        "kind": "reward", "inputs": ["images"], "scope": "sample", "range": [0.0, 1.0],
        "higher_is_better": True, "fingerprint": "f",
    }  # fmt: skip
    assert told["same"]["scope"] == "group" and told["same"]["inputs"] == ["prompts", "metadata"]
    assert told["brighter"]["kind"] == "judge"
    version = http.get(server.url + "/version").json()
    assert version == {"version": "1.2", "wire": 1, "max_body": MAX_BODY, "max_samples": 4096}


# --------------------------------------------------------------------------- refusals


def without_images() -> bytes:
    return encode_request(ask([0], images={}, prompts=("p",)))


REFUSALS: list[tuple[str, Callable[[Running], httpx.Response], int, str]] = [
    ("no bytes", lambda s: post(s, b""), 400, "not safetensors"),
    ("another format", lambda s: post(s, b'{"images": []}'), 400, "not safetensors"),
    (
        "another content type",
        lambda s: post(s, encode_request(ask([0])), **{"Content-Type": "application/json"}),
        415,
        f"expected the content type {MEDIA_TYPE}, got 'application/json'",
    ),
    (
        "an unknown reward",
        lambda s: post(s, encode_request(ask([0], reward="brigth"))),
        404,
        "'brigth' is not served here; did you mean 'bright'? served: bright, same, brighter",
    ),
    (
        "a judge asked to score",
        lambda s: post(s, encode_request(ask([0], reward="brighter"))),
        400,
        "'brighter' is a judge; post to /v1/compare",
    ),
    (
        "a reward asked to compare",
        lambda s: post(s, encode_request(ask([0])), "/v1/compare"),
        400,
        "'bright' is a reward; post to /v1/score",
    ),
    ("inputs that are missing", lambda s: post(s, without_images()), 400, "reads images; got prom"),
    (
        "inputs that are not read",
        lambda s: post(s, encode_request(ask([0], prompts=("p",)))),
        400,
        "reads images; got images, prompts",
    ),
    ("too large", lambda s: post(s, b"x" * (MAX_BODY + 1)), 413, f"exceeds {MAX_BODY} bytes"),
    ("another method", lambda s: http.get(s.url + "/v1/score"), 405, "Method Not Allowed"),
    ("another path", lambda s: post(s, b"", "/v1/scores"), 404, "Not Found"),
]


@pytest.mark.parametrize(
    ("send", "status", "reason"),
    [row[1:] for row in REFUSALS],
    ids=[row[0] for row in REFUSALS],
)
def test_a_refusal_says_why_and_the_server_goes_on(
    server: Running, send: Callable[[Running], httpx.Response], status: int, reason: str
) -> None:
    answer = send(server)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert reason in answer.json()["error"]
    assert_serves(server)


HEAD = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: "
HEAD += MEDIA_TYPE.encode() + b"\r\n"


def test_a_body_that_states_its_size_is_refused_before_it_is_sent(server: Running) -> None:
    stated = b"Content-Length: 999999999999999\r\n\r\n"
    assert post_raw(server, HEAD, stated).startswith(b"HTTP/1.1 413 ")
    assert_serves(server)


def test_a_body_in_chunks_is_refused_as_soon_as_it_is_too_large(server: Running) -> None:
    chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"  # the last chunk, which would end it, never comes
    parts = [b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * (MAX_BODY // 1000 + 1)]
    assert post_raw(server, HEAD, *parts).startswith(b"HTTP/1.1 413 ")
    assert_serves(server)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\xfe\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(server: Running, garbage: bytes) -> None:
    try:
        answer = post_raw(server, garbage)
    except ConnectionError:  # closed while there was more to send
        answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    assert_serves(server)


def test_a_client_that_goes_away_in_the_middle_harms_nobody(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as link:
        link.sendall(HEAD + b"Content-Length: 1000\r\n\r\nhalf")
    assert_serves(server)


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    with serving(served("bright", Recorded()), body_timeout_s=0.05) as running:
        answer = post_raw(running, HEAD, b"Content-Length: 1000\r\n\r\nhalf")
        assert answer.startswith(b"HTTP/1.1 408 ") and b"took more than 0.05 s" in answer


# --------------------------------------------------------------------------- the token


def test_every_path_but_health_asks_for_the_token() -> None:
    body = encode_request(ask([0.5]))
    with serving(served("bright", Recorded()), token="s3cret") as running:
        paths = ["/v1/rewards", "/version", "/metrics", "/openapi.json", "/nowhere"]
        assert http.get(running.url + "/health").status_code == 200
        wrong = [
            "",
            "s3cret",
            "Bearer",
            "Bearer s3cre",
            "Bearer s3crett",
            "Basic s3cret",
            "Bearer é",
        ]
        for given in wrong:
            headers = {"Authorization": given.encode()} if given else {}
            for path in paths:
                assert http.get(running.url + path, headers=headers).status_code == 401, given
            refused = post(running, body, **headers)  # type: ignore[arg-type]
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert "Authorization: Bearer TOKEN" in refused.json()["error"]
        for given in ("Bearer s3cret", "bearer s3cret"):
            assert post(running, body, Authorization=given).status_code == 200
        twice = [("Authorization", "Bearer s3cret")] * 2
        assert http.get(running.url + "/version", headers=twice).status_code == 401


# --------------------------------------------------------------------------- many requests


def ask_at_once(running: Running, requests: list[Request]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda each: post(running, encode_request(each)), requests))


def waiting(running: Running) -> int:
    text = http.get(running.url + "/metrics").text
    [line] = [each for each in text.splitlines() if each.startswith("flowrl_reward_waiting{")]
    return int(line.split()[-1])


def test_requests_that_arrive_meanwhile_are_scored_together_and_poison_stays_alone() -> None:
    reward = Recorded()
    reward.go.clear()
    shuffled = random.Random(0)
    levels = [[shuffled.random() for _ in range(shuffled.randint(1, 3))] for _ in range(10)]
    requests = [ask(each, f"q{index}") for index, each in enumerate(levels)]
    requests[4] = ask([0.5, 1.0], "poisoned")
    order = list(range(10))
    shuffled.shuffle(order)
    with serving(served("bright", reward), max_batch=64, max_wait_s=0.0) as running:
        first = threading.Thread(target=post, args=(running, encode_request(ask([0.5], "first"))))
        first.start()
        assert reward.entered.wait(PATIENT_S)

        def open_when_all_wait() -> None:
            wait_until(lambda: waiting(running) == 10)
            reward.go.set()

        opener = threading.Thread(target=open_when_all_wait)
        opener.start()
        answers = dict(zip(order, ask_at_once(running, [requests[i] for i in order]), strict=True))
        opener.join()
        first.join()
    for index, request in enumerate(requests):
        if index == 4:
            assert answers[index].status_code == 500
            assert answers[index].json() == {"error": "reward 'bright' raised RuntimeError: poison"}
            continue
        scores = decode_answer(answers[index].content, request).scores
        assert scores.equal(Brightness().score(images=request.images["images"]))
    num_samples = sum(map(len, requests))
    assert reward.calls[:2] == [1, num_samples] and len(reward.calls) == 2 + 10


def test_a_repeated_request_is_answered_again_and_scored_once() -> None:
    reward = Recorded()
    reward.go.clear()
    body = encode_request(ask([0.5], "same"))
    with serving(served("bright", reward), max_wait_s=0.0) as running:
        with ThreadPoolExecutor(2) as pool:
            both = [
                pool.submit(post, running, body) for _ in range(2)
            ]  # the second as it is scored
            assert reward.entered.wait(PATIENT_S)
            reward.go.set()
            answers = [each.result() for each in both]
        answers.append(post(running, body))
        assert {each.content for each in answers} == {answers[0].content}
        assert reward.calls == [1]
        other = post(running, encode_request(ask([0.6], "same")))
        assert other.status_code == 409 and "take a fresh one" in other.json()["error"]
        text = http.get(running.url + "/metrics").text
    assert 'requests_total{outcome="repeated",reward="bright"} 2' in text
    assert 'requests_total{outcome="scored",reward="bright"} 1' in text


def test_too_many_requests_are_told_to_come_back() -> None:
    reward = Recorded()
    reward.go.clear()
    with serving(served("bright", reward), max_requests=1, max_wait_s=0.0) as running:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(post, running, encode_request(ask([0.5], "a")))
            assert reward.entered.wait(PATIENT_S)
            refused = post(running, encode_request(ask([0.5], "b")))
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            reward.go.set()
            assert first.result().status_code == 200
        assert post(running, encode_request(ask([0.5], "b"))).status_code == 200


def test_metrics_count_what_happened() -> None:
    nan = float("nan")
    with serving(served('a"b\\', Recorded()), max_wait_s=0.0) as running:
        for name, levels in (("a", [0.1, nan]), ("b", [nan]), ("c", [1.0])):
            post(running, encode_request(ask(levels, name, reward='a"b\\')))
        post(running, b"")
        answer = http.get(running.url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    rows = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    label = r'reward="a\"b\\"'
    assert rows[f'flowrl_reward_requests_total{{outcome="scored",{label}}}'] == "2"
    assert rows[f'flowrl_reward_requests_total{{outcome="failed",{label}}}'] == "1"
    assert rows[f"flowrl_reward_samples_total{{{label}}}"] == "3"
    assert rows[f"flowrl_reward_nan_total{{{label}}}"] == "2"
    assert rows[f"flowrl_reward_calls_total{{{label}}}"] == "3"
    assert rows[f"flowrl_reward_call_samples_total{{{label}}}"] == "4"
    assert rows[f"flowrl_reward_waiting{{{label}}}"] == "0"
    assert rows['flowrl_reward_refused_total{status="400"}'] == "1"
    types = {
        line.split()[2]: line.split()[3] for line in answer.text.splitlines() if "# TYPE" in line
    }
    assert types["flowrl_reward_requests_total"] == "counter"
    assert types["flowrl_reward_waiting"] == "gauge"


def test_an_app_without_rewards_or_with_two_of_a_name_is_refused() -> None:
    bright = served("bright", Recorded())
    for given in ([], [bright, bright]):
        with pytest.raises(ValueError, match="names of their own"):
            create_app(given)


def test_what_is_not_a_reward_is_refused_when_it_is_declared() -> None:
    odd: Any = Recorded()
    odd.scope = "batch"
    with pytest.raises(ValueError, match=r"scope 'batch'.*'sample' or 'group'"):
        served("odd", odd)
    with pytest.raises(ValueError, match="'odd' is not a reward: it lacks inputs"):
        served("odd", object())
    size = rewards.load("jpeg_compressibility")
    assert served("size", size).declaration.to_json()["range"] == [None, 0.0]


def test_answers_are_only_for_their_request() -> None:
    request = ask([0.5])
    other = Request("bright", "r2", request.sample_ids, request.images)
    with serving(served("bright", Recorded())) as running:
        answer = decode_answer(post(running, encode_request(request)).content, request)
    with pytest.raises(ValueError, match="request_id must be that of the request"):
        decode_answer(encode_answer(answer), other)
