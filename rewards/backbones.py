"""Pretrained networks for rewards: where they run, where they come from, and one copy of each.

Several rewards look through the same network: one CLIP ViT-L serves `clip_score`, `aesthetic` and
`diversity`. What was loaded is kept under its kind, source, dtype and device for as long as some
reward holds it; that table, `_LOADED`, is the only mutable state of this package. Two rewards share
a network exactly if these agree; equal weights under two names are two networks. Reading order:
`Placement`, `shared`, `pretrained_model`, `load_tensors`, `score_in_batches`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rewards.base import check_counts, check_images, finite_images

T = TypeVar("T")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LOADED: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
_LOCK = RLock()  # a reward server scores in threads; a network must not be loaded twice


@dataclass(frozen=True)
class Placement:
    """Where and in which portions the network of a reward runs.

    Attributes:
        device: such as "cuda:1"; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of the network; scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown dtype, or a batch_size below 1.
    """

    device: str | None
    dtype: str
    batch_size: int

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return _DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device with its index, so that "cuda" and "cuda:0" are the same place."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    @property
    def key(self) -> tuple[str, str]:
        """What of it makes two networks different: dtype and device."""
        return self.dtype, str(self.torch_device)


def shared(key: Hashable, load: Callable[[], T]) -> T:
    """What `load` returns, or what an earlier `load` returned under `key` and is still in use.

    Args:
        key: kind, source, dtype and device; whatever decides what is loaded.
        load: called at most once for all holders of the result.
    """
    with _LOCK:
        found = _LOADED.get(key)
        if found is None:
            found = load()
            _LOADED[key] = found
        return cast(T, found)


def pretrained_model(
    kind: Any, source: str, placement: Placement, *, reward: str, argument: str = "model"
) -> Any:
    """The frozen network of transformers class `kind`, shared.

    Args:
        kind: a class with `from_pretrained`.
        source: Hub id, or a folder in transformers' format.
        placement: dtype and device.
        reward: who asks, for the error.
        argument: the argument of `reward` that `source` came from.

    Raises:
        OSError: it is neither on this machine nor to be had.
    """

    def load() -> Any:
        model = _from_pretrained(kind, source, reward, argument, dtype=placement.torch_dtype)
        return model.eval().requires_grad_(False).to(placement.torch_device)

    return shared((kind.__name__, source, *placement.key), load)


def pretrained_processor(
    kind: Any, source: str, *, reward: str, argument: str = "model", **options: Any
) -> Any:
    """The processor or tokenizer of transformers class `kind`, shared.

    Raises:
        OSError: it is neither on this machine nor to be had.
    """
    key = (kind.__name__, source, *sorted(options.items()))
    return shared(key, lambda: _from_pretrained(kind, source, reward, argument, **options))


def _from_pretrained(kind: Any, source: str, reward: str, argument: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        what = "a Hub id or a folder in transformers' format"
        raise _cannot_be_had(source, reward, argument, what, error) from error


def checkpoint_file(source: str, file: str, *, reward: str, argument: str = "model") -> Path:
    """The path of a checkpoint that is a single file.

    Args:
        source: the file itself, a folder that holds it, or the Hub id of a repository that does.
        file: its name there.
        reward: who asks, for the error.
        argument: the argument of `reward` that `source` came from.

    Raises:
        OSError: it is neither on this machine nor to be had.
    """
    local = Path(source).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        if not (local / file).is_file():
            raise OSError(
                f"{reward}'s {argument} {source!r} is a folder without {file!r}; expected that "
                "file in it, or the path of the file itself"
            )
        return local / file

    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, file))
    except (OSError, ValueError) as error:
        what = f"a Hub id, a folder with {file!r} or the file"
        raise _cannot_be_had(f"{source} {file}", reward, argument, what, error) from error


def _cannot_be_had(
    source: str, reward: str, argument: str, expected: str, error: Exception
) -> OSError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return OSError(
        f"{reward}'s {argument} {source!r} cannot be loaded: {reason[0].rstrip('.')}. "
        f"Expected {expected}. Run `hf download {source}` once where there is a network, or copy "
        f"it here and give its path as the reward's argument {argument!r}"
    )


def load_tensors(path: Path) -> dict[str, Any]:
    """The contents of a .safetensors file, or of a torch file, which is opened for tensors only.

    Raises:
        OSError: a torch file that holds other objects; reading one could run its code.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return cast("dict[str, Any]", load_file(path))
    try:
        return cast("dict[str, Any]", torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise OSError(
            f"{path} holds more than tensors and was not opened, since reading such a pickle can "
            "run code; save its tensors as .safetensors where you trust it, and give that file"
        ) from error


@torch.no_grad()
def score_in_batches(
    forward: Callable[..., Tensor],
    images: Tensor,
    *columns: Sequence[str],
    batch_size: int,
) -> Tensor:
    """What `forward` says of each image, float32 [B, ...] on the images' device.

    Args:
        forward: (images [b, 3, H, W], one list of b strings per column) -> float [b, ...].
        images: float [B, 3, H, W] in [0, 1].
        columns: B strings each, such as the prompts.
        batch_size: the largest b.

    Returns:
        NaN for an image that is not finite; `forward` never sees it. [B] if none is.

    Raises:
        ValueError: images of another shape or kind, or not one prompt per image.
    """
    check_images(images)
    for column in columns:
        check_counts({"images": images, "prompts": column})
    scores = torch.full((len(images),), torch.nan)
    finite = finite_images(images).nonzero().flatten().cpu()
    for start in range(0, len(finite), batch_size):
        index = finite[start : start + batch_size]
        chosen = [[column[i] for i in index.tolist()] for column in columns]
        values = forward(images[index.to(images.device)], *chosen).float().cpu()
        if start == 0:
            scores = torch.full((len(images), *values.shape[1:]), torch.nan)
        scores[index] = values
    return scores.to(images.device)
