"""Requests joined for one call, and cut into several; what was scored of them likewise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rewards.serving.wire import Request

# "score" and the names of its components -> float32 [B] each.
Values = dict[str, Tensor]


def join(requests: Sequence[Request]) -> Request:
    """One request with the samples of all, in order; they agree in size and in what is given."""
    first = requests[0]
    if len(requests) == 1:
        return first
    texts, rows = (
        None if getattr(first, name) is None
        else tuple(row for request in requests for row in getattr(request, name))
        for name in ("prompts", "metadata")
    )  # fmt: skip
    return Request(
        reward=first.reward,
        request_id=first.request_id,
        sample_ids=tuple(str(index) for index in range(sum(map(len, requests)))),
        images={
            name: torch.cat([request.images[name] for request in requests]) for name in first.images
        },
        prompts=texts,
        metadata=rows,
    )


def cut(request: Request, size: int) -> list[Request]:
    """The request in pieces of at most `size` samples, in order."""
    if len(request) <= size:
        return [request]
    return [_part(request, slice(start, start + size)) for start in range(0, len(request), size)]


def _part(request: Request, part: slice) -> Request:
    return replace(
        request,
        sample_ids=request.sample_ids[part],
        images={name: images[part] for name, images in request.images.items()},
        prompts=None if request.prompts is None else request.prompts[part],
        metadata=None if request.metadata is None else request.metadata[part],
    )


def join_values(parts: Sequence[Values]) -> Values:
    """What was scored of several parts, in order; a component that a part lacks is NaN there."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.cat(
            [
                part[name] if name in part else torch.full_like(part["score"], torch.nan)
                for part in parts
            ]
        )
        for name in names
    }


def cut_values(values: Values, sizes: Sequence[int]) -> list[Values]:
    """What was scored in parts of these sizes, in order."""
    parts = {name: torch.split(each, list(sizes)) for name, each in values.items()}
    return [{name: each[i] for name, each in parts.items()} for i in range(len(sizes))]
