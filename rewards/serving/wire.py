"""Inputs of a reward, and its scores, as bytes: a safetensors body with JSON in its metadata.

Images travel as float32, so that a served reward scores the very bits that it would score in
process, or as 8 bit PNG, a fraction of the size. The parser believes nothing: whatever is not
exactly what it expects is one `WireError` with the reason. NaN and infinities survive, in images as
in scores and their components. Reading order: `Request`, `encode_request`, `decode_request`,
`Answer`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save
from torch import Tensor

from rewards.base import Metadata, check_images
from rewards.serving import png

WIRE = 1  # the format's version; both sides must speak the same
MEDIA_TYPE = "application/x-safetensors"
ENCODINGS = ("tensor", "png")
_KEY = "flowrl"  # of the JSON in the safetensors metadata
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_SCORES, _COMPONENT = "scores", "component/"  # names of an answer's tensors; the latter begins one
_MAX_DEPTH = 32  # of nested metadata
_HALVES = (torch.float32, torch.float16, torch.bfloat16)  # exact in float32

_REQUEST = ("wire", "reward", "request_id", "sample_ids", "encoding", "size", "prompts", "metadata")
_ANSWER = ("wire", "reward", "request_id", "sample_ids", "fingerprint")


class WireError(ValueError):
    """Raised for bytes, or values to be sent, that are not in the format; says what is wrong."""


@dataclass(frozen=True)
class Limits:
    """What a request may hold; the size of its body is bounded before it is parsed.

    Attributes:
        max_samples: of one request.
        max_pixels: of all images of a request, since a small PNG may unpack to a huge image.
    """

    max_samples: int = 4096
    max_pixels: int = 2**26


@dataclass(frozen=True)
class Request:
    """What is to be scored.

    Attributes:
        reward: the served name.
        request_id: the same when a request is sent again; 1 to 64 of A-Z a-z 0-9 _ -.
        sample_ids: B different names, in the order of the samples.
        images: float32 [B, 3, H, W] each: {"images"} for a reward, {"first", "second"} for a judge
            of pairs, none for what reads no images.
        prompts: B texts; None = not given.
        metadata: B mappings of JSON's values; None = not given.
    """

    reward: str
    request_id: str
    sample_ids: tuple[str, ...]
    images: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: tuple[str, ...] | None = None
    metadata: tuple[Metadata, ...] | None = None

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.sample_ids)

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of the images, None without any."""
        for images in self.images.values():
            return int(images.shape[2]), int(images.shape[3])
        return None


@dataclass(frozen=True)
class Answer:
    """The scores of a request.

    Attributes:
        reward: as in the request.
        request_id: as in the request.
        sample_ids: as in the request, in its order.
        fingerprint: of the reward that scored: its name, arguments and the server's version.
        scores: float32 [B]; NaN: not to be scored.
        components: of the scores, name -> float32 [B]; see `check_component`.
    """

    reward: str
    request_id: str
    sample_ids: tuple[str, ...]
    fingerprint: str
    scores: Tensor
    components: Mapping[str, Tensor] = field(default_factory=dict)


def encode_request(request: Request, *, encoding: str = "tensor") -> bytes:
    """The body of a request.

    Args:
        request: what is to be scored; images of half precision become float32, which is exact.
        encoding: of the images: "tensor", bit by bit, or "png", at the nearest of 256 levels; an
            image that is not finite arrives as NaN.

    Raises:
        WireError: images of another shape or dtype, metadata that JSON cannot say.
    """
    if encoding not in ENCODINGS:
        raise WireError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    tensors: dict[str, Tensor] = {}
    for name, images in request.images.items():
        _check_sendable(images, request, name)
        # Safetensors refuses tensors that share memory, as an image compared with itself does.
        batch = images.detach().to("cpu", torch.float32, copy=bool(tensors)).contiguous()
        tensors |= {name: batch} if encoding == "tensor" else _pngs(name, batch)
    _check_json(request.metadata, "metadata", 0)
    header = {
        "wire": WIRE,
        "reward": request.reward,
        "request_id": request.request_id,
        "sample_ids": request.sample_ids,
        "encoding": encoding,
        "size": request.size,
        "prompts": request.prompts,
        "metadata": request.metadata,
    }
    return save(tensors, {_KEY: json.dumps(header, default=dict)})


