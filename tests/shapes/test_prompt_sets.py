"""The two prompt sets that `shapes/train` and `shapes/heldout` stand for."""

import json
from collections import Counter

import pytest

from rewards.shapes.grammar import SKILLS, split
from rewards.shapes.prompts import HELDOUT_PER_SKILL, TRAIN_ROWS, heldout_rows, train_rows, write


def test_skills_are_equally_frequent_and_take_turns():
    for rows, each in ((train_rows(), TRAIN_ROWS // 6), (heldout_rows(), HELDOUT_PER_SKILL)):
        assert Counter(row["tag"] for row in rows) == dict.fromkeys(SKILLS, each)
        assert [row["tag"] for row in rows[:6]] == list(SKILLS)


def test_sets_are_disjoint_and_on_their_side_of_the_split():
    sides = {
        held_out: {r.prompt for skill in SKILLS for r in split(skill, held_out=held_out)}
        for held_out in (False, True)
    }
    assert {row["prompt"] for row in train_rows()} <= sides[False]
    assert {row["prompt"] for row in heldout_rows()} <= sides[True]
    assert not sides[False] & sides[True]


def test_a_skill_repeats_no_request_before_it_has_shown_all():
    rows = train_rows()
    for skill in SKILLS:
        prompts = [row["prompt"] for row in rows if row["tag"] == skill]
        pool = len(split(skill, held_out=False))
        assert len(set(prompts[:pool])) == min(pool, len(prompts))


def test_heldout_uses_all_requests_of_small_skills_and_spreads_over_large_ones():
    rows = heldout_rows()
    for skill in SKILLS:
        counts = Counter(row["prompt"] for row in rows if row["tag"] == skill)
        assert len(counts) == min(len(split(skill, held_out=True)), HELDOUT_PER_SKILL)
        assert max(counts.values()) - min(counts.values()) <= 1
    relations = Counter(
        row["include"][1]["position"][0] for row in rows if row["tag"] == "position"
    )
    assert len(relations) == 4 and min(relations.values()) >= 2
    colors = Counter(
        item["color"] for row in rows if row["tag"] == "color_attr" for item in row["include"]
    )
    assert len(colors) == 7 and max(colors.values()) - min(colors.values()) <= 2


def test_order_is_a_function_of_the_seed():
    assert train_rows(60, seed=3) == train_rows(60, seed=3)
    assert train_rows(60, seed=3) != train_rows(60, seed=4)
    assert heldout_rows() == heldout_rows()
    assert len(train_rows(7)) == 7
    with pytest.raises(ValueError, match="num=0"):
        train_rows(0)


def test_written_lines_read_back(tmp_path):
    path = tmp_path / "new" / "heldout.jsonl"
    write(path, heldout_rows())
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == heldout_rows()
