"""A vision-language model behind an OpenAI-compatible endpoint: vLLM, SGLang, a provider, ...

Each question is a POST to `{base_url}/chat/completions` with the images as PNG data URLs, which
lose nothing; several are under way at once over pooled connections, and answers come back in the
questions' order. What may pass (no connection, silence, a full queue, half an answer, an answer
that is not one) is tried again after a pause that doubles; what will not pass, or does not within
the retries, is an error that names the endpoint. Reading order: `Endpoint`, `EndpointVlm.answers`,
`EndpointVlm._ask`, `EndpointVlm._post`.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from functools import cached_property
from io import BytesIO
from threading import Event
from typing import Any, TypeVar

from rewards.vlm import Answer, Question

T = TypeVar("T")

_MAY_PASS = {408, 409, 425, 429, 500, 502, 503, 504}
_TOP = 20  # the most that OpenAI's and vLLM's interfaces give of a token's alternatives
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where and how a served model is asked.

    Attributes:
        base_url: up to and without "/chat/completions", such as "http://127.0.0.1:8000/v1".
        api_key_env: name of the environment variable that holds the key; None = no key is sent.
        timeout_s: of silence, after which a try is given up.
        retries: further tries after the first.
        backoff_s: pause before the first retry; doubles, up to 30 s. What the server asks for in
            Retry-After counts instead, under the same bound.
        concurrency: requests under way at once.
        extra: more fields of the request; None takes one out, as in {"max_tokens": None,
            "max_completion_tokens": 64}.

    Raises:
        ValueError: a value that is out of its range.
    """

    base_url: str
    api_key_env: str | None = None
    timeout_s: float = 120.0
    retries: int = 4
    backoff_s: float = 0.5
    concurrency: int = 8
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"an endpoint's base_url must begin with http:// or https://, got {self.base_url!r}"
            )
        if self.timeout_s <= 0 or self.retries < 0 or self.backoff_s < 0 or self.concurrency < 1:
            raise ValueError(
                "an endpoint needs timeout_s > 0, retries >= 0, backoff_s >= 0 and concurrency >= "
                f"1, got {self.timeout_s:g}, {self.retries}, {self.backoff_s:g}, {self.concurrency}"
            )

    def pause(self, retry: int, asked: float | None) -> float:
        """Seconds before retry number `retry`, from 0; `asked`: what the server asks for."""
        usual = self.backoff_s * 2.0**retry
        return min(usual if asked is None else asked, _LONGEST_PAUSE_S)


def read_endpoint(given: Mapping[str, Any], *, reward: str) -> Endpoint:
    """The endpoint that a configuration gives.

    Raises:
        ValueError: a field that does not exist, or no base_url.
    """
    known = [each.name for each in fields(Endpoint)]
    wrong = [name for name in given if name not in known]
    if wrong or "base_url" not in given:
        raise ValueError(
            f"{reward}'s endpoint is a mapping with base_url and, if wanted, "
            f"{', '.join(known[1:])}; got {', '.join(map(str, given)) or 'nothing'}"
        )
    return Endpoint(**given)


class _MayPass(Exception):
    """A try that failed for a reason that another may not have."""

    def __init__(self, reason: str, *, is_late: bool = False, asked: float | None = None) -> None:
        super().__init__(reason)
        self.is_late, self.asked = is_late, asked


class _Stopped(Exception):
    """A request that was not answered, because another had failed for good."""


