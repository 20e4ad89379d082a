"""Prompt embeddings, computed once: a table of named tensors with one row per distinct prompt.

With a folder the table is a memory-mapped file, so a large prompt set costs disk, not memory, and
a resumed run or another process reads it instead of encoding again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowrl.errors import DataError

_BATCH = 64
_COMPLETE = "complete.json"  # written last: a table without it is not read


class PromptTable:
    """Rows of conditioning by prompt text.

    Args:
        encode: list of prompts -> named tensors [P, ...] of fixed shape per prompt.
        prompts: every prompt that will be asked for; repeats are stored once.
        folder: where the table is kept; None = in memory.
        fingerprint: what the embeddings depend on beside the prompts (model, text length).
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], dict[str, Tensor]],
        prompts: Sequence[str],
        *,
        folder: Path | None,
        fingerprint: str,
    ) -> None:
        distinct = list(dict.fromkeys(prompts))
        self._row = {prompt: row for row, prompt in enumerate(distinct)}
        key = hashlib.sha256("\0".join([fingerprint, *distinct]).encode()).hexdigest()[:16]
        self._folder = None if folder is None else folder / key
        shapes = self._stored_shapes()
        if shapes is not None:
            self._tensors = {
                name: self._mapped(name, shape, getattr(torch, dtype), writable=False)
                for name, (shape, dtype) in shapes.items()
            }
            return
        self._tensors = {}
        for start in range(0, len(distinct), _BATCH):
            part = encode(distinct[start : start + _BATCH])
            for name, rows in part.items():
                if name not in self._tensors:
                    shape = (len(distinct), *rows.shape[1:])
                    self._tensors[name] = self._allocate(name, shape, rows.dtype)
                self._tensors[name][start : start + len(rows)] = rows.cpu()
        if self._folder is not None:
            shapes = {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in self._tensors.items()}
            unfinished = self._folder / "unfinished.json"
            unfinished.write_text(json.dumps(shapes))
            unfinished.replace(self._folder / _COMPLETE)

    def rows(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Named tensors [len(prompts), ...] on `device`.

        Raises:
            DataError: a prompt that the table was not made for.
        """
        for prompt in prompts:
            if prompt not in self._row:
                raise DataError(
                    f"the prompt {prompt!r} is not among the {len(self._row)} that were encoded; "
                    "give precompute all prompts before the first rollout or sample"
                )
        index = torch.tensor([self._row[prompt] for prompt in prompts])
        return {name: table[index].to(device) for name, table in self._tensors.items()}

    def _stored_shapes(self) -> dict[str, tuple[tuple[int, ...], str]] | None:
        """Shapes of the complete table on disk; None if there is none, or a half-written one."""
        if self._folder is None or not (self._folder / _COMPLETE).exists():
            return None
        stored = json.loads((self._folder / _COMPLETE).read_text())
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in stored.items()}

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled, in memory or in a new file."""
        if self._folder is None:
            return torch.empty(shape, dtype=dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Real bytes, not a hole: on a full disk a write raises OSError here, where a store into a
        # mapped hole would kill the process.
        zeros = bytes(math.prod(shape[1:]) * dtype.itemsize)
        with (self._folder / f"{name}.bin").open("wb") as file:
            file.writelines(zeros for _ in range(shape[0]))
        return self._mapped(name, shape, dtype, writable=True)

    def _mapped(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, writable: bool
    ) -> Tensor:
        """The tensor in an existing file."""
        assert self._folder is not None
        path = str(self._folder / f"{name}.bin")
        flat = torch.from_file(path, shared=writable, size=math.prod(shape), dtype=dtype)
        return flat.reshape(shape)
