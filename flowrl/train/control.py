"""What a loop keeps an eye on: the seconds of a step's phases, and whether it is to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Clock:
    """Seconds per phase of one step; `lap` names what has passed since the last lap."""

    start: float
    last: float

    @classmethod
    def started(cls) -> Clock:
        """A clock that starts now."""
        now = time.perf_counter()
        return cls(now, now)

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads between steps.

    A second signal raises KeyboardInterrupt at once; then the last checkpoint is what remains.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Inside the `with`, signals set the flag."""
        previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
