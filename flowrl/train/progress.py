"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere.

Everything goes to standard output. Plain lines come at most every few seconds, except for the first
and last step, evaluations and messages, which always come. Only the main process shows anything.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

PLAIN_EVERY_S = 5.0
_SMOOTHING = 0.9


class Progress:
    """Shows how far a run is and how it does; use it in a `with` statement.

    Args:
        total_steps: steps of the whole run.
        start: steps done before, in a resumed run.
        quiet: show nothing; for tests and for all processes but the main one.
        stream: where to write; None = standard output.
        max_minutes: the run's limit, which may end it before the last step.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start: int = 0,
        quiet: bool = False,
        stream: TextIO | None = None,
        max_minutes: float | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.quiet = quiet
        self._stream = sys.stdout if stream is None else stream
        self._step = start
        self._first = start + 1
        self._began = time.monotonic()
        self._max_seconds = None if max_minutes is None else 60 * max_minutes
        self._seconds_per_step: float | None = None
        self._printed = -math.inf
        self._score: float | None = None
        self._bar: Bar | None = None
        self._task = TaskID(0)
        console = Console(file=self._stream)
        if console.is_terminal and not quiet:
            self._bar = Bar(
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                MofNCompleteColumn(),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("starting", total=total_steps, completed=start)

    def __enter__(self) -> Progress:
        """Show the bar; the clock of `max_minutes` starts here."""
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """A training step is done.

        Args:
            step: steps done, this one included.
            metrics: of the step; `train/reward_mean`, `train/ratio_max_dev` and
                `perf/step_time_s` are shown where present.
        """
        self._step = step
        seconds = metrics.get("perf/step_time_s")
        if seconds is not None and math.isfinite(seconds):
            before = self._seconds_per_step
            self._seconds_per_step = (
                seconds if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * seconds
            )
        line = "  ".join(self._parts(metrics))
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=escape(line))
            return
        now = time.monotonic()
        is_end = step in (self._first, self.total_steps)
        if is_end or now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            self._print(f"step {step}/{self.total_steps}  {line}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """A held-out evaluation is done.

        Args:
            step: training steps done.
            metrics: of the evaluation; score, skills and diversity are shown where present.
        """
        if "eval/score" in metrics:
            self._score = metrics["eval/score"]
        parts = [
            f"{key.rpartition('/')[2]} {value:.3f}"
            for key, value in metrics.items()
            if key in ("eval/score", "eval/diversity") or key.startswith("eval/skill/")
        ]
        shown = parts or [f"{key} {value:.4g}" for key, value in metrics.items()]
        self.message(f"eval at step {step}/{self.total_steps}  {'  '.join(shown)}")

    def message(self, text: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def _parts(self, metrics: Mapping[str, float]) -> list[str]:
        parts = []
        if "train/reward_mean" in metrics:
            parts.append(f"reward {metrics['train/reward_mean']:.3f}")
        elif "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        if self._score is not None:
            parts.append(f"eval {self._score:.3f}")
        if "train/ratio_max_dev" in metrics:
            parts.append(f"|ratio-1| {metrics['train/ratio_max_dev']:.1e}")
        if self._seconds_per_step is not None:
            parts.append(f"{self._seconds_per_step:.2f} s/step")
            parts.append(f"{_duration(self._seconds_left(self._seconds_per_step))} left")
        return parts

    def _seconds_left(self, seconds_per_step: float) -> float:
        left = max(0, self.total_steps - self._step) * seconds_per_step
        if self._max_seconds is None:
            return left
        return min(left, max(0.0, self._max_seconds - (time.monotonic() - self._began)))

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3:05 min, 2:07 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


__all__ = ["PLAIN_EVERY_S", "Progress"]
