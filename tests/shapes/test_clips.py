"""Clips of the Shapes world: every frame is a scene of the same objects, a little further on.

Kills: objects that leave the canvas, meet, turn or flicker; draws from another generator.
"""

import itertools

import numpy as np
import pytest

from rewards.shapes.clips import drift, render_clip
from rewards.shapes.detect import detect
from rewards.shapes.grammar import describe, sample_scene, split
from rewards.shapes.render import lay_out, render

SKILLS = ("counting", "color_attr", "single_object")


def scenes(num=12, seed=0):
    rng = np.random.default_rng(seed)
    pools = [split(skill, held_out=False) for skill in SKILLS]
    return [sample_scene(pool[rng.integers(len(pool))], rng) for pool in pools for _ in range(num)]


@pytest.mark.parametrize("num_frames", [1, 4, 40])
def test_objects_drift_on_the_canvas_without_touching(num_frames):
    rng = np.random.default_rng(1)
    moved = []
    for scene in scenes():
        places = drift(scene, num_frames, rng)
        assert places.shape == (num_frames, len(scene.objects), 2)
        assert places[0].tolist() == [[item.x, item.y] for item in scene.objects]
        for item, path in zip(scene.objects, places.transpose(1, 0, 2), strict=True):
            assert (path >= item.radius - 1e-9).all() and (path <= 64 - item.radius + 1e-9).all()
            np.testing.assert_allclose(np.diff(path, 2, axis=0), 0, atol=1e-9)  # constant speed
            assert (np.abs(np.diff(path, axis=0)) <= 5).all()
        pairs = itertools.combinations(range(len(scene.objects)), 2)
        for i, j in pairs:
            apart = np.linalg.norm(places[:, i] - places[:, j], axis=-1)
            assert (apart > scene.objects[i].radius + scene.objects[j].radius).all()
        moved += np.linalg.norm(places[-1] - places[0], axis=-1).tolist()
    assert num_frames == 1 or np.mean(moved) > 4  # not by resting


def test_objects_have_speeds_of_their_own():
    rng = np.random.default_rng(2)
    scene = lay_out([("circle", "red"), ("star", "blue")], rng)
    first, second = drift(scene, 2, rng)[1] - drift(scene, 1, rng)[0]
    assert np.abs(first - second).max() > 0.1


def test_every_frame_reads_as_the_scene():
    rng = np.random.default_rng(3)
    for scene in scenes(num=4):
        for frame in render_clip(scene, 3, rng):
            assert sorted((d.shape, d.color) for d in detect(frame)) == describe(scene)


def test_brightness_does_not_flicker():
    """An object of one colour has one paint in all frames, and another one in another clip."""
    scene = lay_out([("square", "blue")], np.random.default_rng(4))
    paints = []
    for seed in range(4):
        clip = render_clip(scene, 5, np.random.default_rng(seed))
        paint = {tuple(frame.reshape(3, -1)[:, frame[0].argmin()].tolist()) for frame in clip}
        assert len(paint) == 1
        paints.append(paint.pop())
    assert len(set(paints)) == 4


def test_a_clip_is_a_function_of_the_rng():
    (scene, *_) = scenes(num=1)
    clip = render_clip(scene, 4, np.random.default_rng(5))
    assert clip.dtype == np.float32 and clip.shape == (4, 3, 64, 64)
    np.random.seed(0)
    assert np.array_equal(clip, render_clip(scene, 4, np.random.default_rng(5)))
    assert not np.array_equal(clip, render_clip(scene, 4, np.random.default_rng(6)))
    still = render(scene, np.random.default_rng(0))
    assert np.abs(clip[0] - still).mean() < 0.02  # begins with the scene; brightness may differ
