"""Images are read, cut and shared out as the config says.

Kills: a crop off by a pixel; a held-out image that is trained on; an order that depends on where a
run was resumed or on the processes.
"""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.errors import ConfigError, DataError, MissingDependency
from flowrl.pretrain.batches import Cut, batches_of, numbers_of
from flowrl.tokenizer.batches import ImageBatches
from flowrl.tokenizer.files import fit_image, read_sample
from flowrl.tokenizer.images import Tensors, load_images, render_scenes
from flowrl.tokenizer.schema import DataSection
from rewards.shapes.grammar import SKILLS, is_held_out, requests


def columns(*values):
    """An image whose columns have these grey values, 4 rows high."""
    return Image.fromarray(np.tile(np.array(values, np.uint8), (4, 1)))


def test_the_centre_or_the_place_asked_for_is_cut():
    image = columns(0, 10, 20, 30, 40, 50, 60, 70)  # 8 wide, 4 high: 5 places of a 4 x 4 square
    for place, expected in ((0.0, 0), (0.5, 20), (1.0, 40)):
        cut = fit_image(image, (4, 4), (0.5, place))
        assert cut.dtype == torch.uint8 and cut.shape == (3, 4, 4)
        assert cut[0, 0].tolist() == [expected + 10 * i for i in range(4)]


def test_the_shorter_side_is_resized_to_cover():
    assert fit_image(columns(*[100] * 9), (8, 8)).shape == (3, 8, 8)
    assert fit_image(columns(*[100] * 9), (8, 20)).unique().tolist() == [100]


def test_an_image_is_turned_as_its_exif_says(tmp_path):
    image, exif = columns(0, 255), Image.Exif()
    exif[0x0112] = 6  # show it turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    cut = read_sample(tmp_path / "a.png", (3, 2, 4))
    assert cut[0].tolist() == [[0] * 4, [255] * 4]


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(DataError, match=r"a\.png cannot be read as an image"):
        read_sample(tmp_path / "a.png", (3, 2, 2))


def test_scenes_are_a_function_of_the_seed():
    first = render_scenes(4, (3, 16, 16), seed=1, held_out=False)
    assert first.dtype == torch.uint8 and first.shape == (4, 3, 16, 16)
    assert torch.equal(first, render_scenes(4, (3, 16, 16), seed=1, held_out=False))
    assert not torch.equal(first, render_scenes(4, (3, 16, 16), seed=2, held_out=False))
    large = render_scenes(4, (3, 64, 64), seed=1, held_out=False).float()
    means = large.unflatten(2, (16, 4)).unflatten(4, (16, 4)).mean((3, 5))
    assert (means - first.float()).abs().max() <= 1.0  # areas, up to two roundings


def test_trained_and_held_out_scenes_show_other_combinations(monkeypatch):
    from flowrl.tokenizer import images

    seen = {True: set(), False: set()}
    sample = images.sample_scene

    def noted(request, rng):
        seen[is_held_out(request)].add(request.combination)
        return sample(request, rng)

    monkeypatch.setattr(images, "sample_scene", noted)
    render_scenes(40, (3, 16, 16), seed=0, held_out=False)
    assert seen[False] and not seen[True]
    render_scenes(40, (3, 16, 16), seed=0, held_out=True)
    assert seen[True]
    assert any(is_held_out(r) for skill in SKILLS for r in requests(skill))


@pytest.fixture
def folder(tmp_path):
    for i in range(10):
        path = tmp_path / "images" / ("a" if i % 2 else "b") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns(*[20 * i] * 6).save(path)
    (tmp_path / "images" / ".hidden").mkdir()
    columns(1).save(tmp_path / "images" / ".hidden" / "x.png")
    return tmp_path / "images"


def greys(source):
    return {int(source.read(i, (3, 4, 4), (0.5, 0.5)).unique()) for i in range(len(source))}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_folders_held_out_images_are_never_trained_on(folder, seed):
    data = DataSection(source=str(folder), held_out=4)
    trained, held_out = load_images(data, (3, 4, 4), seed=seed, num_held_out=3, where="a.yaml")
    assert len(trained) == 6 and len(held_out) == 3
    assert not greys(trained) & greys(held_out)
    assert greys(trained) | greys(held_out) <= {20 * i for i in range(10)}
    fewer = DataSection(source=str(folder), held_out=4, num_images=2)
    same = load_images(fewer, (3, 4, 4), seed=7, num_held_out=3, where="a.yaml")[1]
    assert greys(same) == greys(held_out)  # whatever is trained on, whatever the seed


