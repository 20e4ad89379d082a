"""The server's HTTP surface, fuzzed through its own OpenAPI schema.

Every operation that the schema lists, and methods and paths that it does not, are sent queries,
headers and bodies of all kinds; each must be answered by a status that the schema states and, if
refused, by a reason; never by a 5xx. Kills, among others: an undocumented status; an error that is
no JSON; a header or query that leads to a traceback; a server that is down afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rewards.serving.server import create_app
from rewards.serving.wire import MEDIA_TYPE, decode_answer, encode_request
from tests.reward_server.kit import (
    PATIENT_S,
    Brighter,
    Recorded,
    Running,
    ask,
    served,
    serving,
)

REWARDS = (served("bright", Recorded()), served("brighter", Brighter()))
SCHEMA: dict[str, Any] = create_app(REWARDS).openapi()
OPERATIONS = [
    (method.upper(), path, set(operation["responses"]), operation.get("requestBody"))
    for path, methods in SCHEMA["paths"].items()
    for method, operation in methods.items()
]
VALID = encode_request(ask([0.1, 0.2]))

texts = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20)
headers = st.dictionaries(
    st.sampled_from(["Authorization", "Accept", "Accept-Encoding", "X-Any", "Cookie", "Origin"]),
    texts.map(str.strip),
)
media_types = st.sampled_from([MEDIA_TYPE, f"{MEDIA_TYPE} ; q=1", "application/json", "", "a/b"])
bodies = st.one_of(
    st.binary(max_size=200),
    st.integers(0, len(VALID)).map(lambda end: VALID[:end]),
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(1, 255)).map(
        lambda flip: VALID[: flip[0]] + bytes([VALID[flip[0]] ^ flip[1]]) + VALID[flip[0] + 1 :]
    ),
)
queries = st.dictionaries(texts, texts, max_size=2)
slow = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(*REWARDS, max_body=20_000, max_wait_s=0.0) as running:
        yield from connected(running)


def connected(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=PATIENT_S) as client:
        yield client
        # After everything: it is up, and scores.
        assert client.get("/health").json() == {"status": "ok"}
        request = ask([0.5], "last")
        answer = client.post(
            "/v1/score", content=encode_request(request), headers={"Content-Type": MEDIA_TYPE}
        )
        assert decode_answer(answer.content, request).scores.tolist() == [0.5]


def assert_answered(answer: httpx.Response, stated: set[str]) -> None:
    assert answer.status_code < 500, answer.text
    assert str(answer.status_code) in stated, (answer.status_code, answer.text)
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert isinstance(answer.json()["error"], str) and answer.json()["error"]


def test_the_schema_lists_all_operations() -> None:
    assert {(method, path) for method, path, _, _ in OPERATIONS} == {
        ("POST", "/v1/score"), ("POST", "/v1/compare"), ("GET", "/health"), ("GET", "/version"),
        ("GET", "/v1/rewards"), ("GET", "/metrics"),
    }  # fmt: skip
    for method, _, _, body in OPERATIONS:
        assert (method == "POST") == (body is not None and MEDIA_TYPE in body["content"])


@slow
@given(st.sampled_from(OPERATIONS), queries, headers, media_types, bodies)
@example(OPERATIONS[0], {}, {}, MEDIA_TYPE, VALID)
def test_every_operation_answers_anything_as_its_schema_states(
    client: httpx.Client,
    operation: tuple[str, str, set[str], Any],
    query: dict[str, str],
    extra: dict[str, str],
    media_type: str,
    body: bytes,
) -> None:
    method, path, stated, _ = operation
    sent = extra | {"Content-Type": media_type}
    answer = client.request(method, path, params=query, headers=sent, content=body)
    assert_answered(answer, stated)
    if body == VALID and media_type == MEDIA_TYPE and path == "/v1/score":
        assert answer.status_code == 200


@slow
@given(
    st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]),
    st.sampled_from(sorted(SCHEMA["paths"])) | st.text(max_size=12).map(lambda t: f"/{quote(t)}"),
    bodies,
)
def test_other_methods_and_paths_are_refused(
    client: httpx.Client, method: str, path: str, body: bytes
) -> None:
    known = [stated for each, where, stated, _ in OPERATIONS if (each, where) == (method, path)]
    is_schema = method in ("GET", "HEAD") and path == "/openapi.json"
    stated = known[0] if known else {"200"} if is_schema else {"404", "405", "307"}
    answer = client.request(method, path, content=body)
    if answer.status_code != 307:
        assert_answered(answer, stated)
