"""Clips through `flowrl tokenizer`: files in, training, tokens, files out.

Kills, among others: frames in another order, or of one part of the file only; frames that are
cropped or mirrored differently; equal neighbours that are written as one frame.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.errors import ConfigError, DataError, MissingDependency
from flowrl.pretrain.batches import Cut
from flowrl.tokenizer.batches import ImageBatches
from flowrl.tokenizer.files import read_sample, sample_files, write_png
from flowrl.tokenizer.images import Files, Tensors, as_pictures, load_images, render_scenes
from flowrl.tokenizer.schema import DataSection
from flowrl.tokenizer.tokenfile import read_tokens
from flowrl.train.track import read_metrics
from tests.tokenizer_cli.test_files import invoke, saved
from tests.tokenizer_cli.toys import GRID, write_config
from tokenizers_vis.registry import load_pretrained

LARP = {
    "name": "larp",
    "args": {
        "image_size": 16, "num_frames": 4, "patch_frames": 2, "num_tokens": 4, "vocab": 16,
        "code_dim": 4, "dim": 16, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1,
    },
}  # fmt: skip
SHAPE = (4, 3, 16, 16)


def save_grey(file: Path, *levels: int, **how) -> Path:
    """A file of 16 x 16 whose frames have these grey levels; of one, a still."""
    file.parent.mkdir(parents=True, exist_ok=True)
    first, *others = (Image.new("RGB", (16, 16), (level,) * 3) for level in levels)
    if file.suffix == ".webp":
        how["lossless"] = True
    if others:
        how |= {"save_all": True, "append_images": others, "duration": 100}
    first.save(file, **how)
    return file


def levels(clip: torch.Tensor) -> list[int]:
    assert all(len(frame.unique()) == 1 for frame in clip)
    return clip[:, 0, 0, 0].tolist()


# --------------------------------------------------------------------------- reading


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
@pytest.mark.parametrize(
    ("num", "expected"),
    [(1, [30]), (2, [10, 40]), (3, [10, 30, 50]), (6, [0, 10, 20, 30, 40, 50])],
)
def test_the_frames_in_the_middle_of_equal_parts_are_read(tmp_path, suffix, num, expected):
    file = save_grey(tmp_path / f"a{suffix}", 0, 10, 20, 30, 40, 50)
    clip = read_sample(file, (num, 3, 8, 8))
    assert clip.dtype == torch.uint8 and clip.shape == (num, 3, 8, 8)
    assert levels(clip) == expected


def test_a_picture_before_the_animation_is_no_frame(tmp_path):
    file = save_grey(tmp_path / "a.png", 99, 0, 10, default_image=True)
    assert levels(read_sample(file, (2, 3, 8, 8))) == [0, 10]


def test_folders_of_numbered_stills_are_clips(tmp_path):
    for number, level in ((2, 20), (10, 100), (1, 10)):  # by number: not 1, 10, 2
        save_grey(tmp_path / "walk" / f"frame{number}.png", level)
    save_grey(tmp_path / "class" / "1.png", 1, 2, 3)  # numbered, but clips of their own
    save_grey(tmp_path / "class" / "2.png", 4, 5, 6)
    save_grey(tmp_path / "poster.jpg", 7)
    save_grey(tmp_path / ".hidden" / "a.gif", 1, 2, 3)
    found = sample_files(tmp_path, (3, 3, 8, 8))
    assert [str(f.relative_to(tmp_path)) for f in found] == ["class/1.png", "class/2.png", "walk"]
    assert levels(read_sample(tmp_path / "walk", (3, 3, 8, 8))) == [10, 20, 100]
    assert sample_files(tmp_path / "walk", (3, 3, 8, 8)) == (tmp_path / "walk",)
    assert len(sample_files(tmp_path, (3, 8, 8))) == 6  # all stills, and animations' first frames


@pytest.mark.parametrize("name", ["a.gif", "a.png", "walk"])
def test_too_few_frames_are_an_error_that_names_the_file(tmp_path, name):
    if name == "walk":
        for number in range(3):
            save_grey(tmp_path / name / f"{number}.png", number)
    else:
        save_grey(tmp_path / name, 0, 10, 20)
    with pytest.raises(DataError, match=rf"{name} has 3 frames, .* clips of 4; leave it out"):
        read_sample(tmp_path / name, SHAPE)


def test_a_file_that_is_no_clip_is_named(tmp_path):
    (tmp_path / "a.gif").write_text("no")
    (tmp_path / "walk").mkdir()
    (tmp_path / "walk/1.png").write_text("no")
    whole = save_grey(tmp_path / "b.gif", 0, 10, 20, 30).read_bytes()
    (tmp_path / "b.gif").write_bytes(whole[:30])
    for name in ("a.gif", "b.gif", "none.gif"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as a clip of 4 frames"):
            read_sample(tmp_path / name, SHAPE)
    with pytest.raises(DataError, match="walk cannot be read as a clip of 1 frames"):
        read_sample(tmp_path / "walk", (1, 3, 16, 16))


def test_a_video_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"a\.mp4 is a video.*pip install -e '\.\[video\]'"):
        read_sample(tmp_path / "a.mp4", SHAPE)


@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "ffv1"), (".mp4", "mpeg4")])
def test_a_video_is_read(tmp_path, suffix, codec):
    av = pytest.importorskip("av")
    file = tmp_path / f"a{suffix}"
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for level in range(0, 240, 20):  # 12 frames
            still = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(still, format="rgb24")))
        container.mux(stream.encode())
    clip = read_sample(file, SHAPE)
    means = clip.float().mean((1, 2, 3))
    assert (means - torch.tensor([20.0, 80.0, 140.0, 200.0])).abs().max() < 6
    with pytest.raises(DataError, match="has 12 frames, and the tokenizer takes clips of 13"):
        read_sample(file, (13, 3, 16, 16))
    file.write_text("no")
    with pytest.raises(DataError, match="cannot be read as a clip"):
        read_sample(file, (2, 3, 16, 16))


# --------------------------------------------------------------------------- writing


def test_a_written_clip_is_read_back_bit_by_bit(tmp_path):
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 256, (5, 8, 6, 3), np.uint8))
    noise[2] = noise[1]  # nothing moves
    noise[4] = 0
    noise[3] = noise[4]
    write_png(noise, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.n_frames == 5 and image.info["duration"] == 125
    assert torch.equal(read_sample(tmp_path / "a.png", (5, 3, 8, 6)), noise.permute(0, 3, 1, 2))
    write_png(noise[:1], tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        assert not image.is_animated


# --------------------------------------------------------------------------- sources


def test_shapes_move_if_the_tokenizer_takes_clips():
    clips = render_scenes(6, SHAPE, seed=0, held_out=False)
    assert clips.dtype == torch.uint8 and clips.shape == (6, *SHAPE)
    steps = clips[:, 1:].float() - clips[:, :-1].float()
    assert (steps.abs().flatten(2).max(2).values > 8).all()  # something moved in every step
    assert (clips.float().mean((1, 3, 4)).std(1) < 60).all()
    data = DataSection(source="shapes", num_images=3)
    trained, held_out = load_images(data, SHAPE, seed=0, num_held_out=2, where="a.yaml")
    assert torch.equal(trained.images, clips[:3]) and held_out.images.shape == (2, *SHAPE)
    with pytest.raises(ConfigError, match="renders squares of at most 64"):
        load_images(data, (4, 3, 16, 32), seed=0, num_held_out=2, where="a.yaml")


def test_a_folder_of_clips_is_split_as_one_of_images(tmp_path):
    for number in range(8):
        save_grey(tmp_path / f"{'ab'[number % 2]}" / f"c{number}.gif", *range(number, number + 4))
    data = DataSection(source=str(tmp_path), held_out=3)
    pair = load_images(data, SHAPE, seed=0, num_held_out=2, where="a.yaml")
    first, second = (
        {levels(source.read(i, SHAPE, (0.5, 0.5)))[0] for i in range(len(source))}
        for source in pair
    )
    assert len(first) == 5 and len(second) == 2 and not first & second
    with pytest.raises(ConfigError, match=r"holds 8 clips, and data\.held_out=8"):
        more = data.model_copy(update={"held_out": 8})
        load_images(more, SHAPE, seed=0, num_held_out=2, where="a.yaml")


@pytest.mark.parametrize(("source", "words"), [("a/b", "is no such folder"), (None, "holds none")])
def test_datasets_hold_no_clips(tmp_path, source, words):
    data = DataSection(source=source or str(tmp_path))
    with pytest.raises(ConfigError, match=f"{words}: .*read as images only"):
        load_images(data, SHAPE, seed=0, num_held_out=2, where="a.yaml")


def ramp(file: Path) -> Path:
    """Three frames, 4 x 20: columns of 0, 10, 20 ... in all of them, brighter by 3 each."""
    frames = [
        Image.fromarray(np.tile(np.arange(0, 200, 10, dtype=np.uint8) + 3 * i, (4, 1)))
        for i in range(3)
    ]
    frames[0].save(file, save_all=True, append_images=frames[1:])
    return file


def test_all_frames_of_a_clip_are_cut_and_mirrored_alike(tmp_path):
    shape = (3, 3, 4, 4)
    source = Files((ramp(tmp_path / "a.png"),))
    batch = ImageBatches(source, shape, Cut(32, 32), seed=0, random_crop=True, flip=True)[0, 0]
    assert batch.shape == (32, *shape)
    assert torch.equal(batch[:, 1] - 3, batch[:, 0]) and torch.equal(batch[:, 2] - 6, batch[:, 0])
    rows = batch[:, 0, 0, 0].int()
    steps = (rows[:, 1:] - rows[:, :-1]).tolist()
    rising, falling = steps.count([10] * 3), steps.count([-10] * 3)
    assert rising + falling == 32 and min(rising, falling) > 4
    assert len(rows.min(1).values.unique()) > 4  # cut at many places
    centred = ImageBatches(source, shape, Cut(2, 2), seed=0)[0, 0]
    assert centred[0, 0, 0, 0].tolist() == [80, 90, 100, 110]


def test_mirroring_leaves_the_clips_in_memory_alone():
    clips = torch.arange(2 * 2 * 3 * 2 * 2, dtype=torch.uint8).view(2, 2, 3, 2, 2)
    before = clips.clone()
    batch = ImageBatches(Tensors(clips), (2, 3, 2, 2), Cut(16, 16), seed=0, flip=True)[0, 0]
    assert torch.equal(clips, before)
    seen = {tuple(each.flatten().tolist()) for each in batch}
    wanted = {tuple(c.flatten().tolist()) for c in (*clips, *clips.flip(-1))}
    assert seen == wanted


def test_a_picture_of_a_clip_has_frames_side_by_side():
    clips = torch.rand(2, 10, 3, 4, 5)
    pictures = as_pictures(clips)
    assert pictures.shape == (2, 3, 4, 4 * 5 + 2)
    for place, frame in enumerate((0, 3, 6, 9)):
        assert torch.equal(pictures[..., 5 * place : 5 * (place + 1)], clips[:, frame])
    assert (pictures[..., -2:] == 1).all()
    assert as_pictures(clips[:, :2]).shape == (2, 3, 4, 2 * 5 + 2)
    assert torch.equal(as_pictures(clips[:, 0]), clips[:, 0])  # images as they are


# --------------------------------------------------------------------------- the command


def test_clips_are_trained_on_encoded_and_drawn_again(tmp_path):
    config = write_config(tmp_path, tokenizer=LARP, run={"steps": 3})
    done = invoke("train", config)
    assert done.exit_code == 0, done.output
    assert "16 bits per clip" in done.output  # 4 tokens of 16 codes
    assert "shapes: 20 clips of 4 x 3 x 16 x 16, 4 others measured" in done.output
    run = tmp_path / "runs/toy"
    card = (run / "final/README.md").read_text()
    assert "4 tokens of one clip 4 x 3 x 16 x 16" in card and "On 4 held-out clips" in card
    with Image.open(run / "samples/reconstructions_000003.png") as grid:
        assert grid.size == (3 * 66 + 2 * 2, 2 * 16 + 2)  # 3 clips of 4 frames; original and drawn
    tokenizer = load_pretrained(run / "final")
    held_out = render_scenes(4, SHAPE, seed=0, held_out=True)
    (tmp_path / "in").mkdir()
    for name, clip in zip("abcd", held_out, strict=True):
        write_png(clip.permute(0, 2, 3, 1).contiguous(), tmp_path / "in" / f"{name}.png")
    with torch.no_grad():
        tokens = tokenizer.encode(held_out.float() / 255)
        drawn = tokenizer.decode(tokens)
    measured = [r for r in read_metrics(run / "metrics.jsonl") if "eval/psnr" in r][-1]
    error = (drawn - held_out.float() / 255).square().flatten(1).mean(1)
    assert measured["eval/psnr"] == pytest.approx(float(-10 * error.log10().mean()), abs=1e-3)
    file, out = tmp_path / "tokens.safetensors", tmp_path / "out"
    done = invoke("encode", run, tmp_path / "in", "--out", file, "--batch-size", 3)
    assert done.exit_code == 0, done.output
    assert "4 x 4 tokens, 16 bits per clip" in done.output
    assert torch.equal(read_tokens(file).ids, tokens.ids)
    done = invoke("decode", file, "--out", out, "--batch-size", 3)
    assert done.exit_code == 0 and "4 clips" in done.output, done.output
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.png", "c.png", "d.png"]
    again = torch.stack([read_sample(out / f"{name}.png", SHAPE) for name in "abcd"])
    assert (again.float() / 255 - drawn).abs().max() < 0.6 / 255 + 1e-4  # rounded to 8 bits


def test_errors_say_whether_images_or_clips_are_expected(tmp_path):
    saved(tmp_path / "clips", LARP)
    saved(tmp_path / "images", GRID)
    still = save_grey(tmp_path / "in" / "a.jpg", 3)
    film = save_grey(tmp_path / "films" / "a.gif", 1, 2, 3, 4)
    for arguments, words in (
        ((tmp_path / "clips", still.parent), "holds no clips (.gif, .png"),
        ((tmp_path / "clips", still), "has 1 frame, and the tokenizer takes clips of 4"),
        ((tmp_path / "images", film.parent), "holds no images (.png, .jpg"),
    ):
        done = invoke("encode", *arguments)
        assert done.exit_code == 2 and words in done.output, done.output
    for command in ("encode", "decode"):
        assert "clip" in invoke(command, "--help").output
