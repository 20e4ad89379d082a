"""Rewards over HTTP: an app that scores what it is sent, and the loop that runs it.

POST /v1/score and /v1/compare take and give `wire` bodies; GET /v1/rewards says what is served,
/health that the server runs, /version and /metrics what a person or Prometheus asks. A request that
is not understood is answered by a 4xx with `{"error": reason}`, a reward that raises by a 500 for
the requests concerned. Reading order: `Settings`, `create_app`, `_Desk.handle`, `run`.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import hmac
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from rewards.serving import wire
from rewards.serving.batching import Answers, Batcher, Conflict
from rewards.serving.calls import SCORE, Kind, RewardFailed, Served, check_request
from rewards.serving.metrics import Metrics

OPEN_PATHS = ("/health",)  # answered without a token


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        token: that every request must bear, but for /health; None = anybody may ask.
        max_body: bytes of a request.
        max_batch: samples per call of a reward.
        max_wait_s: how long a request waits for company.
        max_requests: requests in the server at once; more are told to come back (503).
        body_timeout_s: how long a request may take to arrive.
        num_answers: answers that are kept for requests that come again.
        version: of the release, as told by /version.
        limits: of what a request holds.
    """

    token: str | None = None
    max_body: int = 256 * 2**20
    max_batch: int = 64
    max_wait_s: float = 0.005
    max_requests: int = 64
    body_timeout_s: float = 60.0
    num_answers: int = 1024
    version: str = ""
    limits: wire.Limits = field(default_factory=wire.Limits)


class Problem(BaseModel):
    """Why there is no answer."""

    error: str


