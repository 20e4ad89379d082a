"""The format of the reward server: bit by bit there and back, and a parser that nothing upsets.

Kills, among others: scores or images through decimal text or float16; NaN that becomes 0; prompts
joined to the wrong sample; an answer accepted although its samples are in another order; a small
PNG that unpacks to gigabytes; a parser that raises KeyError or RecursionError.
"""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from rewards.serving.wire import (
    Answer,
    Limits,
    Request,
    WireError,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from tests.reward_server.kit import ask, flat

few = settings(max_examples=60, suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=6,
)  # fmt: skip


def bits(values: Tensor) -> list[int]:
    return values.contiguous().view(torch.int32).flatten().tolist()


def any_floats(shape: tuple[int, ...], seed: int) -> Tensor:
    """Every kind of float32: random bits hold NaN of all payloads, infinities and denormals."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    special = torch.tensor([0x7F800000, -0x800000, 0x7FC00001, -(2**31), 1, 0])  # inf, NaN, -0, ...
    pick = torch.randint(0, 4, shape, generator=generator)
    chosen = special[torch.randint(0, len(special), shape, generator=generator)]
    return torch.where(pick == 0, chosen, raw).to(torch.int32).view(torch.float32)


@few
@given(st.data(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_a_request_arrives_bit_by_bit(
    data: st.DataObject, num: int, height: int, width: int, seed: int
) -> None:
    names = data.draw(st.sampled_from([(), ("images",), ("first", "second")]))
    request = Request(
        reward=data.draw(st.text()),
        request_id="a-B_9",
        sample_ids=tuple(f"s{i}" for i in range(num)),
        images={
            name: any_floats((num, 3, height, width), seed + i) for i, name in enumerate(names)
        },
        prompts=data.draw(st.none() | st.tuples(*[st.text()] * num)),
        metadata=data.draw(
            st.none() | st.tuples(*[st.dictionaries(st.text(), json_values, max_size=3)] * num)
        ),
    )
    arrived = decode_request(encode_request(request))
    assert replace(arrived, images={}) == replace(request, images={})
    assert {name: bits(images) for name, images in arrived.images.items()} == {
        name: bits(images) for name, images in request.images.items()
    }
    assert all(arrived.images[name].shape == request.images[name].shape for name in names)


names = st.text(min_size=1, max_size=64).filter(
    lambda name: name.isprintable() and "/" not in name and name != "score"
)


@few
@given(st.integers(1, 6), st.integers(0, 2**31), st.sets(names, max_size=3))
def test_scores_and_components_come_back_bit_by_bit_nan_included(
    num: int, seed: int, parts: set[str]
) -> None:
    request = ask([0.0] * num)
    scores = any_floats((num,), seed)
    components = {name: any_floats((num,), seed + 1 + i) for i, name in enumerate(sorted(parts))}
    body = encode_answer(Answer("bright", "r", request.sample_ids, "f", scores, components))
    arrived = decode_answer(body, request)
    assert bits(arrived.scores) == bits(scores)
    assert {name: bits(values) for name, values in arrived.components.items()} == {
        name: bits(values) for name, values in components.items()
    }
    assert (arrived.reward, arrived.request_id, arrived.fingerprint) == ("bright", "r", "f")


def test_half_precision_is_exact_and_double_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        images = any_floats((2, 3, 2, 2), 0).to(dtype)
        arrived = decode_request(encode_request(ask([0, 0], images={"images": images})))
        torch.testing.assert_close(
            arrived.images["images"].to(dtype), images, rtol=0, atol=0, equal_nan=True
        )
    with pytest.raises(WireError, match=r"float32 or half precision, got torch.float64"):
        encode_request(ask([0], images={"images": flat([0]).double()}))


def test_png_carries_the_nearest_of_256_levels_and_a_broken_image_as_nan() -> None:
    levels = torch.randint(0, 256, (3, 3, 5, 7), generator=torch.Generator().manual_seed(0))
    images = levels / 255
    images[1, 0, 2, 3] = torch.inf
    given_ = ask([0, 0, 0], images={"images": images})
    body = encode_request(given_, encoding="png")
    arrived = decode_request(body).images["images"]
    assert bits(arrived[[0, 2]]) == bits((levels / 255)[[0, 2]])
    assert arrived[1].isnan().all()
    noise = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    near = decode_request(encode_request(ask([0], images={"images": noise}), encoding="png"))
    assert (near.images["images"] - noise).abs().max() <= 0.5 / 255 + 1e-6


def test_an_image_can_be_compared_with_itself() -> None:
    images = flat([0.1, 0.2])
    arrived = decode_request(
        encode_request(ask([0, 0], images={"first": images, "second": images}))
    )
    assert bits(arrived.images["second"]) == bits(arrived.images["first"]) == bits(images)


# --------------------------------------------------------------------------- the parser

VALID = encode_request(ask([0.1, 0.2], prompts=("p", "p"), metadata=({"a": [1]}, {})))
PNG = encode_request(ask([0.1, 0.2], prompts=("p", "p")), encoding="png")


def header_of(body: bytes) -> dict[str, Any]:
    length = int.from_bytes(body[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["flowrl"])
    return header


def rebuilt(body: bytes, tensors: dict[str, Tensor] | None = None, **changed: Any) -> bytes:
    """A body with keys of its header, or its tensors, replaced."""
    header = header_of(body) | changed
    return save(load(body) if tensors is None else tensors, {"flowrl": json.dumps(header)})


def parse(body: bytes) -> None:
    """Either a request or a WireError with a reason; anything else fails the test."""
    try:
        assert isinstance(decode_request(body), Request)
    except WireError as error:
        assert str(error)


@few
@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_reason(body: bytes) -> None:
    parse(body)
    parse(struct.pack("<Q", len(body)) + body)


@few
@given(st.sampled_from([VALID, PNG]), st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4))))
def test_a_damaged_body_is_a_request_or_a_reason(
    body: bytes, wounds: list[tuple[float, bytes]]
) -> None:
    damaged = bytearray(body)
    for place, data in wounds:
        start = int(place * len(damaged))
        damaged[start : start + max(1, len(data) - 1)] = data
    parse(bytes(damaged))


@few
@given(st.sampled_from([VALID, PNG]), st.sampled_from(sorted(header_of(VALID))), json_values)
def test_any_value_of_any_key_is_a_request_or_a_reason(body: bytes, key: str, value: Any) -> None:
    parse(rebuilt(body, **{key: value}))


@pytest.mark.parametrize("cut", [0, 7, 8, 60, -1])
def test_a_body_that_was_cut_is_refused(cut: int) -> None:
    with pytest.raises(WireError, match="not safetensors"):
        decode_request(VALID[:cut])
    with pytest.raises(WireError, match="not safetensors"):
        decode_request(VALID + b"x")


def png_bomb() -> Tensor:
    """A well-formed head of a PNG of 60000 x 60000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return torch.tensor(list(data), dtype=torch.uint8)


def png_of(mode: str) -> Tensor:
    buffer = BytesIO()
    Image.new(mode, (4, 4)).save(buffer, format="PNG")
    return torch.tensor(list(buffer.getvalue()), dtype=torch.uint8)


def gif() -> Tensor:
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="GIF")
    return torch.tensor(list(buffer.getvalue()), dtype=torch.uint8)


