"""Noise that belongs to a sample: row i is a function of (seed, ids[i], stream) alone.

The other rows, the batch, the rank, the device and what was drawn before cannot change it, so a
run may be cut up in any way and resumed at any step. Rows come from Philox, a generator that is a
block cipher of a counter: the id and the stream are words of the counter, so rows never overlap.
600 rows of 1024 values take 12 ms on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.errors import ShapeError

INITIAL_STREAM = 0
"""The stream of the starting noise; step i of a sampler draws from stream 1 + i."""


def sample_noise(
    seed: int,
    ids: Tensor,
    shape: Sequence[int],
    *,
    stream: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [n, *shape], a row per id; detached.

    Args:
        seed: of the step, in [0, 2^64), e.g. `PromptBatch.seed`.
        ids: int64 [n], not negative; what the noise belongs to, e.g. `sample_id`. Equal ids give
            equal rows.
        shape: of a row.
        stream: which draw of the id this is: 0 the initial noise, 1 + i the noise of step i.
        device: where the noise goes; it is drawn on the CPU.
        dtype: of the result; it is drawn in float32.

    Raises:
        ShapeError: ids that are not int64 [n] or negative; a negative seed or stream.
    """

    def normal(generator: np.random.Generator, row: np.ndarray[Any, Any]) -> None:
        generator.standard_normal(dtype=np.float32, out=row)

    return _rows(normal, seed, ids, shape, stream).to(device=device, dtype=dtype)


def sample_uniform(
    seed: int,
    ids: Tensor,
    shape: Sequence[int],
    *,
    stream: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in [0, 1), float32 [n, *shape]; otherwise as `sample_noise`.

    A stream is one draw: the uniform and the normal numbers of one (seed, id, stream) are made of
    the same bits.
    """

    def uniform(generator: np.random.Generator, row: np.ndarray[Any, Any]) -> None:
        generator.random(dtype=np.float32, out=row)

    return _rows(uniform, seed, ids, shape, stream).to(device=device)


def _rows(
    fill: Callable[[np.random.Generator, np.ndarray[Any, Any]], None],
    seed: int,
    ids: Tensor,
    shape: Sequence[int],
    stream: int,
) -> Tensor:
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise ShapeError(f"ids must be int64 [n], got {ids.dtype} {tuple(ids.shape)}")
    numbers = ids.tolist()
    if min(seed, stream, *numbers) < 0:
        raise ShapeError(
            f"seed, stream and ids must not be negative, got seed={seed}, stream={stream}, "
            f"lowest id {min(numbers, default=0)}"
        )
    rows = np.empty((len(numbers), *shape), dtype=np.float32)
    for row, number in zip(rows, numbers, strict=True):
        # The lower two words count the blocks of the row: 2^128 of them.
        bits = np.random.Philox(key=[seed, 0], counter=[0, 0, number, stream])
        fill(np.random.Generator(bits), row)
    return torch.from_numpy(rows)
