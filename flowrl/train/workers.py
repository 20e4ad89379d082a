"""A thread that does one thing after the other, in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs what it is given, in order, in a thread that does not keep the process alive.

    (The threads of `concurrent.futures` do: Ctrl-C would wait for a call that hangs.)

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name=f"worker {name}", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The call's value or error, in the future."""
        future: Future[T] = Future()
        self._tasks.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._tasks.get()
            try:
                future.set_result(call())
            except BaseException as error:  # raised where the result is asked for
                future.set_exception(error)
