"""What the tests of the reward server share: small rewards, requests, and an app on a real port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from torch import Tensor

from rewards.serving.calls import Served, declare
from rewards.serving.server import Settings, create_app, listen, make_server
from rewards.serving.wire import Request
from rewards.simple import Brightness

PATIENT_S = 120.0  # how long a test waits for what must come, on a machine that is busy
# One client, since each loads the certificates; no connection outlives its request, as servers do.
http = httpx.Client(timeout=PATIENT_S, limits=httpx.Limits(max_keepalive_connections=0))


class Recorded(Brightness):
    """Brightness that records the size of its calls; an image that is all 1 is poison to it."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.go, self.entered = threading.Event(), threading.Event()
        self.go.set()

    def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Tensor:
        self.calls.append(len(images))
        self.entered.set()
        assert self.go.wait(PATIENT_S)
        if (images == 1).flatten(1).all(1).any():
            raise RuntimeError("poison")
        scores = super().score(images=images)
        return scores.where(images.isfinite().flatten(1).all(1), torch.nan)


class Reader:
    """A reward of scope "group": the share of its call's prompts that equal a sample's."""

    inputs = ("prompts", "metadata")
    scope = "group"
    range = (0.0, 1.0)
    higher_is_better = True

    def score(self, *, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return torch.tensor([prompts.count(each) / len(prompts) for each in prompts])


class Brighter:
    """A judge of pairs."""

    inputs = ("images", "prompts")

    def compare(
        self, first: Tensor, second: Tensor, prompts: Sequence[str], metadata: Sequence[Any] = ()
    ) -> Tensor:
        assert len(prompts) == len(first) and not metadata
        return 0.5 + 0.5 * (first - second).mean(dim=(1, 2, 3)).sign()


def served(name: str, reward: Any, fingerprint: str = "f") -> Served:
    return Served(name, reward, declare(name, reward, fingerprint))


def flat(levels: Sequence[float], size: int = 4) -> Tensor:
    """One flat image per level."""
    return (
        torch.tensor(levels, dtype=torch.float32)[:, None, None, None]
        .expand(-1, 3, size, size)
        .contiguous()
    )


def ask(levels: Sequence[float], request_id: str = "r", size: int = 4, **given: Any) -> Request:
    """A request of flat images to the reward "bright"."""
    names = tuple(f"s{index}" for index in range(len(levels)))
    fields: dict[str, Any] = {"reward": "bright", "images": {"images": flat(levels, size)}}
    return Request(request_id=request_id, sample_ids=names, **(fields | given))


class Running:
    """An app on a port of the loopback, in a thread; a context manager."""

    def __init__(self, app: FastAPI, port: int = 0) -> None:
        listener = listen("127.0.0.1", port)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = make_server(app)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._server.started

    def stop(self) -> None:
        """Let the requests inside finish, and close the port."""
        self._server.should_exit = True
        self._thread.join(PATIENT_S)
        assert not self._thread.is_alive()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def serving(*rewards: Served, port: int = 0, **settings: Any) -> Running:
    return Running(create_app(rewards, Settings(**settings)), port)


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENT_S
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