def decode_request(body: bytes, limits: Limits = Limits()) -> Request:
    """The request in a body.

    Raises:
        WireError: whatever is not as `encode_request` writes it, or exceeds a limit.
    """
    header, tensors = _unpack(body, _REQUEST)
    names = _names(header, limits.max_samples)
    num = len(names)
    prompts = _rows(header, "prompts", num, str)
    metadata = _rows(header, "metadata", num, dict)
    _check_json(metadata, "metadata", 0)
    if header["encoding"] not in ENCODINGS:
        raise WireError(
            f"encoding must be one of {', '.join(ENCODINGS)}; {_got(header['encoding'])}"
        )
    size = _size(header["size"], num, limits)
    given = {name.partition(".")[0] for name in tensors}
    if given not in (set(), {"images"}, {"first", "second"}):
        raise WireError(f"expected images, or first and second, or none; got {_listed(given)}")
    if bool(given) != (size is not None):
        raise WireError(f"size must be given with images and only then; {_got(header['size'])}")
    images = {}
    for name in sorted(given):
        assert size is not None
        decode = _from_tensor if header["encoding"] == "tensor" else _from_pngs
        images[name] = decode(name, tensors, (num, 3, *size))
    if tensors:
        raise WireError(f"there are {_listed(tensors)} left over; remove them")
    return Request(header["reward"], header["request_id"], names, images, prompts, metadata)


def encode_answer(answer: Answer) -> bytes:
    """The body of an answer; components are sent as float32, too.

    Raises:
        WireError: a component's name cannot be sent.
    """
    header = {
        "wire": WIRE,
        "reward": answer.reward,
        "request_id": answer.request_id,
        "sample_ids": answer.sample_ids,
        "fingerprint": answer.fingerprint,
    }
    tensors = {_SCORES: answer.scores}
    for name, values in answer.components.items():
        check_component(name)
        tensors[_COMPONENT + name] = values
    # Copies: safetensors refuses tensors that share memory, as a score does that is its component.
    tensors = {k: v.detach().to("cpu", torch.float32, copy=True) for k, v in tensors.items()}
    return save(tensors, {_KEY: json.dumps(header)})


def decode_answer(body: bytes, request: Request) -> Answer:
    """The answer in a body.

    Raises:
        WireError: not as `encode_answer` writes it, or not the answer to `request`: another
            reward or id, other samples, another order or number, of scores or of a component.
    """
    header, tensors = _unpack(body, _ANSWER)
    for key, asked in (("reward", request.reward), ("request_id", request.request_id)):
        if header[key] != asked:
            raise WireError(f"{key} must be that of the request, {asked!r}; {_got(header[key])}")
    names = _names(header, len(request))
    if names != request.sample_ids:
        raise WireError(
            f"sample_ids must be those of the request, in its order; {_got(list(names))}"
        )
    if not isinstance(header["fingerprint"], str):
        raise WireError(f"fingerprint must be a text; {_got(header['fingerprint'])}")
    scores = _from_tensor(_SCORES, tensors, (len(names),))
    components = {}
    for key in sorted(tensors):
        if not key.startswith(_COMPONENT):
            raise WireError(f"expected scores and components alone; got {_listed([key])}")
        name = key.removeprefix(_COMPONENT)
        check_component(name)
        components[name] = _from_tensor(key, tensors, (len(names),))
    return Answer(
        header["reward"], header["request_id"], names, header["fingerprint"], scores, components
    )


def check_component(name: Any) -> None:
    """Raises WireError unless a score's component can have this name.

    A text of 1 to 64 printable characters without "/", which would end it in a metric's key, and
    not "score".
    """
    is_text = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 64
    if not is_text or "/" in name or name == "score":
        raise WireError(
            "a component's name must be 1 to 64 printable characters without '/', other than "
            f"'score'; {_got(name)}"
        )


# --------------------------------------------------------------------------- the container

_Raw = dict[str, Any]  # dtype, shape and data of a tensor


def _unpack(body: bytes, keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, _Raw]]:
    """The JSON header, with exactly these keys and a sound version, reward and id; the tensors."""
    try:
        tensors = dict(deserialize(body))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise WireError(f"the body is not safetensors: {error}") from error
    length = int.from_bytes(body[:8], "little")  # sound, since the whole has been parsed
    texts = _parse(body[8 : 8 + length]).get("__metadata__") or {}
    if set(texts) != {_KEY}:
        raise WireError(f"the metadata must hold one entry, {_KEY!r}; got {_listed(texts)}")
    header = _parse(texts[_KEY])
    if not isinstance(header, dict):
        raise WireError(f"the metadata's {_KEY!r} must be an object; {_got(header)}")
    if type(header.get("wire")) is not int or header["wire"] != WIRE:
        raise WireError(
            f"this side speaks version {WIRE} of the format; {_got(header.get('wire'))}; run the "
            "same release of flowrl on both sides"
        )
    if set(header) != set(keys):
        raise WireError(f"expected the keys {', '.join(keys)}; got {_listed(header)}")
    if not isinstance(header["reward"], str):
        raise WireError(f"reward must be a text; {_got(header['reward'])}")
    if not _is_name(header["request_id"]):
        raise WireError(
            f"request_id must be 1 to 64 of A-Z a-z 0-9 _ -; {_got(header['request_id'])}"
        )
    return header, tensors


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the metadata's {_KEY!r} is not JSON: {error}") from error


