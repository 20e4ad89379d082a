"""Counters of the reward server, in Prometheus' text format."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

_HELP = {
    "requests_total": ("counter", "Requests, by how they ended."),
    "samples_total": ("counter", "Samples that got a score or NaN."),
    "nan_total": ("counter", "Samples that could not be scored."),
    "calls_total": ("counter", "Calls of the reward; one may hold several requests."),
    "call_samples_total": ("counter", "Samples in these calls; repeated tries count again."),
    "call_seconds_total": ("counter", "Time in these calls."),
    "refused_total": ("counter", "Requests refused before they reached a reward, by status."),
    "waiting": ("gauge", "Requests in the queue."),
    "restarts_total": ("counter", "Times that a reward's process was started anew."),
    "uptime_seconds": ("gauge", "Time since the server was made."),
}
_PREFIX = "flowrl_reward_"


class Metrics:
    """Counters by name and labels; may be fed from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = {}
        self._started = time.monotonic()

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter, whose name is a key of the help texts."""
        key = (name, _labels(labels))
        with self._lock:
            self._counts[key] = self._counts.get(key, 0.0) + amount

    def called(self, reward: str, num_samples: int, seconds: float) -> None:
        """Count one call of a reward."""
        self.add("calls_total", reward=reward)
        self.add("call_samples_total", num_samples, reward=reward)
        self.add("call_seconds_total", seconds, reward=reward)

    def text(self, waiting: Mapping[str, int], restarts: Mapping[str, int]) -> str:
        """All of it, with the gauges given: requests waiting and restarts by reward."""
        with self._lock:
            rows = dict(self._counts)
        rows |= {("waiting", _labels({"reward": name})): num for name, num in waiting.items()}
        rows |= {("restarts_total", _labels({"reward": name})): n for name, n in restarts.items()}
        rows["uptime_seconds", ""] = time.monotonic() - self._started
        lines = []
        for name, (kind, text) in _HELP.items():
            found = {labels: value for (each, labels), value in rows.items() if each == name}
            if found:
                lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}"]
                lines += [f"{_PREFIX}{name}{key} {value:.12g}" for key, value in found.items()]
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = {
        key: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for key, value in labels.items()
    }
    return "{" + ",".join(f'{key}="{value}"' for key, value in sorted(escaped.items())) + "}"
