"""One question put to several servers: who is asked, how often, and when to give up.

The server with the fewest unanswered questions is asked. One that fails is left alone for a while,
unless there is no other. A question that got no sound answer is put again, under the same id, after
a growing pause, until the bound on tries or time. Reading order: `Patience`, `Servers.ask`.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rewards.serving.wire import MEDIA_TYPE, WireError

if TYPE_CHECKING:
    import httpx

Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
_AGAIN = (408, 425, 429)  # besides 5xx
_LONGEST_PAUSE_S = 30.0
_FAILURES = 2  # of a reward, after which waiting for it to succeed would not help
_LONGEST_BAN_S = 60.0


class RemoteError(ConnectionError):
    """Raised when no server gave a sound answer; names the last one, the tries and the reason."""


class RemoteFailed(RuntimeError):
    """Raised when the servers answer that the reward fails on these samples: fewer may do."""


class RemoteRefused(ValueError):
    """Raised when a server refuses a request as such: correct the request or the configuration."""


class _NoAnswer(Exception):
    """A try that failed; the message is the reason. `is_ban`: the server is to be left alone."""

    def __init__(self, reason: str, *, is_ban: bool = True) -> None:
        super().__init__(reason)
        self.is_ban = is_ban


@dataclass(frozen=True)
class Patience:
    """How long to go on asking.

    Attributes:
        timeout_s: of one try: to connect, and between two pieces of the answer.
        retries: tries after the first.
        total_s: after which no further try begins.
        backoff_s: the pause before the second try; it doubles, up to 30 s, and is shortened by up
            to a half at random, so that many clients do not come back at once.
    """

    timeout_s: float = 60.0
    retries: int = 12
    total_s: float = 300.0
    backoff_s: float = 0.25

    def __post_init__(self) -> None:
        """Refuse what cannot be waited for.

        Raises:
            ValueError: a time that is not positive, or a negative number of retries.
        """
        times = (self.timeout_s, self.total_s, self.backoff_s)
        if min(times) <= 0 or self.retries < 0:
            raise ValueError(
                "timeout_s, total_s and backoff_s must be positive and retries at least 0, got "
                f"{times} and {self.retries}"
            )


@dataclass(eq=False)
class _Server:
    url: str
    num_open: int = 0
    num_asked: int = 0
    failures: int = 0  # in a row
    banned_until: float = 0.0


class Servers:
    """The servers of one reward, and the connections to them; used by many threads.

    Args:
        urls: such as "http://127.0.0.1:8700".
        token: that they ask for; None = none.
        patience: how long to go on asking.

    Raises:
        ValueError: no URL, the same twice, or something that is not a URL.
    """

    def __init__(self, urls: Sequence[str], *, token: str | None, patience: Patience) -> None:
        cleaned = [url.rstrip("/") for url in urls]
        if not cleaned or len(set(cleaned)) != len(cleaned):
            raise ValueError(f"expected one URL or more, each once, got {list(urls)}")
        for url in cleaned:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"expected URLs such as 'http://127.0.0.1:8700', got {url!r}")
        self._servers = [_Server(url) for url in cleaned]
        self._token, self._patience = token, patience
        self._lock = threading.Lock()
        self._random = random.Random()  # of its own: the run's random numbers stay as they are
        self._client: httpx.Client | None = None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._servers)

    def ask(
        self,
        path: str,
        read: Callable[[bytes], Result],
        *,
        what: str,
        body: bytes | None = None,
        stop: threading.Event | None = None,
    ) -> Result:
        """The answer to a question, whoever gives it.

        Args:
            path: such as "/v1/score".
            read: makes the result of an answer's body, or raises WireError if it is not sound.
            what: names the question in messages.
            body: to be posted; None = a GET.
            stop: ends the pauses once it is set: nobody waits for the answer any more.

        Raises:
            RemoteError: no sound answer within the bounds.
            RemoteFailed: the reward fails on this question.
            RemoteRefused: a server says that the question is wrong, or `read` raised it.
        """
        started, patience, num_failed = time.monotonic(), self._patience, 0
        stop = stop or threading.Event()
        for tries in range(1, patience.retries + 2):
            server = self._take()
            try:
                result = read(self._send(server, path, body))
            except (_NoAnswer, WireError) as error:
                is_reward = isinstance(error, _NoAnswer) and not error.is_ban
                self._give_back(server, failed=not is_reward)
                reason = str(error)
                num_failed += is_reward
            except BaseException:
                self._give_back(server, failed=None)
                raise
            else:
                self._give_back(server, failed=False)
                return result
            pause = min(patience.backoff_s * 2 ** (tries - 1), _LONGEST_PAUSE_S)
            pause *= self._random.uniform(0.5, 1.0)
            spent = time.monotonic() - started
            is_over = tries > patience.retries or spent + pause > patience.total_s
            if is_over or num_failed > _FAILURES:
                break
            _LOG.warning("%s: %s: %s; try %d follows in %.1f s", server.url, what, reason,
                         tries + 1, pause)  # fmt: skip
            if stop.wait(pause):
                break
        count = f"{tries} tries in {spent:.0f} s" if tries > 1 else "1 try"
        others = f" (of {len(self)} servers)" if len(self) > 1 else ""
        message = (
            f"{server.url}{others}: {what}: no sound answer after {count}; the last reason: "
            f"{reason}"
        )
        if is_reward:
            raise RemoteFailed(message)
        raise RemoteError(f"{message}; see that the server runs, or raise retries and total_s")

    def close(self) -> None:
        """Close the connections; the next question opens them again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _take(self) -> _Server:
        """The server to ask now; counted as busy until it is given back."""
        with self._lock:
            now = time.monotonic()
            allowed = [each for each in self._servers if each.banned_until <= now]
            if not allowed:  # all have failed: the one whose time is up first
                allowed = [min(self._servers, key=lambda each: each.banned_until)]
            server = min(allowed, key=lambda each: (each.num_open, each.num_asked))
            server.num_open += 1
            server.num_asked += 1
            return server

    def _give_back(self, server: _Server, *, failed: bool | None) -> None:
        with self._lock:
            server.num_open -= 1
            if failed is None:
                return
            server.failures = server.failures + 1 if failed else 0
            ban = min(self._patience.backoff_s * 2 ** min(server.failures, 16), _LONGEST_BAN_S)
            server.banned_until = time.monotonic() + ban if failed else 0.0

    def _send(self, server: _Server, path: str, body: bytes | None) -> bytes:
        """The body of a 200.

        Raises:
            _NoAnswer: nothing, half an answer, or a status that may pass.
            RemoteRefused: any other status.
        """
        import httpx

        client = self._connected()
        method = "GET" if body is None else "POST"
        headers = {} if body is None else {"Content-Type": MEDIA_TYPE}
        try:
            response = client.request(method, server.url + path, content=body, headers=headers)
        except httpx.RequestError as error:
            raise _NoAnswer(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        status = response.status_code
        if status == 200:
            return response.content
        reason = f"status {status}: {_reason(response)}"
        if status >= 500 or status in _AGAIN:
            # A reward that raised says nothing against its server.
            raise _NoAnswer(reason, is_ban=status != 500)
        hint = ""
        if status == 401:
            hint = "; token_env must name an environment variable that holds the server's token"
        raise RemoteRefused(f"{server.url}{path} refuses the request: {reason}{hint}")

    def _connected(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> httpx.Client:
        try:
            import httpx
        except ImportError as error:
            raise ImportError("a remote reward needs httpx; run: pip install httpx") from error
        timeout_s = self._patience.timeout_s
        headers = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        return httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # servers are named in full: no proxy of the environment in between
        )


def _reason(response: httpx.Response) -> str:
    """What a server says about a failure, in one line."""
    try:
        text = str(response.json()["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = response.text or response.reason_phrase
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:497]}..."
