"""A reward, or a judge of pairs, that lives on one or more servers, as if it were here.

What it declares is asked of the server at first use. A batch is split over the servers; every
answer is checked against its request, and one that is late, cut off or not what was asked is asked
for again under the same id, so a server that dies and comes back costs time, not samples. A server
that cannot be reached within the bounds is an error, never a score. Reading order: `RemoteReward`.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rewards.serving import wire
from rewards.serving.balance import Patience, RemoteRefused, Servers
from rewards.serving.calls import SCORE, Declaration, Kind, read_declaration
from rewards.serving.pieces import Values, cut, join_values

_PATHS: dict[Kind, str] = {"reward": "/v1/score", "judge": "/v1/compare"}
_CLIENTS: dict[Kind, str] = {"reward": "remote", "judge": "remote_judge"}


class _Remote:
    """What a remote reward and a remote judge share: the questions."""

    kind: Kind

    def __init__(
        self,
        *,
        url: str | Sequence[str],
        reward: str,
        token_env: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 12,
        total_s: float = 300.0,
        backoff_s: float = 0.25,
        encoding: str = "tensor",
        images_per_request: int | None = None,
        parallel: int = 8,
    ) -> None:
        """See `RemoteReward`."""
        if encoding not in wire.ENCODINGS:
            raise ValueError(
                f"encoding must be one of {', '.join(wire.ENCODINGS)}, got {encoding!r}"
            )
        counts = {"images_per_request": images_per_request, "parallel": parallel}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        patience = Patience(timeout_s, retries, total_s, backoff_s)
        urls = [url] if isinstance(url, str) else list(url)
        self._servers = Servers(urls, token=_token(token_env), patience=patience)
        self._reward, self._encoding = reward, encoding
        self._images_per_request, self._parallel = images_per_request, parallel

    @cached_property
    def declaration(self) -> Declaration:
        """What the served reward declares; asked of a server the first time.

        Raises:
            RemoteError: no server answers.
            ValueError: the server has no such reward, or one of another kind.
        """
        return self._servers.ask("/v1/rewards", self._find, what="GET /v1/rewards")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Which of "images", "prompts" and "metadata" it reads."""
        return self.declaration.inputs

    def close(self) -> None:
        """Close the connections; the next call opens them again."""
        self._servers.close()

    @cached_property
    def _max_body(self) -> int:
        def read(body: bytes) -> int:
            found = _json(body).get("max_body")
            if type(found) is not int:
                raise wire.WireError(f"/version must tell max_body, got {found!r}")
            return found

        return self._servers.ask("/version", read, what="GET /version")

    def _find(self, body: bytes) -> Declaration:
        known = _json(body).get("rewards")
        if not isinstance(known, dict):
            raise wire.WireError("/v1/rewards must tell the rewards, got none")
        if self._reward not in known:
            raise RemoteRefused(
                f"{self._reward!r} is not served there; served: {', '.join(sorted(known))}"
            )
        declared = read_declaration(self._reward, known[self._reward])
        if declared.kind != self.kind:
            raise RemoteRefused(
                f"{self._reward!r} is a {declared.kind}; use {_CLIENTS[declared.kind]!r} for it"
            )
        return declared

    def _ask_all(
        self, images: Mapping[str, Tensor], prompts: Any, metadata: Any, num: int
    ) -> Values:
        """The scores of `num` samples and their components, on the CPU, asked for in pieces."""
        if num == 0:
            return {SCORE: torch.empty(0)}
        whole = wire.Request(
            reward=self._reward,
            request_id="none",  # a piece gets its own
            sample_ids=tuple(map(str, range(num))),
            images=images,
            prompts=None if prompts is None else tuple(prompts),
            metadata=None if metadata is None else tuple(metadata),
        )
        size = num
        if self.declaration.scope == "sample":
            size = self._images_per_request or -(-num // len(self._servers))
        pieces = cut(whole, size)
        if len(pieces) == 1:
            return self._ask(whole)
        stop = threading.Event()
        with ThreadPoolExecutor(min(self._parallel, len(pieces))) as pool:
            waiting = [pool.submit(self._ask, piece, stop) for piece in pieces]
            try:
                # The first failure, whichever piece it is of, and an interrupt end the others.
                for each in as_completed(waiting):
                    each.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return join_values([each.result() for each in waiting])

    def _ask(self, piece: wire.Request, stop: threading.Event | None = None) -> Values:
        request = replace(piece, request_id=uuid.uuid4().hex)
        body = wire.encode_request(request, encoding=self._encoding)
        if len(body) > self._max_body:
            raise ValueError(
                f"a request of {len(request)} samples has {len(body)} bytes, but the server takes "
                f"{self._max_body}; lower images_per_request, use encoding='png', or raise the "
                "server's max_body_mb"
            )

        def read(answer: bytes) -> Values:
            found = wire.decode_answer(answer, request)
            if found.fingerprint != self.declaration.fingerprint:
                raise RemoteRefused(
                    f"a server answers for another {self._reward!r} (fingerprint "
                    f"{found.fingerprint!r}) than the first did "
                    f"({self.declaration.fingerprint!r}); give all servers the same config and "
                    "release, and start the run again"
                )
            return {SCORE: found.scores, **found.components}

        path = _PATHS[self.kind]
        return self._servers.ask(path, read, what=f"reward {self._reward!r}", body=body, stop=stop)


class RemoteReward(_Remote):
    """A reward that servers score; to its caller like any other.

    Args:
        url: the server's, such as "http://127.0.0.1:8700", or those of several that serve the same.
        reward: the name under which it is served.
        token_env: environment variable that holds the servers' token; None = they ask for none.
        timeout_s: of one try, seconds.
        retries: tries after the first, with a growing pause between them.
        total_s: after which no further try begins, seconds; long enough for a server to come back.
        backoff_s: the first of these pauses, seconds.
        encoding: of the images: "tensor", for the scores that it would give in process bit by bit,
            or "png": 8 bit, a fraction of the size.
        images_per_request: samples per request; None = an equal part for each server. A reward of
            scope "group" gets a group in one request.
        parallel: requests at once.

    Raises:
        ValueError: arguments that do not fit; no such environment variable.
    """

    kind = "reward"

    @property
    def scope(self) -> str:
        """Whether a score depends on its own sample only ("sample") or on its "group"."""
        return self.declaration.scope

    @property
    def range(self) -> tuple[float, float]:
        """(low, high) of the scores."""
        return self.declaration.range

    @property
    def higher_is_better(self) -> bool:
        """True."""
        return self.declaration.higher_is_better

    def score(
        self,
        *,
        images: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Tensor | Values:
        """Scores, float32 [B], on the images' device; NaN: not to be scored.

        Or a mapping of them, as "score", and their components, where the served reward has some.

        Args:
            images: float [B, 3, H, W] in [0, 1], of single or half precision.
            prompts: B texts.
            metadata: B mappings of JSON's values.

        Raises:
            ValueError: an input that it reads is missing or cannot be sent; the server refuses.
            RemoteError: no server gave a sound answer within the bounds.
            RemoteFailed: the reward itself failed on these samples; fewer of them may do.
        """
        given = {"images": images, "prompts": prompts, "metadata": metadata}
        chosen = {name: given[name] for name in self.inputs}
        num = _count(self._reward, chosen)
        pictures = {name: each for name, each in chosen.items() if isinstance(each, Tensor)}
        values = self._ask_all(pictures, chosen.get("prompts"), chosen.get("metadata"), num)
        if images is not None:
            values = {name: each.to(images.device) for name, each in values.items()}
        return values if len(values) > 1 else values[SCORE]


class RemoteJudge(_Remote):
    """A judge of pairs that servers ask; see `rewards.pairwise.Judge`.

    Args and Raises: as `RemoteReward`.
    """

    kind = "judge"

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> Tensor:
        """P(first wins), float32 [B] in [0, 1], on the images' device; NaN: cannot say.

        Raises:
            ValueError, RemoteError: as `RemoteReward.score`.
        """
        rows = {
            name: value if name in self.inputs else None
            for name, value in (("prompts", prompts), ("metadata", metadata))
        }
        read = {name: value for name, value in rows.items() if value is not None}
        num = _count(self._reward, {"first": first, "second": second, **read})
        answer = self._ask_all({"first": first, "second": second}, **rows, num=num)
        return answer[SCORE].to(first.device)


def _count(reward: str, inputs: Mapping[str, Any]) -> int:
    """How many samples the inputs hold."""
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise ValueError(f"remote reward {reward!r} reads {', '.join(missing)}, which is missing")
    counts = {name: len(value) for name, value in inputs.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"remote reward {reward!r} must get as many of each, got {counts}")
    return next(iter(counts.values()))


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(
            f"token_env={variable!r}: there is no such environment variable, or it is empty; put "
            "the servers' token there"
        )
    if not token.isascii() or not token.isprintable():
        raise ValueError(f"token_env={variable!r}: a token is of printable ASCII")
    return token


def _json(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise wire.WireError(f"the answer is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise wire.WireError(f"the answer must be an object, got {type(data).__name__}")
    return data
