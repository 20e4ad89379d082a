"""A reward's call that may fail: tried again, cut in halves, given up; never a wrong number.

A call that raises or hangs is tried again after a pause. If it fails still, the batch is halved, so
that a sample which breaks the reward, or a batch that does not fit into memory, costs nobody else
the score. What fails alone is NaN: invalid, counted, masked. Reading order: `scored`, `tried`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from flowrl.errors import RewardError
from flowrl.types import Failures

T = TypeVar("T")
# Not the samples' fault: a part of the batch would meet the same.
UNAVAILABLE = (ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Patience:
    """How long a reward is waited for.

    Attributes:
        retries: further tries of a call that failed.
        backoff_s: seconds before the first of them; doubles each time.
        timeout_s: seconds that a call may take; None = any.
    """

    retries: int = 2
    backoff_s: float = 1.0
    timeout_s: float | None = None


def scored(
    call: Callable[[Tensor], dict[str, Tensor]],
    index: Tensor,
    *,
    is_divisible: bool,
    patience: Patience,
    failures: Failures,
) -> dict[str, Tensor]:
    """What `call(index)` returns, with NaN for the samples of which it failed for good.

    Args:
        call: scores the samples at int64 index [n]: name -> float32 [n].
        index: int64 [N].
        is_divisible: a part may be scored without the others; False for a group.
        patience: with the whole batch, and with a sample alone; halves are tried once.
        failures: counts them.

    Raises:
        RewardError: the call's; a broken promise is not tried again.
    """
    try:
        return tried(lambda: call(index), patience, failures)
    except RewardError:
        raise
    except Exception as error:
        if not is_divisible or len(index) == 1 or isinstance(error, UNAVAILABLE):
            failures.samples += len(index)
            return {"score": torch.full((len(index),), torch.nan)}
    halves = []
    for half in index.tensor_split(2):
        held = patience if len(half) == 1 else replace(patience, retries=0)
        halves.append(
            scored(call, half, is_divisible=is_divisible, patience=held, failures=failures)
        )
    return joined(halves, [len(half) for half in index.tensor_split(2)])


def joined(parts: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """The parts one after the other; a component that a part lacks is NaN there."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.cat(
            [
                part[name] if name in part else torch.full((size,), torch.nan)
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for name in names
    }


def tried(call: Callable[[], T], patience: Patience, failures: Failures) -> T:
    """What the call returns, at the first try that neither raises nor takes too long.

    Raises:
        Exception: what the last try raised; TimeoutError if it gave no answer in time. A
            RewardError is raised at once.
    """
    for number in range(patience.retries + 1):
        try:
            return within(patience.timeout_s, call)
        except RewardError:
            raise
        except Exception as error:
            failures.calls += 1
            failures.reason = f"{type(error).__name__}: {error}"
            if number == patience.retries:
                raise
            time.sleep(patience.backoff_s * 2**number)
    raise AssertionError("unreachable")


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """What the call returns, if it does so in time.

    Nothing can stop a thread of Python: a call that hangs is left behind, and what it may return
    later is thrown away.

    Raises:
        TimeoutError: no answer after `seconds`.
        Exception: what the call raised.
    """
    if seconds is None:
        return call()
    answers: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # handed over, and raised below
            answers.put((None, error))

    threading.Thread(target=run, name="reward", daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