good = flat([0.1, 0.2])
REFUSED: list[tuple[bytes, str]] = [
    (pickle.dumps({"images": [1]}), "not safetensors"),
    (save({"images": good}), r"must hold one entry, 'flowrl'; got nothing"),
    (save({"images": good}, {"flowrl": "{}", "more": ""}), r"got 'flowrl', 'more'"),
    (save({"images": good}, {"flowrl": "{"}), "is not JSON"),
    (save({"images": good}, {"flowrl": "[" * 100_000}), "is not JSON"),
    (save({"images": good}, {"flowrl": "[]"}), "must be an object; got \\[\\]"),
    (rebuilt(VALID, wire=2), "speaks version 1 of the format; got 2; run the same release"),
    (rebuilt(VALID, wire=True), "speaks version 1"),
    (rebuilt(VALID, extra=1), "expected the keys wire, reward"),
    (rebuilt(VALID, reward=3), "reward must be a text; got 3"),
    (rebuilt(VALID, request_id="a b"), "request_id must be 1 to 64"),
    (rebuilt(VALID, request_id="x" * 65), "request_id must be 1 to 64"),
    (rebuilt(VALID, request_id="é"), "request_id must be 1 to 64"),
    (rebuilt(VALID, sample_ids=[]), "sample_ids must be a list with an entry per sample"),
    (rebuilt(VALID, sample_ids=["a", "a"]), "must differ"),
    (rebuilt(VALID, sample_ids=["a", 1]), "a sample's id must be"),
    (rebuilt(VALID, sample_ids=[f"s{i}" for i in range(99)]), "at most 8 samples fit here, got 99"),
    (rebuilt(VALID, encoding="jpeg"), "encoding must be one of"),
    (rebuilt(VALID, encoding=["tensor"]), "encoding must be one of"),
    (rebuilt(VALID, size=None), "size must be given with images"),
    (rebuilt(VALID, size=[4, 4.0]), "size must be null or"),
    (rebuilt(VALID, size=[4, True]), "size must be null or"),
    (rebuilt(VALID, size=[0, 4]), "size must be null or"),
    (rebuilt(VALID, size=[60_000, 60_000]), "2 images of 60000 x 60000 exceed 1000 pixels"),
    (rebuilt(VALID, size=[5, 4]), r"images must be F32 \[2, 3, 5, 4\], got F32 \[2, 3, 4, 4\]"),
    (rebuilt(VALID, prompts=["p"]), "prompts must be 2, one per sample, got 1"),
    (rebuilt(VALID, prompts="pp"), "prompts must be null or a list of texts"),
    (rebuilt(VALID, prompts=["p", None]), "prompts must be null or a list of texts"),
    (rebuilt(VALID, metadata=[{}, []]), "metadata must be null or a list of objects"),
    (rebuilt(VALID, metadata=[{}, {"a": float("nan")}]), r"metadata\[1\].a is nan"),
    (rebuilt(VALID, {"images": good.double()}), r"must be F32 \[2, 3, 4, 4\], got F64"),
    (rebuilt(VALID, {"images": good[:1]}), r"got F32 \[1, 3, 4, 4\]"),
    (rebuilt(VALID, {"first": good}), "expected images, or first and second, or none"),
    (rebuilt(VALID, {"first": good, "second": good[:1].clone()}), "second must be F32"),
    (rebuilt(VALID, {"images": good, "images.7": good.clone()}), "there are 'images.7' left over"),
    (rebuilt(VALID, {}), "size must be given with images and only then"),
    (rebuilt(PNG, {"images": good}), r"images.0 must be the bytes of a PNG, U8 \[n\], got nothing"),
    (rebuilt(PNG, {"images.0": png_of("RGB"), "images.1": png_of("L")}), "images.1 must be RGB"),
    (rebuilt(PNG, {"images.0": gif(), "images.1": gif()}), "images.0 is not a PNG"),
    (rebuilt(PNG, {"images.0": png_of("RGB")[:45]}), "images.0 is not a PNG"),
    (rebuilt(PNG, {"images.0": png_bomb()}), "images.0 (must be RGB of 4 x 4|is not a PNG)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_no_request_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode_request(body, Limits(max_samples=8, max_pixels=1000))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"a": {1: 2}}, r"metadata\[0\].a has the key 1; keys must be texts"),
        ({"a": [0.0, float("inf")]}, r"metadata\[0\].a\[1\] is inf"),
        ({"a": torch.tensor(1)}, r"metadata\[0\].a is Tensor; only JSON's values"),
    ],
)
def test_metadata_that_would_arrive_changed_is_refused_before_it_is_sent(
    metadata: dict[str, Any], reason: str
) -> None:
    with pytest.raises(WireError, match=reason):
        encode_request(ask([0.5], metadata=(metadata,)))
    nested: dict[str, Any] = {}
    for _ in range(40):
        nested = {"a": nested}
    with pytest.raises(WireError, match="nested deeper"):
        encode_request(ask([0.5], metadata=(nested,)))


