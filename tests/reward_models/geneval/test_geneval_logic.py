"""GenEval's choice of objects and rules on hand-made detections, and a second writing of them.

The second writing follows the published script: one pass that stops looking at an item at its first
failure. Kills, among others: a threshold that lets equality pass; the limit per class taken after
overlaps or over all classes; a colour asked of the wrong object; groups that do not count as failed
after a wrong colour; a relation of any pair instead of every pair; `exclude` that reads `>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.detector import Found
from rewards.geneval_logic import COLORS, asked, flow_grpo_reward, iou, strongest
from rewards.shapes.score import relative_position, score_detections

Row = dict[str, Any]
HERE, RIGHT, BELOW = (0, 0, 10, 10), (40, 0, 50, 10), (0, 40, 10, 50)


def thing(
    shape: str, color: str = "", box: tuple[float, float, float, float] = HERE, score: float = 0.95
) -> Found:
    return Found(shape, score, box, None, color)


# Rows as published in GenEval's evaluation_metadata.jsonl.
SINGLE = {"tag": "single_object", "include": [{"class": "bowl", "count": 1}]}
TWO = {"tag": "two_object", "include": [{"class": "toilet", "count": 1},
                                        {"class": "computer mouse", "count": 1}]}  # fmt: skip
COUNTING = {"tag": "counting", "include": [{"class": "tv remote", "count": 2}],
            "exclude": [{"class": "tv remote", "count": 3}]}  # fmt: skip
COLOR = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "purple"}]}
POSITION = {"tag": "position",
            "include": [{"class": "laptop", "count": 1},
                        {"class": "cow", "count": 1, "position": ["right of", 0]}]}  # fmt: skip
COLOR_ATTR = {"tag": "color_attr",
              "include": [{"class": "train", "count": 1, "color": "red"},
                          {"class": "bear", "count": 1, "color": "purple"}]}  # fmt: skip
# Not among the 553, but within the format.
NO_CAT = {"tag": "single_object", "include": [{"class": "dog", "count": 1}],
          "exclude": [{"class": "cat", "count": 1}]}  # fmt: skip
RED_LEFT = {"tag": "position",
            "include": [{"class": "car", "count": 2, "color": "red"},
                        {"class": "bus", "count": 1, "position": ("left of", 0)}]}  # fmt: skip
CASES = [
    # row, objects, strict, Flow-GRPO's reward
    (SINGLE, [thing("bowl")], 1, 1),
    (SINGLE, [], 0, 0),
    (SINGLE, [thing("cup")], 0, 0),
    (SINGLE, [thing("bowl")] * 3, 1, -1),  # too many: nothing forbids them; 1 - 2 / 1
    (TWO, [thing("toilet"), thing("computer mouse")], 1, 1),
    (TWO, [thing("toilet")], 0, 1 / 2),
    (COUNTING, [thing("tv remote")] * 2, 1, 1),
    (COUNTING, [thing("tv remote")], 0, 1 / 2),
    (COUNTING, [thing("tv remote")] * 3, 0, 1 / 2),
    (COUNTING, [thing("tv remote")] * 5, 0, -1 / 2),
    (COLOR, [thing("cup", "purple")], 1, 1),
    (COLOR, [thing("cup", "pink")], 0, 1 / 2),
    # The surest is asked; Flow-GRPO wants the count first.
    (COLOR, [thing("cup", "pink", score=0.99), thing("cup", "purple")], 0, 0),
    (COLOR, [thing("cup", "purple", score=0.99), thing("cup", "pink")], 1, 0),
    (POSITION, [thing("laptop"), thing("cow", box=RIGHT)], 1, 1),
    (POSITION, [thing("laptop", box=RIGHT), thing("cow")], 0, 3 / 4),  # 1, 1, and 0, 1
    (POSITION, [thing("laptop"), thing("cow", box=BELOW)], 0, 3 / 4),
    (POSITION, [thing("laptop"), thing("cow")], 0, 3 / 4),
    (POSITION, [thing("cow", box=RIGHT)], 0, 1 / 3),  # 0, 1, and 0 without a target
    (POSITION, [thing("laptop")], 0, 1 / 3),  # 1, 0, and 0 without a cow
    (COLOR_ATTR, [thing("train", "red"), thing("bear", "purple")], 1, 1),
    (COLOR_ATTR, [thing("train", "purple"), thing("bear", "red")], 0, 1 / 2),
    (COLOR_ATTR, [thing("train", "red")], 0, 1 / 2),  # 1, 1, 0, 0
    (NO_CAT, [thing("dog")], 1, 1),
    (NO_CAT, [thing("dog"), thing("cat", score=0.31)], 0, 1),  # Flow-GRPO reads no exclude
    (RED_LEFT, [thing("car", "red", RIGHT)] * 2 + [thing("bus")], 1, 1),
    # A wrong colour fails the group; then the bus has no target: 1, 1/2, 1, 0.
    (RED_LEFT, [thing("car", "red", RIGHT), thing("car", "blue", RIGHT), thing("bus")], 0, 5 / 8),
    # One of two cars on the wrong side: 1, 1, 1, and 0, 1.
    (RED_LEFT, [thing("car", "red", RIGHT), thing("car", "red", BELOW), thing("bus")], 0, 4 / 5),
]


@pytest.mark.parametrize(("row", "found", "strict", "reward"), CASES)
def test_every_skill_golden(row: Row, found: list[Found], strict: int, reward: float) -> None:
    assert score_detections(found, row).correct == bool(strict)
    assert published(found, row) == bool(strict)
    assert flow_grpo_reward(found, row) == pytest.approx(reward)


def published(found: Sequence[Found], row: Row) -> bool:
    """The published verdict, with the groups that later items may point to."""
    ordered = sorted(found, key=lambda each: -each.score)
    groups: list[list[Found] | None] = []
    for item in row.get("include", []):
        group = [each for each in ordered if each.shape == item["class"]][: item["count"]]
        good = len(group) == item["count"]
        if good and "color" in item:
            good = [each.color for each in group].count(item["color"]) >= item["count"]
        if good and "position" in item:
            relation, target = item["position"]
            others = groups[target]
            good = others is not None and all(
                relation in relative_position(each.box, other.box)
                for each in group for other in others
            )  # fmt: skip
        groups.append(group if good else None)
    spared = [
        sum(each.shape == item["class"] for each in found) < item["count"]
        for item in row.get("exclude", [])
    ]
    return None not in groups and all(spared)


names, colors = st.sampled_from(["cup", "dog"]), st.sampled_from(["red", "blue"])
boxes = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(
    lambda corner: (*corner, corner[0] + 12, corner[1] + 12)
)
objects = st.lists(st.builds(thing, names, colors, boxes, st.floats(0.31, 1)), max_size=5)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    include: list[Row] = []
    for index in range(draw(st.integers(1, 3))):
        item: Row = {"class": draw(names), "count": draw(st.integers(1, 2))}
        if draw(st.booleans()):
            item["color"] = draw(colors)
        if index and draw(st.booleans()):
            relation = draw(st.sampled_from(["left of", "right of", "above", "below"]))
            item["position"] = [relation, draw(st.integers(0, index - 1))]
        include.append(item)
    exclude = st.builds(lambda n, c: {"class": n, "count": c}, names, st.integers(1, 3))
    return {"tag": "any", "include": include, "exclude": draw(st.lists(exclude, max_size=1))}


@settings(max_examples=300, deadline=None)
@given(objects, rows())
def test_the_verdict_is_the_published_one(found: list[Found], row: Row) -> None:
    assert score_detections(found, row).correct == published(found, row)


@settings(max_examples=200, deadline=None)
@given(objects, rows())
def test_flow_grpos_reward_is_1_only_for_what_is_right(found: list[Found], row: Row) -> None:
    reward = flow_grpo_reward(found, row)
    assert reward <= 1
    if reward == 1:
        assert published(found, row | {"exclude": []})


def test_a_confidence_has_to_be_above_the_threshold() -> None:
    found = [thing("cup", score=score) for score in (0.3, 0.31, 0.9, 0.91)]
    limits = {"max_objects": 16, "max_overlap": 1.0}
    assert [each.score for each in strongest(found, threshold=0.3, **limits)] == [0.91, 0.9, 0.31]
    assert [each.score for each in strongest(found, threshold=0.9, **limits)] == [0.91]


def test_the_surest_of_a_class_are_taken() -> None:
    found = [thing("cup", score=0.4 + i / 100) for i in range(20)] + [thing("dog", score=0.35)]
    kept = strongest(found, threshold=0.3, max_objects=16, max_overlap=1.0)
    cups = [each.score for each in kept if each.shape == "cup"]
    assert cups == [0.4 + i / 100 for i in range(19, 3, -1)]
    assert [each.shape for each in kept].count("dog") == 1


def test_overlaps_are_dropped_in_the_order_of_confidence() -> None:
    # Corners belong to a box: 11 x 11 pixels, shifted by 1: 110 / (121 + 121 - 110) = 0.833.
    a, b = thing("cup", score=0.9), thing("cup", box=(1, 0, 11, 10), score=0.8)
    c = thing("cup", box=(2, 0, 12, 10), score=0.7)  # 99 / 143 = 0.692 with a
    other = thing("dog", box=(1, 0, 11, 10), score=0.99)
    assert iou(a.box, b.box) == pytest.approx(110 / 132)
    assert iou(a.box, (20, 20, 30, 30)) == 0
    found = [c, b, a, other]

    def kept(max_overlap: float, max_objects: int = 16) -> list[Found]:
        limits = {"max_objects": max_objects, "max_overlap": max_overlap}
        return strongest(found, threshold=0.3, **limits)

    assert kept(1.0) == [other, a, b, c]
    # b falls to a; c is compared with a, not with b, which is gone.
    assert kept(0.8) == [other, a, c]
    assert kept(110 / 132) == [other, a, c]  # the limit itself is too much
    assert kept(0.6) == [other, a]
    assert kept(0.8, max_objects=2) == [other, a]  # two are taken, then one is dropped


def test_colours_are_asked_of_the_surest_that_count() -> None:
    found = [
        thing("cup", score=0.9),
        thing("cup", score=0.8),
        thing("dog"),
        thing("cup", score=0.5),
    ]
    row = {"include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 2, "color": "red"}]}
    assert asked(found, row) == [0, 1]
    assert asked(found, {"exclude": [{"class": "cup", "count": 1}]}) == []
    twice = {"include": [{"class": "cup", "count": 1, "color": "red"}] * 2}
    assert asked(found, twice) == [0]


def test_rows_that_flow_grpo_cannot_grade_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'include' in the metadata"):
        flow_grpo_reward([], {"exclude": [{"class": "cup", "count": 1}]})
    row = {"include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}
    with pytest.raises(ValueError, match="position names item 0; expected one of the 0 before"):
        flow_grpo_reward([thing("cup")], row)


def test_offsets_of_no_pixel_are_no_relation() -> None:
    assert relative_position((0.0009, 0, 0.0009, 0), (0, 0, 0, 0)) == set()
    assert relative_position((0.0011, 0, 0.0011, 0), (0, 0, 0, 0)) == {"right of"}


def test_the_colours_are_the_papers() -> None:
    assert len(set(COLORS)) == len(COLORS) == 10 and COLORS[-1] == "white"
    assert np.all([color.islower() for color in COLORS])