def test_too_few_images_are_refused(folder):
    for section, words in (
        (DataSection(source=str(folder), held_out=10), "holds 10 images"),
        (DataSection(source=str(folder), held_out=2), "only data.held_out=2"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_images(section, (3, 4, 4), seed=0, num_held_out=3, where="a.yaml")


def test_a_dataset_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install -e '\.\[datasets\]'"):
        load_images(DataSection(source="a/b"), (3, 4, 4), seed=0, num_held_out=3, where="a.yaml")


@pytest.mark.parametrize("layout", ["parquet", "saved"])
def test_a_dataset_on_the_disk_is_read(tmp_path, monkeypatch, layout):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pictures = []
    for i in range(10):
        stream = io.BytesIO()
        columns(*[20 * i] * 6).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    folder = tmp_path / "parquet"
    folder.mkdir()
    table = pyarrow.table({"picture": pictures, "label": list(range(10))})
    parquet.write_table(table, folder / "train.parquet")
    if layout == "saved":
        folder = tmp_path / "saved"
        datasets.load_dataset(str(tmp_path / "parquet")).save_to_disk(str(folder))
    data = DataSection(source=str(folder), image_column="picture", held_out=4)
    trained, held_out = load_images(data, (3, 4, 4), seed=0, num_held_out=3, where="a.yaml")
    assert len(trained) == 6 and len(held_out) == 3 and not greys(trained) & greys(held_out)
    for key, value in (("image_column", "pictrue"), ("split", "tarin")):
        wrong = data.model_copy(update={key: value})
        with pytest.raises(ConfigError, match=f"data.{key}={value}"):
            load_images(wrong, (3, 4, 4), seed=0, num_held_out=3, where="a.yaml")


# --------------------------------------------------------------------------- batches


def test_an_epoch_shows_every_image_once():
    cut = Cut(batch_size=6, micro_batch_size=3)
    drawn = [
        numbers_of(step, micro, num_samples=9, cut=cut, seed=0)[0]
        for step in range(3)
        for micro in range(2)
    ]
    order = np.concatenate(drawn)  # 18 places are two epochs of 9
    assert sorted(order[:9]) == list(range(9)) == sorted(order[9:])
    assert not np.array_equal(order[:9], order[9:])
    other = numbers_of(0, 0, num_samples=9, cut=cut, seed=1)[0]
    assert not np.array_equal(other, drawn[0])


def counted(cut, start=0, **how):
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2)
    batches = ImageBatches(Tensors(images), (3, 2, 2), cut, seed=3, **how)
    steps = batches_of(batches, start=start, steps=4)
    return [[part[:, 0, 0, 0].tolist() for part in step] for step in steps]


def test_processes_share_the_batches_of_one():
    alone = counted(Cut(8, 2))
    first, second = (counted(Cut(8, 2, rank, 2)) for rank in range(2))
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(first, second, strict=True)] == alone
    assert counted(Cut(8, 2), start=2) == alone[2:]


def test_reading_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    counted(Cut(8, 2), flip=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_about_half_of_the_images_are_mirrored():
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    image[..., 1] = 255
    batches = ImageBatches(Tensors(image), (3, 2, 2), Cut(64, 64), seed=0, flip=True)
    mirrored = (batches[0, 0][:, 0, 0, 0] == 255).sum()
    assert 16 < mirrored < 48
    assert torch.equal(batches[0, 0], batches[0, 0])


def test_a_random_crop_is_drawn_anew_every_time(folder):
    from flowrl.tokenizer.images import Files

    ramp = folder / "ramp.png"
    columns(*range(0, 160, 2)).save(ramp)
    batches = ImageBatches(Files((ramp,)), (3, 4, 4), Cut(8, 8), seed=0, random_crop=True)
    lefts = batches[0, 0][:, 0, 0, 0]
    assert len(lefts.unique()) > 4 and torch.equal(lefts, batches[0, 0][:, 0, 0, 0])
    centred = ImageBatches(Files((ramp,)), (3, 4, 4), Cut(8, 8), seed=0)
    assert centred[0, 0][:, 0, 0, 0].unique().tolist() == [76]  # (80 - 4) / 2 = 38th column