@pytest.mark.parametrize(
    ("images", "encoding", "reason"),
    [
        (flat([0.5, 0.5]), "tensor", r"images must be \[1, 3, H, W\]"),
        (flat([0.5])[0], "tensor", r"expected float images \[B, 3, H, W\]"),
        (flat([0.5]), "jpeg", "encoding must be one of tensor, png, got 'jpeg'"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_they_are_sent(
    images: Tensor, encoding: str, reason: str
) -> None:
    with pytest.raises(WireError, match=reason):
        encode_request(ask([0.5], images={"images": images}), encoding=encoding)


# --------------------------------------------------------------------------- answers


def answer(**changed: Any) -> bytes:
    fields: dict[str, Any] = {
        "reward": "bright", "request_id": "r", "sample_ids": ("s0", "s1"), "fingerprint": "f",
        "scores": torch.tensor([0.25, float("nan")]),
    }  # fmt: skip
    return encode_answer(Answer(**(fields | changed)))


WRONG_ANSWERS: list[tuple[bytes, str]] = [
    (answer(request_id="q"), "request_id must be that of the request, 'r'; got 'q'"),
    (answer(reward="dark"), "reward must be that of the request"),
    (answer(sample_ids=("s1", "s0")), "sample_ids must be those of the request, in its order"),
    (answer(sample_ids=("s0",)), "sample_ids must be those of the request, in its order"),
    (answer(sample_ids=("s0", "s1", "s2")), "at most 2 samples fit here"),
    (answer(scores=torch.zeros(1)), r"scores must be F32 \[2\], got F32 \[1\]"),
    (answer(scores=torch.zeros(2, 1)), r"scores must be F32 \[2\]"),
    (rebuilt(answer(), {"scores": torch.zeros(2).double()}), "got F64"),
    (rebuilt(answer(), {"scores": torch.zeros(2), "x": torch.zeros(2)}), "alone; got 'x'"),
    (rebuilt(answer(), {"x": torch.zeros(2)}), r"scores must be F32 \[2\], got nothing"),
    (answer(components={"a": torch.zeros(1)}), r"component/a must be F32 \[2\], got F32 \[1\]"),
    (answer(components={"a": torch.zeros(2, 1)}), r"component/a must be F32 \[2\]"),
    (rebuilt(answer(), {"scores": torch.zeros(2), "component/a": torch.zeros(2).double()}),
     r"component/a must be F32 \[2\], got F64"),
    (rebuilt(answer(), {"scores": torch.zeros(2), "component/": torch.zeros(2)}),
     "a component's name must be .*; got ''"),
    (rebuilt(answer(), {"scores": torch.zeros(2), "component/score": torch.zeros(2)}),
     "other than 'score'; got 'score'"),
    (rebuilt(answer(), {"scores": torch.zeros(2), "component/a/b": torch.zeros(2)}),
     "a component's name must be .*; got 'a/b'"),
    (rebuilt(answer(), fingerprint=None), "fingerprint must be a text"),
    (answer()[:-1], "not safetensors"),
    (b"", "not safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), WRONG_ANSWERS, ids=[why for _, why in WRONG_ANSWERS])
def test_an_answer_to_something_else_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode_answer(body, ask([0.1, 0.2]))
    assert decode_answer(answer(), ask([0.1, 0.2])).scores[0] == 0.25


@pytest.mark.parametrize("name", ["", "a/b", "score", "x" * 65, "a\nb"])
def test_a_component_whose_name_would_not_arrive_is_refused_before_it_is_sent(name: str) -> None:
    with pytest.raises(WireError, match="a component's name must be"):
        answer(components={name: torch.zeros(2)})


def test_an_answer_of_before_there_were_components_is_read() -> None:
    header = {"wire": 1, "reward": "bright", "request_id": "r", "sample_ids": ["s0", "s1"],
              "fingerprint": "f"}  # fmt: skip
    old = save({"scores": torch.tensor([0.5, 0.25])}, {"flowrl": json.dumps(header)})
    arrived = decode_answer(old, ask([0.1, 0.2]))
    assert arrived.scores.tolist() == [0.5, 0.25] and arrived.components == {}
    assert encode_answer(arrived) == old


def test_a_score_can_be_its_own_component() -> None:
    scores = torch.tensor([0.25, float("nan")])
    arrived = decode_answer(answer(scores=scores, components={"a": scores}), ask([0.1, 0.2]))
    assert bits(arrived.components["a"]) == bits(arrived.scores) == bits(scores)
