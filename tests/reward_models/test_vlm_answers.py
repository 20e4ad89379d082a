"""What an answer says: a table of answers as models write them, and what may be read from each.

Kills, among others: the first of several numbers; 7 out of 75, 7.5 or 1-7; a number out of its
range, or the nearest in it; half a number of an answer that was cut; a verdict among several.
"""

from __future__ import annotations

import math

import pytest

from rewards.vlm import Answer
from rewards.vlm_answers import compile_pattern, number, share, stated, verdict
from rewards.vlm_judge import NUMBER_ALONE, VERDICT_ALONE

SCORE = r"Score:\s*(\d+(?:\.\d+)?)"
NO = math.nan


def same(value: float, expected: float) -> bool:
    return value == expected or (math.isnan(value) and math.isnan(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 7", 7),
        ("score:7.5.", 7.5),
        ("The sky is red. Score: 7\nDone.", 7),
        ("Score: 3 ... Final Score: 3", 3),
        ("Score: 3, then Score: 4", NO),
        ("Score: 10", 10),
        ("Score: 11", NO),
        ("Score: 0.5", NO),
        ("Score: seven", NO),
        ("7", NO),
        ("Score: 7/10", NO),
        ("Score: 7,5", NO),
        ("Score: 7%", NO),
        ("Score: 1-5", NO),
        ("Score: 1 - 5", NO),
        ("Score: 7th", NO),
        ("Score: 7.5.1", NO),
        ("", NO),
    ],
)
def test_a_number_after_a_word(text: str, expected: float) -> None:
    value = number(Answer(text, False), compile_pattern(SCORE), 1, 10)
    assert same(value, expected), (text, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        (" 7.25 \n", 7.25),
        ("**8**", 8),
        ("8.", 8),
        ("-3", -3),
        ("I say 8", NO),
        ("8 of 10", NO),
        ("8/10", NO),
        ("4-8", NO),
        ("−3", NO),
        (".5", NO),
        ("1e1", NO),
        ("nan", NO),
        ("9 9", NO),
    ],
)
def test_a_number_alone(text: str, expected: float) -> None:
    value = number(Answer(text, False), compile_pattern(NUMBER_ALONE), -10, 10)
    assert same(value, expected), (text, value)


def test_a_digit_of_a_longer_number_is_no_number() -> None:
    digit = compile_pattern(r"(\d)")
    assert [stated(Answer(text, False), digit) for text in ("7", "75", "7.5", "-7", "x 7 y")] == [
        "7", None, None, None, "7"
    ]  # fmt: skip


def test_an_answer_that_was_cut_may_not_end_in_its_number() -> None:
    pattern = compile_pattern(SCORE)
    assert math.isnan(number(Answer("Score: 1", True), pattern, 1, 10))
    assert number(Answer("Score: 1 as", True), pattern, 1, 10) == 1
    assert number(Answer("Score: 1", False), pattern, 1, 10) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image 1", 1),
        ('"image 2".', 0),
        ("**Tie**\n", 0.5),
        ("Image 12", NO),
        ("Image 1 or Image 2", NO),
        ("Image 1 is better", NO),
        ("Neither", NO),
    ],
)
def test_a_verdict_alone(text: str, expected: float) -> None:
    verdicts = {"image 1": 1.0, "image 2": 0.0, "tie": 0.5}
    value = verdict(Answer(text, False), compile_pattern(VERDICT_ALONE), verdicts)
    assert same(value, expected), (text, value)


def test_a_verdict_that_stands_for_nothing_is_none() -> None:
    pattern = compile_pattern(r"(\w+)")
    assert math.isnan(verdict(Answer("both", False), pattern, {"one": 1.0}))


def test_a_share_needs_some_probability() -> None:
    assert share(0.3, 0.1) == pytest.approx(0.75)
    assert share(0.3, 0.0) == 1 and share(0.0, 1e-30) == 0
    assert math.isnan(share(0.0, 0.0))


def test_a_pattern_has_one_group() -> None:
    with pytest.raises(ValueError, match="must have one group, around the value; it has 0"):
        compile_pattern(r"\d")
    with pytest.raises(ValueError, match="it has 2"):
        compile_pattern(r"(a)|(b)")
    with pytest.raises(ValueError, match=r"question '\(' is not a regular expression"):
        compile_pattern("(", argument="question")
