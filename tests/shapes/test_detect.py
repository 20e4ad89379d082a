"""The detector is verified, not assumed: fresh renders, a VAE's pictures, and wrong pictures.

The seeds here were not used when the detector's thresholds were chosen.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from rewards.shapes.detect import MIN_AREA, UNKNOWN, detect
from rewards.shapes.render import Object, Scene, render
from rewards.shapes.verify import (
    MISSED,
    WRONG_KINDS,
    confusions,
    is_right,
    rejection_rates,
    renders,
    through_vae,
)
from rewards.shapes.vocabulary import COLORS, SHAPES, coverage

VAE = Path(__file__).parents[2] / "pipelines" / "weights" / "shapes_sd3" / "vae"
SEED = 20231


@pytest.fixture(scope="module")
def fresh():
    return list(renders(2000, SEED))


def paint(*objects, background=0.9):
    """The picture of a scene, with colours as in the vocabulary up to a few per cent."""
    return render(Scene(objects, background), np.random.default_rng(0))


def disc(color, *, x=32.0, y=32.0, radius=12.0, squeeze=1.0, background=0.9):
    """An ellipse of any colour on a canvas of any colour, drawn without the renderer."""
    ys, xs = np.mgrid[:64, :64] + 0.5
    depth = radius - np.hypot(xs - x, (ys - y) * squeeze)
    mask = np.clip(depth + 0.5, 0, 1)
    canvas = np.zeros((3, 64, 64)) + np.reshape(background, (-1, 1, 1))
    return canvas + mask * (np.reshape(color, (3, 1, 1)) - canvas)


def test_fresh_renders_are_read_right(fresh):
    found = [detect(sample.image) for sample in fresh]
    right = sum(is_right(sample, items) for sample, items in zip(fresh, found, strict=True))
    assert right >= 0.995 * len(fresh)
    counts = confusions(fresh, found)
    total = counts.shapes.total()
    assert sum(counts.shapes[name, name] for name in SHAPES) >= 0.999 * total
    assert sum(counts.colors[name, name] for name in COLORS) >= 0.999 * total
    assert sum(counts.shapes[name, MISSED] for name in SHAPES) <= 0.001 * total


def test_pictures_through_the_base_models_vae_are_read_right(fresh):
    some = fresh[:1000]
    decoded = through_vae([sample.image for sample in some], VAE)
    right = sum(
        is_right(sample, detect(image)) for sample, image in zip(some, decoded, strict=True)
    )
    assert right >= 0.98 * len(some)


def test_wrong_pictures_are_rejected():
    rates = rejection_rates(400, SEED)
    assert set(rates) == set(WRONG_KINDS)
    assert {kind: rate for kind, rate in rates.items() if rate < 0.99} == {}


@pytest.mark.parametrize("damage", ["noise", "blur", "jpeg"])
def test_slight_damage_is_tolerated(fresh, damage):
    rng = np.random.default_rng(SEED)

    def damaged(image):
        if damage == "noise":
            return np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1)
        if damage == "blur":
            return ndimage.gaussian_filter(image, (0, 0.5, 0.5))
        file = io.BytesIO()
        pixels = (image.transpose(1, 2, 0) * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=85, subsampling=0)
        return np.asarray(Image.open(file)).transpose(2, 0, 1) / 255

    some = fresh[:300]
    right = sum(is_right(sample, detect(damaged(sample.image))) for sample in some)
    assert right >= 0.98 * len(some)


@pytest.mark.parametrize("shape", SHAPES)
def test_position_area_and_box_are_measured_to_the_pixel(shape):
    mask = coverage(shape, 64, center=(30.3, 27.6), radius=11.0)
    (found,) = detect(paint(Object(shape, "blue", 30.3, 27.6, 11.0)))
    assert (found.shape, found.color) == (shape, "blue")
    assert found.area == pytest.approx(mask.sum(), rel=0.01)
    centers = np.arange(64) + 0.5
    expected = (mask.sum(0) @ centers / mask.sum(), mask.sum(1) @ centers / mask.sum())
    assert found.center == pytest.approx(expected, abs=0.05)
    ys, xs = np.nonzero(mask > 0.5)
    assert found.box == pytest.approx((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), abs=1)
    assert 0.9 < found.score <= 1


def test_squares_that_all_but_meet_at_a_corner_are_two():
    # The corners are 1.245 radii from the centre, further than the circle that keeps objects apart.
    found = detect(paint(Object("square", "blue", 29.5, 42.5, 7.2),
                         Object("square", "blue", 46.3, 26.9, 10.4)))  # fmt: skip
    assert [item.shape for item in found] == ["square", "square"]


def test_an_object_inside_a_ring_is_found_beside_the_ring():
    found = detect(paint(Object("ring", "red", 32, 32, 26), Object("star", "blue", 32, 32, 9)))
    assert sorted((item.shape, item.color) for item in found) == [("ring", "red"), ("star", "blue")]


def test_objects_that_run_into_each_other_are_unknown():
    (found,) = detect(
        paint(Object("circle", "red", 24, 32, 10), Object("circle", "red", 38, 32, 10))
    )
    assert found.shape == UNKNOWN
    (found,) = detect(
        paint(Object("circle", "red", 24, 32, 10), Object("square", "blue", 38, 32, 10))
    )
    assert found.shape == UNKNOWN


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("ellipse", disc(COLORS["red"], squeeze=1.8)),
        ("grey disc", disc((0.4, 0.4, 0.4))),
        ("pink disc", disc((1.0, 0.6, 0.75))),
        ("black disc", disc((0.0, 0.0, 0.0))),
        ("cut by the edge", disc(COLORS["red"], x=2.0)),
        ("coloured canvas", disc(COLORS["red"], background=COLORS["blue"])),
        ("dark canvas", disc(COLORS["red"], background=(0.3, 0.3, 0.3))),
        ("blurred disc", ndimage.gaussian_filter(disc(COLORS["red"]), (0, 2, 2))),
        ("half transparent", 0.5 * disc(COLORS["red"]) + 0.45),
        ("too small", disc(COLORS["red"], radius=2.4)),
    ],
)
def test_what_is_no_clean_shape_of_one_colour_is_unknown(name, image):
    found = detect(image)
    assert found and all(item.shape == UNKNOWN for item in found), name


def test_specks_are_ignored_and_smudges_are_not():
    image = paint(Object("star", "green", 40, 40, 10))
    clean = detect(image)
    image[:, 8:11, 8:11] = 0.2
    assert MIN_AREA > 3 * 3
    assert detect(image) == clean
    image[:, 8:11, 8:18] = 0.2
    assert sorted(item.shape for item in detect(image)) == ["star", UNKNOWN]
    faint = paint(Object("star", "green", 40, 40, 10))
    faint[:, 5:20, 5:20] -= 0.12
    assert sorted(item.shape for item in detect(faint)) == ["star", UNKNOWN]


def test_blank_canvas_holds_nothing():
    assert detect(np.full((3, 64, 64), 0.9)) == []


def test_best_drawn_first():
    image = paint(Object("circle", "red", 16, 16, 10), Object("cross", "blue", 46, 46, 8))
    scores = [item.score for item in detect(image)]
    assert scores == sorted(scores, reverse=True) and len(scores) == 2


def test_images_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match=r"expected one image \[3, 64, 64\], got \[3, 32, 32\]"):
        detect(np.zeros((3, 32, 32)))
    with pytest.raises(ValueError, match="finite"):
        detect(np.full((3, 64, 64), np.nan))
