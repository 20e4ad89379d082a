"""The grammar: the split leaks nothing, rows are GenEval's, scenes show what their rows ask for."""

import itertools

import numpy as np
import pytest

from rewards.shapes.grammar import SKILLS, Request, change, requests, sample_scene, split
from rewards.shapes.render import render
from rewards.shapes.score import score_detections
from rewards.shapes.verify import ground_truth
from rewards.shapes.vocabulary import COLORS, NUMBERS, RELATIONS, SHAPES, coverage


def picture_of(row):
    """What a metadata row shows, whatever the words: derived from the row alone.

    "right of" and "below" are turned into "left of" and "above" of the other object.
    """
    items = [(item["class"], item.get("color"), item["count"]) for item in row["include"]]
    relation = row["include"][-1].get("position", [None])[0]
    if relation is None:
        return (row["tag"], frozenset(items))
    target, subject = items
    if relation in ("right of", "below"):
        target, subject = subject, target
        relation = {"right of": "left of", "below": "above"}[relation]
    return (row["tag"], subject, relation, target)


@pytest.mark.parametrize("skill", SKILLS)
def test_train_and_heldout_share_no_picture(skill):
    # Killed mutation: hashing the prompt instead of the combination, which puts "a circle left of a
    # square" in one set and "a square right of a circle" in the other.
    train = {picture_of(r.metadata) for r in split(skill, held_out=False)}
    heldout = {picture_of(r.metadata) for r in split(skill, held_out=True)}
    assert train and heldout
    assert not train & heldout
    assert train | heldout == {picture_of(r.metadata) for r in requests(skill)}


def test_number_of_requests():
    # 6 shapes, 7 colours, 3 numbers, 4 relations: 6; 6*5; 6*3; 6*7; 30*4; 30*(7*6).
    expected = dict(zip(SKILLS, (6, 30, 18, 42, 120, 1260), strict=True))
    assert {skill: len(list(requests(skill))) for skill in SKILLS} == expected


def test_every_word_of_the_heldout_set_is_trained():
    prompts = " ".join(r.prompt for skill in SKILLS for r in split(skill, held_out=False))
    for word in (*SHAPES, *COLORS, *NUMBERS.values(), *RELATIONS):
        assert word in prompts


@pytest.mark.parametrize(
    ("request_", "prompt", "include"),
    [
        (Request("single_object", (("star", None, 1),)), "a photo of a star",
         [{"class": "star", "count": 1}]),
        (Request("two_object", (("cross", None, 1), ("ring", None, 1))),
         "a photo of a cross and a ring",
         [{"class": "cross", "count": 1}, {"class": "ring", "count": 1}]),
        (Request("counting", (("cross", None, 3),)), "a photo of three crosses",
         [{"class": "cross", "count": 3}]),
        (Request("colors", (("square", "orange", 1),)), "a photo of an orange square",
         [{"class": "square", "count": 1, "color": "orange"}]),
        # As GenEval's "a photo of a dog right of a teddy bear": the teddy bear comes first.
        (Request("position", (("star", None, 1), ("ring", None, 1)), "right of"),
         "a photo of a star right of a ring",
         [{"class": "ring", "count": 1},
          {"class": "star", "count": 1, "position": ["right of", 0]}]),
        (Request("color_attr", (("star", "red", 1), ("ring", "cyan", 1))),
         "a photo of a red star and a cyan ring",
         [{"class": "star", "count": 1, "color": "red"},
          {"class": "ring", "count": 1, "color": "cyan"}]),
    ],
)  # fmt: skip
def test_prompt_and_metadata_golden(request_, prompt, include):
    row = request_.metadata
    assert row["prompt"] == prompt
    assert row["include"] == include
    assert row["tag"] == request_.skill


@pytest.mark.parametrize("skill", SKILLS)
def test_rows_have_genevals_schema_and_forbid_one_more_of_everything(skill):
    for request in requests(skill):
        row = request.metadata
        assert set(row) == {"tag", "include", "exclude", "prompt"}
        for item in row["include"]:
            assert set(item) <= {"class", "count", "color", "position"}
            assert item["class"] in SHAPES and item["count"] >= 1
        asked = {item["class"]: item["count"] for item in row["include"]}
        limits = {item["class"]: item["count"] for item in row["exclude"]}
        assert limits == {name: asked.get(name, 0) + 1 for name in (*SHAPES, "unknown")}


@pytest.mark.parametrize("skill", SKILLS)
def test_right_scenes_satisfy_their_own_metadata(skill):
    # Killed mutation: the reference object second in `include`.
    rng = np.random.default_rng(3)
    pool = list(requests(skill))
    for index in range(max(len(pool), 200)):
        request = pool[index % len(pool)]
        scene = sample_scene(request, rng)
        detail = score_detections(ground_truth(scene), request.metadata)
        assert detail.correct, (request, scene, detail.reason)


@pytest.mark.parametrize("skill", SKILLS)
def test_wrong_scenes_violate_the_metadata(skill):
    rng = np.random.default_rng(4)
    pool = list(requests(skill))
    two_relations = 0
    for index in range(300):
        request = pool[index % len(pool)]
        scene = sample_scene(request, rng, error_rate=1.0)
        if score_detections(ground_truth(scene), request.metadata).correct:
            # GenEval lets an object far left and as far above be both "left of" and "above".
            assert request.skill == "position"
            two_relations += 1
    assert two_relations < 0.1 * 300


def test_the_opposite_relation_is_never_right():
    rng = np.random.default_rng(5)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for request in requests("position"):
        wrong = Request(request.skill, request.objects, opposite[request.relation])
        assert not score_detections(
            ground_truth(sample_scene(wrong, rng)), request.metadata
        ).correct


def test_change_replaces_exactly_one_thing():
    rng = np.random.default_rng(6)
    request = Request("color_attr", (("star", "red", 1), ("ring", "cyan", 1)))
    assert change(request, "swap", 0, rng).objects == (("star", "cyan", 1), ("ring", "red", 1))
    for position, kind in enumerate(("shape", "color", "count")):
        changed = change(request, kind, 1, rng).objects
        differing = [(i, j) for i, j in itertools.product(range(2), range(3))
                     if changed[i][j] != request.objects[i][j]]  # fmt: skip
        assert differing == [(1, position)]
    with pytest.raises(ValueError, match="unknown change 'size'"):
        change(request, "size", 0, rng)


def test_objects_lie_inside_the_canvas_and_do_not_overlap():
    rng = np.random.default_rng(7)
    for request in itertools.chain(requests("counting"), requests("two_object")):
        scene = sample_scene(request, rng)
        masks = [coverage(o.shape, 64, center=(o.x, o.y), radius=o.radius) for o in scene.objects]
        painted = sum(masks)
        assert painted.max() <= 1
        assert painted[0].max() == painted[-1].max() == 0
        assert painted[:, 0].max() == painted[:, -1].max() == 0


def test_same_generator_same_picture():
    request = next(iter(requests("color_attr")))
    pictures = []
    for _ in range(2):
        rng = np.random.default_rng(8)
        pictures.append(render(sample_scene(request, rng), rng))
    assert np.array_equal(*pictures)
    assert pictures[0].dtype == np.float32 and pictures[0].shape == (3, 64, 64)
