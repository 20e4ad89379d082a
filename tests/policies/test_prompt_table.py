"""The table of prompt embeddings: the same from memory and from a file, encoded once, never half.

Kills, among others: rows in the order of the table instead of the request; the last, shorter part
of the encoder lost; a table of another model read; a half-written one trusted; a reader that can
change the file; an unknown prompt that comes out as another's row or as a bare KeyError.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowrl.errors import DataError
from flowrl.policies.conditioning import PromptTable

CPU = torch.device("cpu")
TEXTS = [f"prompt {i}" for i in range(150)]  # three parts of the encoder, the last one short


class Encoder:
    """Embeddings that spell the prompt, in three dtypes, and how often each was asked for."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.seen += prompts
        codes = torch.tensor([[len(p), *map(ord, p.ljust(12)[:12])] for p in prompts])
        return {
            "number": codes[:, 0],
            "embeds": codes.reshape(-1, 13, 1).bfloat16() / 7,
            "pooled": codes.float() / 3,
        }


def table(
    folder: Path | None, encode: Encoder, prompts: Sequence[str] = TEXTS, name: str = "model"
) -> PromptTable:
    return PromptTable(encode, prompts, folder=folder, fingerprint=name)


def check(made: PromptTable, asked: Sequence[str]) -> None:
    """The rows are those that the encoder gives, bit by bit."""
    rows, expected = made.rows(asked, CPU), Encoder()(asked)
    assert rows.keys() == expected.keys()
    for name, value in expected.items():
        assert rows[name].dtype == value.dtype and torch.equal(rows[name], value)


ASKED = ["prompt 149", "prompt 3", "prompt 64", "prompt 3", "prompt 0"]


def test_memory_and_file_give_the_encoders_rows(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        check(table(folder, Encoder()), ASKED)
        check(table(folder, Encoder()), TEXTS)


def test_repeats_are_encoded_and_stored_once(tmp_path: Path) -> None:
    encode = Encoder()
    check(table(tmp_path, encode, [*TEXTS, *TEXTS, "prompt 3"]), ASKED)
    assert encode.seen == TEXTS
    (numbers,) = tmp_path.glob("*/number.bin")
    assert numbers.stat().st_size == 150 * 8


def test_a_complete_table_is_read_instead_of_encoded(tmp_path: Path) -> None:
    table(tmp_path, Encoder())
    encode = Encoder()
    check(table(tmp_path, encode), ASKED)
    assert encode.seen == []


def test_another_model_or_other_prompts_are_another_table(tmp_path: Path) -> None:
    table(tmp_path, Encoder())
    for prompts, name in ((TEXTS, "other model"), (TEXTS[:-1], "model"), (TEXTS[::-1], "model")):
        encode = Encoder()
        made = table(tmp_path, encode, prompts, name)
        assert encode.seen == prompts
        check(made, ASKED[1:])
    check(table(tmp_path, Encoder()), ASKED)


def test_a_half_written_table_is_ignored(tmp_path: Path) -> None:
    class Killed(Encoder):
        def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
            if "prompt 149" in prompts:
                raise KeyboardInterrupt
            return super().__call__(prompts)

    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, Killed())
    assert list(tmp_path.glob("*/embeds.bin")) and not list(tmp_path.glob("*/complete.json"))
    encode = Encoder()
    check(table(tmp_path, encode), ASKED)
    assert encode.seen == TEXTS


def test_the_marker_of_a_complete_table_appears_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed while the marker is written: half of its text must not count as a marker.
    write = Path.write_text

    def half(self: Path, text: str, *args: object) -> int:
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", half)
        table(tmp_path, Encoder())
    check(table(tmp_path, Encoder()), ASKED)
    (marker,) = tmp_path.glob("*/complete.json")
    assert json.loads(marker.read_text())["pooled"] == [[150, 13], "float32"]


def test_a_disk_that_takes_no_more_is_an_error_and_can_be_tried_again(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError, match="large"):
            table(tmp_path, Encoder())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check(table(tmp_path, Encoder()), ASKED)


def test_a_reader_cannot_change_the_file(tmp_path: Path) -> None:
    table(tmp_path, Encoder())
    reader = table(tmp_path, Encoder())
    reader.rows(ASKED, CPU)["pooled"].zero_()
    for stored in reader._tensors.values():
        stored.zero_()
    check(table(tmp_path, Encoder()), ASKED)


def test_a_table_whose_file_is_gone_is_no_table_of_zeros(tmp_path: Path) -> None:
    table(tmp_path, Encoder())
    next(tmp_path.glob("*/pooled.bin")).unlink()
    with pytest.raises(RuntimeError, match=r"pooled\.bin"):
        table(tmp_path, Encoder())


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unknown_prompt_is_named_with_the_remedy(tmp_path: Path, in_memory: bool) -> None:
    made = table(None if in_memory else tmp_path, Encoder())
    with pytest.raises(DataError, match=r"'prompt 150' is not among the 150 .* give precompute"):
        made.rows(["prompt 1", "prompt 150"], CPU)
