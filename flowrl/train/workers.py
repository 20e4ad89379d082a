"""A thread that does one thing after the other, in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Worker:
    """Runs what it is given, in order, in a thread that does not keep the process alive.

    (The threads of `concurrent.futures` do: Ctrl-C would wait for a call that hangs.) Its torch
    computes in this one thread: a second OpenMP team beside the caller's halves the caller's speed.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name=f"worker {name}", daemon=True).start()
        num_threads = torch.get_num_threads()
        self.submit(_compute_alone).result()
        torch.set_num_threads(num_threads)

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


def _compute_alone() -> None:
    """Takes torch's thread count of the process to this thread, then lowers it for this thread."""
    torch.get_num_threads()  # the first call copies the process's count
    torch.set_num_threads(1)  # of this thread, and of the process: the caller sets that back