def create_app(rewards: Sequence[Served], settings: Settings | None = None) -> FastAPI:
    """The ASGI app that serves these rewards under their names.

    Raises:
        ValueError: two have the same name, or there is none.
    """
    settings = settings or Settings()
    names = [served.name for served in rewards]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected one reward or more with names of their own, got {names}")
    desk = _Desk(rewards, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.open()
        try:
            yield
        finally:
            await desk.close()

    app = FastAPI(
        title="flowrl reward server",
        version=settings.version or str(wire.WIRE),
        lifespan=lifespan,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(_scoring(desk))
    app.include_router(_telling(desk))
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(Exception, _fail)
    if settings.token is not None:
        app.add_middleware(_RequireToken, token=settings.token)
    return app


# --------------------------------------------------------------------------- routes

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "The body is not a request for this reward.",
        401: "The token is missing or wrong.",
        404: "No such reward.",
        408: "The body took too long to arrive.",
        409: "The id was used for another request.",
        413: "The body is too large.",
        415: "The body is not safetensors.",
        500: "The reward raised.",
        503: "Too many requests at once; come back.",
    }.items()
}
_BINARY = {"content": {wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


def _scoring(desk: _Desk) -> APIRouter:
    router = APIRouter()
    responses = _REFUSALS | {200: _BINARY | {"description": "The scores."}}
    options: dict[str, Any] = {
        "response_class": Response,
        "responses": responses,
        "openapi_extra": {"requestBody": _BINARY | {"required": True}},
    }

    @router.post("/v1/score", **options)
    async def score(request: Request) -> Response:
        """Score samples; the body is what `wire.encode_request` writes."""
        return await desk.handle(request, "reward")

    @router.post("/v1/compare", **options)
    async def compare(request: Request) -> Response:
        """Compare pairs: the probability that the first image wins."""
        return await desk.handle(request, "judge")

    return router


def _telling(desk: _Desk) -> APIRouter:
    refused: dict[int | str, dict[str, Any]] = {401: _REFUSALS[401]}
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server runs; needs no token."""
        return {"status": "ok"}

    @router.get("/version", responses=refused)
    async def version() -> dict[str, Any]:
        """The release, the format's version and the bounds that a client must keep."""
        settings = desk.settings
        return {
            "version": settings.version,
            "wire": wire.WIRE,
            "max_body": settings.max_body,
            "max_samples": settings.limits.max_samples,
        }

    @router.get("/v1/rewards", responses=refused)
    async def rewards() -> dict[str, Any]:
        """What is served, and what each declares."""
        served = (each.served for each in desk.batchers.values())
        return {"rewards": {each.name: each.declaration.to_json() for each in served}}

    @router.get("/metrics", responses=refused, response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(desk.metrics_text(), media_type="text/plain; version=0.0.4")

    return router


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    """A bug: the reason goes out, the traceback to the log, and the server goes on."""
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)


class _RequireToken:
    """Refuses whoever does not bear the token, before anything of the request is read."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._bears(scope):
            await self._app(scope, receive, send)
            return
        reason = "expected the header 'Authorization: Bearer TOKEN' with this server's token"
        headers = {"WWW-Authenticate": "Bearer"}
        await JSONResponse({"error": reason}, 401, headers=headers)(scope, receive, send)

    def _bears(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


# --------------------------------------------------------------------------- the desk


class _Desk:
    """Takes requests in, has them scored, and remembers the answers."""

    def __init__(self, rewards: Sequence[Served], settings: Settings) -> None:
        self.settings = settings
        self.batchers: dict[str, Batcher] = {}
        self._rewards, self._metrics = rewards, Metrics()
        self._answers = Answers(settings.num_answers)
        self._num_inside = 0

    def open(self) -> None:
        """Start the queues; called inside the running event loop."""
        for served in self._rewards:
            self.batchers[served.name] = Batcher(
                served,
                max_batch=self.settings.max_batch,
                max_wait_s=self.settings.max_wait_s,
                metrics=self._metrics,
            )
            self.batchers[served.name].open()

    async def close(self) -> None:
        """Stop the queues."""
        for batcher in self.batchers.values():
            await batcher.close()

    def metrics_text(self) -> str:
        """What GET /metrics says."""
        return self._metrics.text(
            {name: each.num_waiting for name, each in self.batchers.items()},
            {each.name: getattr(each.reward, "num_restarts", 0) for each in self._rewards},
        )

    async def handle(self, request: Request, kind: Kind) -> Response:
        """The answer to a request.

        Raises:
            HTTPException: there is none, for a reason in words.
        """
        if self._num_inside >= self.settings.max_requests:
            self._metrics.add("refused_total", status="503")
            raise HTTPException(503, "too many requests at once; come back", {"Retry-After": "1"})
        self._num_inside += 1
        try:
            digest, asked = await self._read(request, kind)
        except HTTPException as error:
            self._metrics.add("refused_total", status=str(error.status_code))
            raise
        else:
            return await self._answer(digest, asked)
        finally:
            self._num_inside -= 1

    async def _read(self, request: Request, kind: Kind) -> tuple[bytes, wire.Request]:
        """The digest of the body, and the request in it, which fits what is served."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != wire.MEDIA_TYPE:
            raise HTTPException(415, f"expected the content type {wire.MEDIA_TYPE}, got {media!r}")
        try:
            body = await asyncio.wait_for(self._receive(request), self.settings.body_timeout_s)
        except asyncio.TimeoutError as error:
            limit = self.settings.body_timeout_s
            raise HTTPException(408, f"the body took more than {limit:g} s to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the body ended early") from error
        try:
            digest, asked = await run_in_threadpool(_parse, body, self.settings.limits)
            self._check(asked, kind)
        except wire.WireError as error:
            raise HTTPException(400, str(error)) from error
        return digest, asked

    async def _receive(self, request: Request) -> bytes:
        """The body; refused as soon as it is known to be too large."""
        limit = self.settings.max_body
        reason = f"the body exceeds {limit} bytes; send fewer images per request"
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated[:20]) > limit:
            raise HTTPException(413, reason)
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise HTTPException(413, reason)
            parts.append(part)
        return b"".join(parts)

    def _check(self, asked: wire.Request, kind: Kind) -> None:
        """Raises unless the reward is here, of this kind, and given what it reads."""
        if asked.reward not in self.batchers:
            raise HTTPException(404, _unknown(asked.reward, list(self.batchers)))
        declared = self.batchers[asked.reward].served.declaration
        if declared.kind != kind:
            path = "/v1/score" if declared.kind == "reward" else "/v1/compare"
            raise HTTPException(400, f"{asked.reward!r} is a {declared.kind}; post to {path}")
        check_request(declared, asked)

    async def _answer(self, digest: bytes, asked: wire.Request) -> Response:
        def count(outcome: str) -> None:
            self._metrics.add("requests_total", reward=asked.reward, outcome=outcome)

        try:
            body, is_known = await self._answers.get(
                asked.request_id, digest, lambda: self._score(asked)
            )
        except Conflict as error:
            count("conflict")
            raise HTTPException(409, str(error)) from error
        except RewardFailed as error:
            count("failed")
            raise HTTPException(500, str(error)) from error
        count("repeated" if is_known else "scored")
        return Response(body, media_type=wire.MEDIA_TYPE)

    async def _score(self, asked: wire.Request) -> bytes:
        batcher = self.batchers[asked.reward]
        values = dict(await batcher.score(asked))
        scores = values.pop(SCORE)
        self._metrics.add("samples_total", len(scores), reward=asked.reward)
        self._metrics.add("nan_total", int(scores.isnan().sum()), reward=asked.reward)
        fingerprint = batcher.served.declaration.fingerprint
        return wire.encode_answer(
            wire.Answer(
                asked.reward, asked.request_id, asked.sample_ids, fingerprint, scores, values
            )
        )


def _parse(body: bytes, limits: wire.Limits) -> tuple[bytes, wire.Request]:
    return hashlib.blake2b(body, digest_size=16).digest(), wire.decode_request(body, limits)


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name[:100], known, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{name[:100]!r} is not served here; {guess}served: {', '.join(known)}"


# --------------------------------------------------------------------------- running


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=512)


def make_server(app: FastAPI, *, stop_after_s: float = 30.0) -> uvicorn.Server:
    """The loop that runs an app; `run(sockets=[...])` returns when it was told to stop.

    SIGINT and SIGTERM let the requests inside finish, for at most `stop_after_s`.
    """
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(stop_after_s),
    )
    return uvicorn.Server(config)


Close = Callable[[], None]


def run(app: FastAPI, listener: socket.socket, *, then: Sequence[Close] = ()) -> None:
    """Serve until a signal, then close the listener and call `then`, e.g. to end processes."""
    try:
        make_server(app).run(sockets=[listener])
    finally:
        listener.close()
        for close in then:
            close()
