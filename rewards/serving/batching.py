"""Requests that wait together are scored together, and repeated requests only once.

`Batcher` joins the samples of waiting requests up to a bound and hands every request its own
scores; when a joint call fails, each of its requests is tried alone, so that one poisoned sample
costs only the request that holds it. `Answers` remembers what was answered: a client that lost an
answer asks again under the same id.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rewards.serving.calls import RewardFailed, Served, call
from rewards.serving.metrics import Metrics
from rewards.serving.pieces import Values, cut, cut_values, join, join_values
from rewards.serving.wire import Request

_CLOSING = RewardFailed("the server is shutting down")


@dataclass(frozen=True, eq=False)  # told apart by identity
class _Waiting:
    request: Request
    since: float
    values: asyncio.Future[Values]


class Batcher:
    """The queue before one reward; calls it from one thread, one call at a time.

    Args:
        served: the reward. One of scope "group" is called with each request as it came: joined
            requests would look like one group.
        max_batch: samples per call; more of a request of scope "sample" take several calls.
        max_wait_s: how long a request waits for company before it is scored.
        metrics: what is counted.
    """

    def __init__(
        self, served: Served, *, max_batch: int, max_wait_s: float, metrics: Metrics
    ) -> None:
        self.served = served
        self._max_batch, self._max_wait_s, self._metrics = max_batch, max_wait_s, metrics
        self._joins = served.declaration.scope == "sample"
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"reward-{served.name}")
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start; called inside the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop after the call that runs; whoever still waits gets a RewardFailed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._settle(self._waiting, [_CLOSING] * len(self._waiting))
        await asyncio.to_thread(self._thread.shutdown)

    @property
    def num_waiting(self) -> int:
        """Requests that are in the queue."""
        return len(self._waiting)

    async def score(self, request: Request) -> Values:
        """The scores of one request and their components.

        Raises:
            RewardFailed: the reward could not score it.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, loop.time(), loop.create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.values

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                await self._next_arrival(None)
            while self._joins and len(self._next()) == len(self._waiting):  # room for more
                left = self._waiting[0].since + self._max_wait_s - loop.time()
                if left <= 0 or self._num_samples(self._waiting) >= self._max_batch:
                    break
                await self._next_arrival(left)
            batch = self._next()
            self._waiting = [each for each in self._waiting if each not in batch]
            requests = [each.request for each in batch]
            try:
                results = await loop.run_in_executor(self._thread, self._score_all, requests)
            except asyncio.CancelledError:
                self._settle(batch, [_CLOSING] * len(batch))
                raise
            self._settle(batch, results)

    @staticmethod
    def _settle(batch: Sequence[_Waiting], results: Sequence[Values | RewardFailed]) -> None:
        for each, result in zip(batch, results, strict=True):
            if each.values.done():  # cancelled: nobody waits for it any more
                continue
            if isinstance(result, RewardFailed):
                each.values.set_exception(result)
            else:
                each.values.set_result(result)

    async def _next_arrival(self, timeout_s: float | None) -> None:
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except asyncio.TimeoutError:
            return

    def _next(self) -> list[_Waiting]:
        """The oldest request and those behind it that fit into the same call."""
        chosen = self._waiting[:1]
        if not self._joins:
            return chosen
        for each in self._waiting[1:]:
            fits = self._num_samples([*chosen, each]) <= self._max_batch
            if fits and each.request.size == chosen[0].request.size:
                chosen.append(each)
        return chosen

    @staticmethod
    def _num_samples(waiting: Sequence[_Waiting]) -> int:
        return sum(len(each.request) for each in waiting)

    # ----------------------------------------------------------------- in the reward's thread

    def _score_all(self, requests: Sequence[Request]) -> list[Values | RewardFailed]:
        """The scores of each request, or why it has none; nothing is raised."""
        together = self._try(requests)
        if not isinstance(together, RewardFailed):
            return [*cut_values(together, [len(request) for request in requests])]
        if len(requests) == 1:
            return [together]
        return [self._try([request]) for request in requests]

    def _try(self, requests: Sequence[Request]) -> Values | RewardFailed:
        try:
            request = join(requests)
            pieces = cut(request, self._max_batch) if self._joins else [request]
            return join_values([self._call(piece) for piece in pieces])
        except RewardFailed as error:
            return error
        except Exception as error:  # out of memory, say: it must not stop the queue
            return RewardFailed(f"{self.served.name!r}: {type(error).__name__}: {error}")

    def _call(self, request: Request) -> Values:
        started = time.monotonic()
        try:
            return call(self.served, request)
        finally:
            self._metrics.called(self.served.name, len(request), time.monotonic() - started)


class Conflict(ValueError):
    """Raised when a request's id was used before for other bytes."""


class Answers:
    """What was answered of late, by the request's id.

    Args:
        size: answers that are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._known: OrderedDict[str, tuple[bytes, asyncio.Future[bytes]]] = OrderedDict()

    def __len__(self) -> int:
        """Answers kept, those in the making included."""
        return len(self._known)

    async def get(
        self, request_id: str, digest: bytes, make: Callable[[], Awaitable[bytes]]
    ) -> tuple[bytes, bool]:
        """The answer to a request, made once, and whether it was made for an earlier one.

        A request that comes again while its answer is being made waits for it. A failure is not
        kept: the next try makes the answer anew.

        Args:
            request_id: of the request.
            digest: of its body.
            make: makes the answer.

        Raises:
            Conflict: another body came under this id.
            Exception: whatever `make` raises.
        """
        known = self._known.get(request_id)
        if known is not None and known[0] != digest:
            raise Conflict(
                f"request_id {request_id!r} was used for another request; take a fresh one"
            )
        if known is None:
            task: asyncio.Future[bytes] = asyncio.ensure_future(make())
            self._known[request_id] = (digest, task)
            task.add_done_callback(lambda done: self._settle(request_id, done))
        else:
            task = known[1]
        # A client that goes away must not cancel what its next try will ask for.
        return await asyncio.shield(task), known is not None

    def _settle(self, request_id: str, task: asyncio.Future[bytes]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._known[request_id]
        finished = [key for key, (_, each) in self._known.items() if each.done()]
        for key in finished[: max(0, len(self._known) - self._size)]:
            del self._known[key]