def _names(header: Mapping[str, Any], max_samples: int) -> tuple[str, ...]:
    """The ids of the samples."""
    names = header["sample_ids"]
    if not isinstance(names, list) or not names:
        raise WireError(f"sample_ids must be a list with an entry per sample; {_got(names)}")
    if len(names) > max_samples:
        raise WireError(f"at most {max_samples} samples fit here, got {len(names)}; send fewer")
    for name in names:
        if not _is_name(name):
            raise WireError(f"a sample's id must be 1 to 64 of A-Z a-z 0-9 _ -; {_got(name)}")
    if len(set(names)) != len(names):
        raise WireError("sample_ids must differ from each other")
    return tuple(names)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _rows(header: Mapping[str, Any], key: str, num: int, kind: type) -> tuple[Any, ...] | None:
    """A list of `num` values of one type, or None."""
    rows = header[key]
    if rows is None:
        return None
    what = "texts" if kind is str else "objects"
    if not isinstance(rows, list) or not all(isinstance(row, kind) for row in rows):
        raise WireError(f"{key} must be null or a list of {what}; {_got(rows)}")
    if len(rows) != num:
        raise WireError(f"{key} must be {num}, one per sample, got {len(rows)}")
    return tuple(rows)


def _size(value: Any, num: int, limits: Limits) -> tuple[int, int] | None:
    if value is None:
        return None
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(type(side) is int and 0 < side < 2**16 for side in value):
        raise WireError(f"size must be null or [height, width] in pixels; {_got(value)}")
    height, width = value
    if num * height * width > limits.max_pixels:
        raise WireError(
            f"{num} images of {height} x {width} exceed {limits.max_pixels} pixels; send fewer"
        )
    return height, width


def _check_json(value: Any, where: str, depth: int) -> None:
    """Raises unless the value is JSON's: texts as keys, finite numbers, bounded depth."""
    if depth > _MAX_DEPTH:
        raise WireError(f"{where} is nested deeper than {_MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key, below in value.items():
            if not isinstance(key, str):
                raise WireError(f"{where} has the key {key!r}; keys must be texts")
            _check_json(below, f"{where}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            _check_json(below, f"{where}[{index}]", depth + 1)
    elif value is not None and type(value) not in (str, int, bool, float):
        raise WireError(f"{where} is {type(value).__name__}; only JSON's values can be sent")
    elif isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{where} is {value}, which JSON cannot say; leave it out")


def _got(value: Any) -> str:
    text = repr(value)
    return f"got {text if len(text) <= 60 else text[:57] + '...'}"


def _listed(names: Any) -> str:
    return ", ".join(sorted(map(repr, names))[:8]) or "nothing"


# --------------------------------------------------------------------------- images


def _check_sendable(images: Tensor, request: Request, name: str) -> None:
    try:
        check_images(images)
    except ValueError as error:
        raise WireError(f"{name}: {error}") from error
    if len(images) != len(request) or images.shape[2:] != request.size:
        raise WireError(
            f"{name} must be [{len(request)}, 3, H, W] with the H and W of all images, got "
            f"{list(images.shape)}"
        )
    if images.dtype not in _HALVES:
        raise WireError(f"{name} must be float32 or half precision, got {images.dtype}")


def _from_tensor(name: str, tensors: dict[str, _Raw], shape: tuple[int, ...]) -> Tensor:
    """Takes a float32 tensor of this shape out of `tensors`."""
    raw = tensors.pop(name, None)
    if raw is None or raw["dtype"] != "F32" or tuple(raw["shape"]) != shape:
        what = "nothing" if raw is None else f"{raw['dtype']} {raw['shape']}"
        raise WireError(f"{name} must be F32 {list(shape)}, got {what}")
    return torch.frombuffer(raw["data"], dtype=torch.float32).reshape(shape)


def _pngs(name: str, images: Tensor) -> dict[str, Tensor]:
    """A tensor of bytes per image, empty where it is not finite."""
    tensors = {}
    for index, image in enumerate(images):
        data = bytearray(png.pack(image))
        empty = torch.empty(0, dtype=torch.uint8)
        tensors[f"{name}.{index}"] = torch.frombuffer(data, dtype=torch.uint8) if data else empty
    return tensors


def _from_pngs(name: str, tensors: dict[str, _Raw], shape: tuple[int, ...]) -> Tensor:
    """Takes the tensors of bytes of one batch out of `tensors` and unpacks them."""
    images = torch.full(shape, torch.nan)
    for index in range(shape[0]):
        key = f"{name}.{index}"
        raw = tensors.pop(key, None)
        if raw is None or raw["dtype"] != "U8" or len(raw["shape"]) != 1:
            what = "nothing" if raw is None else f"{raw['dtype']} {raw['shape']}"
            raise WireError(f"{key} must be the bytes of a PNG, U8 [n], got {what}")
        if raw["data"]:
            try:
                images[index] = png.unpack(bytes(raw["data"]), shape[2:])
            except ValueError as error:
                raise WireError(f"{key} {error}") from error
    return images
