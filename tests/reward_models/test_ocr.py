"""OCR: edits by hand and by their definition; the real engine on words that PIL draws.

Kills, among others: an edit distance that counts a replacement twice; a cap that is missing or at
the read text's length; containment the wrong way round; a prompt without quotes that scores 0;
lines of a text that are not joined.
"""

from __future__ import annotations

import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from flowrl.types import Prompt
from rewards.ocr import Ocr, edit_distance, reading_score, wanted_text


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("abc", "axc", 1),
     ("abc", "ac", 1), ("ac", "abc", 1), ("kitten", "sitting", 3), ("ab", "ba", 2),
     ("saturday", "sunday", 3)],
)  # fmt: skip
def test_edit_distance_golden(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edits


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_its_recursive_definition(a: str, b: str) -> None:
    @cache
    def fewest(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        if a[i - 1] == b[j - 1]:
            return fewest(i - 1, j - 1)
        return 1 + min(fewest(i - 1, j), fewest(i, j - 1), fewest(i - 1, j - 1))

    assert edit_distance(a, b) == fewest(len(a), len(b))


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("Hello World", "hello world", 1),
        ("HELLO\nWORLD", "Hello  World", 1),
        ("say hello, you", "hello", 1),  # contained
        ("hel", "hello", 3 / 5),  # but not the other way round
        ("hallo", "hello", 4 / 5),
        ("", "hello", 0),
        ("a sentence of others", "hello", 0),  # more edits than letters: not below 0
        ("stop", "shop", 3 / 4),
    ],
)
def test_reading_score_golden(read: str, wanted: str, score: float) -> None:
    assert reading_score(read, wanted) == pytest.approx(score)


def test_what_is_wanted() -> None:
    assert wanted_text('a sign "Stop here" and "not this"', {}) == "Stop here"
    assert wanted_text("a sign “Stop”", {}) == "Stop"
    assert wanted_text('a sign "Stop"', {"text": "Go"}) == "Go"
    for prompt, row in [
        ("a sign", {}),
        ('a " sign', {}),
        ('a sign "  "', {}),
        ("x", {"text": " "}),
    ]:
        with pytest.raises(ValueError, match="expected the wanted text in double quotes"):
            wanted_text(prompt, row)


def drawn(*texts: str, size: int) -> Tensor:
    """Images [B, 3, 96, 320] of one line each, in PIL's own font."""
    arrays = []
    for text in texts:
        picture = Image.new("RGB", (320, 96), (240, 240, 230))
        font = ImageFont.load_default(size)
        ImageDraw.Draw(picture).text((16, 20), text, fill=(20, 20, 60), font=font)
        arrays.append(torch.from_numpy(np.array(picture)))
    return torch.stack(arrays).permute(0, 3, 1, 2) / 255


# By default the engine enlarges a small image until its shorter side is 736 pixels.
FAST = {"EngineConfig.onnxruntime.intra_op_num_threads": 1, "Det.limit_side_len": 96}


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    reward = rewards.load("ocr", params=FAST)
    assert isinstance(reward, Ocr)
    return reward


@pytest.mark.parametrize("size", [16, 30, 44])
def test_right_words_score_1_and_wrong_ones_less(ocr: Ocr, size: int) -> None:
    images = drawn("Hello World", "Hello Wood", "Tax 1987", "", size=size)
    prompts = ['a sign that says "Hello World"'] * len(images)
    scores = ocr.score(images=images, prompts=prompts)
    assert scores.dtype == torch.float32
    # "hellowood" is an r and an l away ("world" -> "wood": one replaced, one deleted).
    assert scores[:2].tolist() == pytest.approx([1, 1 - 2 / 10])
    assert scores[2] <= 0.2 and scores[3] == 0
    assert ocr.score(images=images[2:3], prompts=["a sign"], metadata=[{"text": "TAX1987"}]) == 1


def test_the_engine_as_it_comes_reads_its_own_weights(ocr: Ocr) -> None:
    square = (0, 0, 112, 112)
    image = torch.nn.functional.pad(drawn("Hello World", size=30), square, value=0.9)
    assert Ocr().score(images=image, prompts=['"Hello World"']) == 1


def test_lines_are_read_as_one_text(ocr: Ocr) -> None:
    image = torch.cat([drawn("open", size=40), drawn("late", size=40)], dim=2)
    assert ocr.read(image[0]) == "openlate"
    assert ocr.score(images=image, prompts=['"open late"']) == 1


def test_it_conforms(ocr: Ocr) -> None:
    images = drawn("open", "late", "soon", size=30)
    check_reward(ocr, images=images, prompts=[Prompt('a sign "open"')] * 3)


def test_two_rewards_share_an_engine(ocr: Ocr) -> None:
    assert Ocr(params=dict(reversed(FAST.items())))._engine is ocr._engine
    assert Ocr(params={"Global.text_score": 0.9})._engine is not ocr._engine


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="2 images, 1 prompts and 1 rows"):
        Ocr().score(images=images, prompts=['"x"'])
    with pytest.raises(ValueError, match="2 images, 2 prompts and 1 rows"):
        Ocr().score(images=images, prompts=['"x"'] * 2, metadata=[{}])
    with pytest.raises(ValueError, match="expected float images"):
        Ocr().score(images=images[0], prompts=['"x"'])
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(
        ImportError, match=r"needs rapidocr and onnxruntime, and 'rapidocr' is .*pip install"
    ):
        Ocr().score(images=images, prompts=['"x"'] * 2)
