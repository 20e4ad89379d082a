"""GenEval's rules: golden cases derived by hand, on GenEval's own rows and on ours."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.shapes.grammar import SKILLS, requests
from rewards.shapes.score import overall, per_skill, relative_position, score_detections
from rewards.shapes.vocabulary import COLORS, SHAPES


@dataclass(frozen=True)
class Found:
    """A detection of any detector: what scoring reads, nothing else."""

    shape: str
    color: str = "red"
    box: tuple[float, float, float, float] = (0, 0, 10, 10)
    score: float = 0.9


# Rows as published in GenEval's evaluation_metadata.jsonl.
TWO_OBJECT = {
    "tag": "two_object",
    "include": [{"class": "toothbrush", "count": 1}, {"class": "snowboard", "count": 1}],
    "prompt": "a photo of a toothbrush and a snowboard",
}
COUNTING = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
}
POSITION = {
    "tag": "position",
    "include": [
        {"class": "teddy bear", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ],
    "prompt": "a photo of a dog right of a teddy bear",
}
COLOR_ATTR = {
    "tag": "color_attr",
    "include": [
        {"class": "wine glass", "count": 1, "color": "purple"},
        {"class": "apple", "count": 1, "color": "black"},
    ],
    "prompt": "a photo of a purple wine glass and a black apple",
}


@pytest.mark.parametrize(
    ("row", "found", "fraction"),
    [
        # Two count parts.
        (TWO_OBJECT, [Found("toothbrush"), Found("snowboard")], 1),
        (TWO_OBJECT, [Found("toothbrush"), Found("toothbrush")], 1 / 2),
        (TWO_OBJECT, [], 0),
        # GenEval's row forbids nothing: a crowd passes.
        (TWO_OBJECT, [Found("toothbrush")] * 3 + [Found("snowboard"), Found("dog")], 1),
        # One count part, 1/2 met with one clock; three clocks: (1) / (1 part + 1 violation).
        (COUNTING, [Found("clock")] * 2, 1),
        (COUNTING, [Found("clock")], 1 / 2),
        (COUNTING, [Found("clock")] * 3, 1 / 2),
        # Parts: bear, dog, relation.
        (POSITION, [Found("dog", box=(40, 0, 50, 10)), Found("teddy bear")], 1),
        (POSITION, [Found("dog"), Found("teddy bear", box=(40, 0, 50, 10))], 2 / 3),
        (POSITION, [Found("dog", box=(0, 40, 10, 50)), Found("teddy bear")], 2 / 3),
        (POSITION, [Found("dog", box=(40, 0, 50, 10))], 1 / 3),
        (POSITION, [Found("teddy bear")], 1 / 3),
        # Parts: glass, its colour, apple, its colour.
        (COLOR_ATTR, [Found("wine glass", "purple"), Found("apple", "black")], 1),
        (COLOR_ATTR, [Found("wine glass", "black"), Found("apple", "purple")], 2 / 4),
        (COLOR_ATTR, [Found("wine glass", "purple"), Found("apple", "red")], 3 / 4),
        (COLOR_ATTR, [Found("apple", "black")], 2 / 4),
    ],
)
def test_genevals_own_rows_golden(row, found, fraction):
    detail = score_detections(found, row)
    assert detail.fraction == pytest.approx(fraction)
    assert detail.correct == (fraction == 1)
    assert bool(detail.reason) != detail.correct


def test_reasons_name_what_is_missing():
    row = {"include": [{"class": "star", "count": 2, "color": "blue"},
                       {"class": "ring", "count": 1, "position": ["above", 0]}],
           "exclude": [{"class": "unknown", "count": 1}]}  # fmt: skip
    found = [Found("star", "blue"), Found("ring", box=(30, 30, 40, 40)), Found("unknown")]
    assert score_detections(found, row).reason.splitlines() == [
        "expected 2 star, found 1",
        "expected 2 blue star, found 1",
        "expected ring above its target, found 0 of 1 pairs so",
        "expected fewer than 1 unknown, found 1",
    ]
    # (1/2 + 1/2 + 1 + 0) / (4 parts + 1 violation)
    assert score_detections(found, row).fraction == pytest.approx(2 / 5)


def test_colour_is_read_off_the_most_confident_objects():
    # Killed mutation: taking detections in the order given.
    row = {"include": [{"class": "star", "count": 1, "color": "blue"}]}
    unsure, sure = Found("star", "blue", score=0.4), Found("star", "red", score=0.8)
    assert not score_detections([unsure, sure], row).correct
    assert score_detections([Found("star", "blue", score=0.9), sure], row).correct


def test_position_must_hold_for_every_pair():
    row = {"include": [{"class": "star", "count": 2},
                       {"class": "ring", "count": 1, "position": ["right of", 0]}]}  # fmt: skip
    ring, left = Found("ring", box=(30, 0, 40, 10)), Found("star", box=(0, 0, 10, 10))
    right = Found("star", box=(54, 0, 64, 10))
    assert score_detections([ring, left, left], row).correct
    detail = score_detections([ring, left, right], row)
    assert not detail.correct
    assert detail.fraction == pytest.approx((1 + 1 + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        # Offset -20, extents 10 + 10: -20 + 2 = -18, over 20 = -0.9.
        ((0, 0, 10, 10), (20, 0, 30, 10), {"left of"}),
        ((20, 0, 30, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 20, 10, 30), {"above"}),
        ((0, 20, 10, 30), (0, 0, 10, 10), {"below"}),
        # Diagonal: -18 / (20 sqrt 2) = -0.64 on both axes.
        ((0, 0, 10, 10), (20, 20, 30, 30), {"left of", "above"}),
        # Offset 2, extents 20: 2 - 2 = 0.
        ((2, 0, 12, 10), (0, 0, 10, 10), set()),
        # Offset 10; extents 40: (10 - 4) / 10 = 0.6. Extents 52: (10 - 5.2) / 10 = 0.48.
        ((10, 0, 30, 20), (0, 0, 20, 20), {"right of"}),
        ((10, 0, 36, 26), (0, 0, 26, 26), set()),
        # Offset (30, 15): dx (30 - 2) / 33.54 = 0.83, dy (15 - 2) / 33.54 = 0.39.
        ((30, 15, 40, 25), (0, 0, 10, 10), {"right of"}),
        # The extents add per axis: 2 wide, 60 high each; dy (20 - 12) / 20 = 0.4.
        ((0, 20, 2, 80), (0, 0, 2, 60), set()),
    ],
)
def test_relative_position_golden(box, other, expected):
    assert relative_position(box, other) == expected


boxes = st.tuples(*[st.integers(0, 50)] * 2, *[st.integers(1, 14)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(boxes, boxes)
def test_relations_are_antisymmetric(box, other):
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    there, back = relative_position(box, other), relative_position(other, box)
    assert {mirror[relation] for relation in there} == back
    assert not there & back


found_objects = st.lists(
    st.builds(Found, st.sampled_from([*SHAPES, "unknown"]), st.sampled_from(list(COLORS)), boxes,
              st.floats(0, 1)),
    max_size=6,
)  # fmt: skip
rows = st.sampled_from([r.metadata for skill in SKILLS for r in list(requests(skill))[:40]])


@settings(max_examples=300)
@given(found_objects, rows)
def test_fraction_is_one_exactly_when_correct(found, row):
    detail = score_detections(found, row)
    assert 0 <= detail.fraction <= 1
    assert (detail.fraction == 1) == detail.correct == (not detail.reason)
    assert score_detections(found[::-1], row | {"prompt": ""}).fraction <= 1


@settings(max_examples=300)
@given(found_objects, rows)
def test_an_unknown_object_more_never_helps(found, row):
    extra = Found("unknown", score=0.0)
    more, before = score_detections([*found, extra], row), score_detections(found, row)
    assert not more.correct
    assert more.fraction <= before.fraction


def test_rows_that_cannot_be_judged_are_refused():
    with pytest.raises(ValueError, match="expected 'include' or 'exclude'"):
        score_detections([], {"prompt": "a photo"})
    row = {"include": [{"class": "star", "count": 1, "position": ["above", 0]}]}
    with pytest.raises(ValueError, match="position names item 0"):
        score_detections([Found("star")], row)


def test_overall_is_the_mean_over_skills():
    tags = ["colors", "colors", "colors", "counting"]
    correct = [1, 1, 0, 0]
    assert per_skill(tags, correct) == {"colors": pytest.approx(2 / 3), "counting": 0}
    assert overall(tags, correct) == pytest.approx(1 / 3)  # not 2 / 4
    with pytest.raises(ValueError, match="at least one sample"):
        overall([], [])
    with pytest.raises(ValueError):
        per_skill(["colors"], [])
