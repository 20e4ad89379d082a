"""What is served, what it declares, and one checked call of it.

A reward has `score`, a judge of pairs (`rewards.pairwise.Judge`) has `compare`; both are called
with what they declare and must answer with one float per sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.base import INPUTS
from rewards.registry import check_members
from rewards.serving.pieces import Values
from rewards.serving.wire import Request, WireError, check_component

SCORE = "score"  # what is trained on, of the names in a mapping
Kind = Literal["reward", "judge"]
UNBOUNDED = (-math.inf, math.inf)


class RewardFailed(RuntimeError):
    """Raised when a reward raised, or did not return one float per sample; names the reward."""


@dataclass(frozen=True)
class Declaration:
    """What a reward, or judge of pairs, says about itself; see `rewards.base.Reward`.

    Attributes:
        kind: whether it has `score` or `compare`.
        inputs: which of "images", "prompts" and "metadata" it reads.
        scope: "sample" or "group"; a judge's is "sample", as each pair stands for itself.
        range: of its scores.
        higher_is_better: True.
        fingerprint: differs where name, arguments or release differ; "" = unknown.
    """

    kind: Kind
    inputs: tuple[str, ...]
    scope: str = "sample"
    range: tuple[float, float] = UNBOUNDED
    higher_is_better: bool = True
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite bound is null."""
        low, high = self.range
        return {
            "kind": self.kind,
            "inputs": list(self.inputs),
            "scope": self.scope,
            "range": [low if math.isfinite(low) else None, high if math.isfinite(high) else None],
            "higher_is_better": self.higher_is_better,
            "fingerprint": self.fingerprint,
        }


def declare(name: str, reward: Any, fingerprint: str = "") -> Declaration:
    """The declaration of a live reward or judge.

    Raises:
        ValueError: it is neither, or declares inputs or a scope that do not exist.
    """
    if hasattr(reward, "compare"):
        return _checked(name, Declaration("judge", tuple(reward.inputs), range=(0.0, 1.0),
                                          fingerprint=fingerprint))  # fmt: skip
    check_members(name, reward)
    low, high = reward.range
    return _checked(
        name,
        Declaration(
            kind="reward",
            inputs=tuple(reward.inputs),
            scope=reward.scope,
            range=(float(low), float(high)),
            higher_is_better=bool(reward.higher_is_better),
            fingerprint=fingerprint,
        ),
    )


def read_declaration(name: str, data: Any) -> Declaration:
    """The declaration in what `Declaration.to_json` gave.

    Raises:
        WireError: it is something else.
    """
    try:
        low, high = data["range"]
        found = Declaration(
            kind=data["kind"],
            inputs=tuple(data["inputs"]),
            scope=data["scope"],
            range=(-math.inf if low is None else float(low),
                   math.inf if high is None else float(high)),
            higher_is_better=bool(data["higher_is_better"]),
            fingerprint=str(data["fingerprint"]),
        )  # fmt: skip
        return _checked(name, found)
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"{data!r} does not declare a reward: {error!r}") from error


def _checked(name: str, declared: Declaration) -> Declaration:
    low, high = declared.range
    is_known = set(declared.inputs) <= set(INPUTS) and declared.inputs
    if not is_known or declared.scope not in ("sample", "group") or not low < high:
        raise ValueError(
            f"{name!r} declares inputs {declared.inputs}, scope {declared.scope!r} and range "
            f"({low}, {high}); expected some of {', '.join(INPUTS)}, 'sample' or 'group', and "
            "(lowest, highest)"
        )
    if declared.kind not in ("reward", "judge"):
        raise ValueError(f"{name!r} is a {declared.kind!r}; expected 'reward' or 'judge'")
    return declared


@dataclass(frozen=True)
class Served:
    """A reward or judge under the name by which clients ask for it."""

    name: str
    reward: Any
    declaration: Declaration


def check_request(declared: Declaration, request: Request) -> None:
    """Raises WireError unless a request holds exactly what the reward reads."""
    given = {name for name in ("prompts", "metadata") if getattr(request, name) is not None}
    given |= set(request.images)
    wanted = set(declared.inputs)
    if declared.kind == "judge":
        wanted = (wanted - {"images"}) | {"first", "second"}
    if given != wanted:
        raise WireError(
            f"{declared.kind} {request.reward!r} reads {', '.join(sorted(wanted))}; got "
            f"{', '.join(sorted(given)) or 'nothing'}"
        )


@torch.no_grad()
def call(served: Served, request: Request) -> Values:
    """The scores and their components, or probabilities that the first image wins.

    Returns:
        "score" and the names of the components -> float32 [B] on the CPU.

    Raises:
        RewardFailed: it raised, or returned something else than one float per sample.
    """
    rows: Mapping[str, Any] = {"prompts": request.prompts, "metadata": request.metadata}
    try:
        if served.declaration.kind == "judge":
            both = {name: list(value or ()) for name, value in rows.items()}
            output = served.reward.compare(**request.images, **both)
        else:
            given = {name: list(value) for name, value in rows.items() if value is not None}
            output = served.reward.score(**request.images, **given)
    except RewardFailed:  # of a process of its own, which has worded it
        raise
    except (Exception, SystemExit) as error:  # a reward that calls sys.exit ends only its request
        reason = f"{type(error).__name__}: {error}"
        raise RewardFailed(f"reward {served.name!r} raised {reason}") from error
    parts = output if isinstance(output, Mapping) else {SCORE: output}
    if SCORE not in parts:
        raise RewardFailed(
            f"reward {served.name!r} must call what is trained on {SCORE!r}, got a mapping of "
            f"{', '.join(map(repr, parts)) or 'nothing'}"
        )
    return {name: _floats(served.name, name, each, len(request)) for name, each in parts.items()}


def _floats(reward: str, name: Any, values: Any, num: int) -> Tensor:
    """One tensor that a reward returned, as float32 [num] on the CPU."""
    what = ""
    if name != SCORE:
        what = f" as its component {name!r}"
        try:
            check_component(name)
        except WireError as error:
            raise RewardFailed(f"reward {reward!r}: {error}") from error
    if not isinstance(values, Tensor) or values.shape != (num,) or not values.is_floating_point():
        got = type(values).__name__
        if isinstance(values, Tensor):
            got = f"{values.dtype} {list(values.shape)}"
        raise RewardFailed(f"reward {reward!r} must return a float tensor [{num}]{what}, got {got}")
    return values.detach().to("cpu", torch.float32)
