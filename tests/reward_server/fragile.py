"""Rewards that are loaded by a process of their own, from this file."""

import os
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from rewards.simple import Brightness


class Fragile(Brightness):
    """Brightness that dies of a white image and hangs at a black one."""

    def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Tensor:
        if images.mean() == 1:
            os._exit(9)
        if images.mean() == 0:
            threading.Event().wait()
        return super().score(images=images)


class Talkative(Brightness):
    """Brightness that writes where a careless protocol would have its messages."""

    def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Tensor:
        print("a line on standard output", flush=True)
        os.write(1, b"and bytes")
        sys.stderr.write("a line on standard error\n")
        return super().score(images=images)


class Detailed(Brightness):
    """Brightness with its square beside it."""

    def score(self, *, images: Tensor, prompts: Any = (), metadata: Any = ()) -> Any:
        scores = super().score(images=images)
        return {"score": scores, "squared": scores.square()}


class Reads:
    """A reward of texts: the length of the prompt times the factor of its metadata."""

    inputs = ("prompts", "metadata")
    scope = "group"
    range = (0.0, float("inf"))
    higher_is_better = True

    def __init__(self, *, power: float) -> None:
        self._power = power

    def score(self, *, prompts: list[str], metadata: list[dict[str, float]]) -> Tensor:
        if "boom" in prompts:
            raise ValueError("a prompt says boom")
        pairs = zip(prompts, metadata, strict=True)
        return torch.tensor([(len(text) * row["factor"]) ** self._power for text, row in pairs])


class Brighter:
    """A judge of pairs."""

    inputs = ("images",)

    def compare(self, first: Tensor, second: Tensor, prompts: Any, metadata: Any = ()) -> Tensor:
        assert not prompts and not metadata
        return 0.5 + 0.5 * (first - second).mean(dim=(1, 2, 3)).sign()


def pid(images: Tensor) -> Tensor:
    """The number of the process that scores."""
    return torch.full((len(images),), float(os.getpid()))