class EndpointVlm:
    """See `rewards.vlm.Vlm`.

    Args:
        model: the name it goes by there.
        endpoint: where.
        reward: who asks, for the errors.
    """

    def __init__(self, model: str, endpoint: Endpoint, *, reward: str) -> None:
        self._model, self._endpoint, self._reward = model, endpoint, reward
        self._url = endpoint.base_url.rstrip("/") + "/chat/completions"

    def answers(self, questions: Sequence[Question], *, max_tokens: int) -> list[Answer]:
        """Answers at temperature 0, as `rewards.vlm.Vlm`.

        Raises:
            TimeoutError: the endpoint was silent at the last try.
            ConnectionError: it refused, or gave no answer within the retries.
            ValueError: the key's environment variable is not set.
        """
        return self._all(questions, {"max_tokens": max_tokens}, _answer)

    def first_words(
        self, questions: Sequence[Question], words: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probabilities among the 20 likeliest first tokens, as `rewards.vlm.Vlm`.

        Raises:
            ConnectionError: as `answers`, or it gives no log-probabilities.
            TimeoutError, ValueError: as `answers`.
        """
        asked = {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}

        def read(choice: Mapping[str, Any]) -> tuple[float, ...]:
            tokens = self._first_tokens(choice)
            return tuple(sum(p for token, p in tokens if token == w.lower()) for w in words)

        return self._all(questions, asked, read)

    def _first_tokens(self, choice: Mapping[str, Any]) -> list[tuple[str, float]]:
        """The likeliest first tokens of an answer and their probabilities."""
        log_probs = choice.get("logprobs")
        if not isinstance(log_probs, Mapping) or not isinstance(log_probs.get("content"), list):
            raise self._failed(
                "it gives no log-probabilities, which mode 'yes_no' needs; use mode 'score', or a "
                "server that has them (vLLM, SGLang)"
            )
        try:
            tops = log_probs["content"][0]["top_logprobs"] if log_probs["content"] else []
            return [(top["token"].strip().lower(), math.exp(top["logprob"])) for top in tops]
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise _MayPass(f"log-probabilities that are none: {_short(log_probs)}") from error

    def _all(
        self,
        questions: Sequence[Question],
        asked: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], T],
    ) -> list[T]:
        """What `read` makes of each answer; the first failure stops the others."""
        client, stop = self._client, Event()
        with ThreadPoolExecutor(self._endpoint.concurrency) as pool:
            futures = [
                pool.submit(self._ask, client, question, asked, read, stop)
                for question in questions
            ]
            try:
                wait(futures)
            finally:
                stop.set()  # an interrupt does not wait for what is left
        for future in futures:
            error = future.exception()
            if error is not None and not isinstance(error, _Stopped):
                raise error
        return [future.result() for future in futures]

    def _ask(
        self,
        client: Any,
        question: Question,
        asked: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], T],
        stop: Event,
    ) -> T:
        """One answer, tried for as long as it may come and no other request has failed."""
        body, retry = self._body(question, asked), 0
        while not stop.is_set():
            try:
                return read(self._post(client, body))
            except _MayPass as failure:
                if retry == self._endpoint.retries:
                    stop.set()
                    reason = f"{retry + 1} tries failed, the last with: {failure}"
                    kind = TimeoutError if failure.is_late else ConnectionError
                    raise self._failed(reason, kind) from failure
                stop.wait(self._endpoint.pause(retry, failure.asked))
                retry += 1
            except BaseException:
                stop.set()
                raise
        raise _Stopped

    def _post(self, client: Any, body: bytes) -> Mapping[str, Any]:
        """The choice of one try's answer.

        Raises:
            _MayPass: try again.
            ConnectionError: do not.
        """
        httpx = _httpx()
        try:
            response = client.post(self._url, content=body)
        except httpx.TimeoutException as error:
            limit = self._endpoint.timeout_s
            raise _MayPass(f"no answer in {limit:g} s (timeout_s)", is_late=True) from error
        except httpx.RequestError as error:
            raise _MayPass(f"{type(error).__name__}: {error}") from error
        if not response.is_success:
            reason = f"HTTP {response.status_code}: {_short(response.text)}"
            if response.status_code not in _MAY_PASS:
                raise self._failed(f"it refused: {reason}")
            raise _MayPass(reason, asked=_seconds(response.headers.get("retry-after")))
        try:
            choice = response.json()["choices"][0]
            choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            text = _short(response.text)
            raise _MayPass(f"expected choices[0].message.content, got {text}") from error
        return dict(choice)

    def _body(self, question: Question, asked: Mapping[str, Any]) -> bytes:
        pictures = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}}
            for image in question.images
        ]
        content = [*pictures, {"type": "text", "text": question.text}]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            **asked,
            **self._endpoint.extra,
        }
        return json.dumps(
            {name: value for name, value in body.items() if value is not None}
        ).encode()

    def _failed(
        self, reason: str, kind: type[OSError] = ConnectionError
    ) -> OSError:  # ConnectionError or TimeoutError
        return kind(
            f"{self._reward}'s endpoint {self._url} (model {self._model!r}) failed: {reason}"
        )

    @cached_property
    def _client(self) -> Any:
        headers = {"Content-Type": "application/json"}
        variable = self._endpoint.api_key_env
        if variable is not None:
            if not os.environ.get(variable):
                raise ValueError(
                    f"{self._reward}'s endpoint wants its key in the environment variable "
                    f"{variable!r} (api_key_env), which is not set"
                )
            headers["Authorization"] = f"Bearer {os.environ[variable]}"
        count = self._endpoint.concurrency
        httpx = _httpx()
        return httpx.Client(
            headers=headers,
            timeout=self._endpoint.timeout_s,
            limits=httpx.Limits(max_connections=count, max_keepalive_connections=count),
        )


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a judge behind an endpoint needs the package httpx; install it (pip install httpx)",
            name=error.name,
        ) from error
    return httpx


def _answer(choice: Mapping[str, Any]) -> Answer:
    """The text of a choice; a model that says nothing, or refuses, has the text ""."""
    content = choice["message"]["content"]
    if content is not None and not isinstance(content, str):
        raise _MayPass(f"expected text as the answer's content, got {_short(content)}")
    return Answer(content or "", choice.get("finish_reason") == "length")


def _data_url(image: Any) -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _seconds(header: str | None) -> float | None:
    """What Retry-After asks for; None for a date, which few servers send."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if seconds >= 0 else None  # so that NaN is none either


def _short(value: object, length: int = 300) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = " ".join(text.split())
    return repr(text if len(text) <= length else text[:length] + "...")
