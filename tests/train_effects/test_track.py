"""The metrics file is valid JSON, documented, and holds every step once, resumes included."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from flowrl.errors import ConfigError, MissingDependency, ShapeError
from flowrl.train import keys
from flowrl.train.keys import KEYS, match_key
from flowrl.train.track import Tracker, read_metrics, require_trackers, to_pixels

CONFIG = {"run": {"name": "a", "seed": 3}, "rewards": [{"name": "x"}]}


@pytest.fixture
def track(tmp_path):
    """Makes trackers on the folder `run` and finishes them."""
    made = []

    def make(trackers=(), **arguments):
        for state in (AcceleratorState, PartialState):
            state._reset_state()
        GradientState._reset_state()
        accelerator = Accelerator(
            cpu=True, log_with=list(trackers) or None, project_dir=tmp_path / "run"
        )
        made.append(
            Tracker(accelerator, tmp_path / "run", config=CONFIG, trackers=trackers, **arguments)
        )
        return made[-1]

    yield make
    for each in made:
        each.finish()


def rows(tmp_path):
    # Strict: neither NaN nor Infinity is JSON, though Python reads them.
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(track, tmp_path):
    tracker = track()
    tracker.log(1, {"train/loss": torch.tensor(0.5), "reward/shapes_strict/mean": 1})
    (row,) = rows(tmp_path)
    assert row.pop("time") > 1e9
    assert row == {"step": 1, "train/loss": 0.5, "reward/shapes_strict/mean": 1.0}


def test_non_finite_values_are_null_and_counted(track, tmp_path):
    nan, inf = float("nan"), float("inf")
    track().log(1, {"train/loss": nan, "train/kl": -inf, "train/lr": 1e-4})
    (row,) = rows(tmp_path)
    del row["time"]
    expected = {"train/loss": None, "train/kl": None, "train/lr": 1e-4, "track/nonfinite": 2.0}
    assert row == {"step": 1, **expected}


def test_an_undocumented_key_is_refused(track, tmp_path):
    tracker = track()
    with pytest.raises(ValueError, match=r"'train/los' .* did you mean 'train/loss'"):
        tracker.log(1, {"train/los": 0.0})
    with pytest.raises(ValueError, match="not a documented metric"):
        tracker.log_images(1, "samples/test", torch.zeros(1, 3, 4, 4), ["a"])
    assert rows(tmp_path) == []


def test_patterns_match_whole_names_only():
    assert match_key("eval/skill/two_objects") == "eval/skill/<tag>"
    assert match_key("eval/shapes_strict/mean") == "eval/<name>/mean"
    for wrong in ("reward//mean", "reward/a/b/mean", "train/loss/x", "xtrain/loss", ""):
        with pytest.raises(ValueError, match="not a documented metric"):
            match_key(wrong)


def test_the_documentation_is_what_the_table_says():
    page = Path(keys.__file__).parents[2] / "docs" / "metrics.md"
    printed = subprocess.run(
        [sys.executable, "-m", "flowrl.train.keys"], capture_output=True, text=True, check=True,
        cwd=page.parents[1],
    ).stdout  # fmt: skip
    assert page.read_text() == printed, "run python -m flowrl.train.keys > docs/metrics.md"
    assert all(f"`{key}`" in printed for key in KEYS)


def test_a_resume_drops_the_rows_of_the_abandoned_continuation(track, tmp_path):
    tracker = track()
    for step in (1, 2, 3, 4):
        tracker.log(step, {"train/loss": step})
    tracker.log(2, {"eval/score": 0.5})  # an evaluation's own row, and out of order
    tracker.finish()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "train/lo')  # the process was killed here
    tracker = track(resumed_step=2)
    assert [(row["step"], row.get("eval/score")) for row in rows(tmp_path)] == [
        (1, None), (2, None), (2, 0.5),
    ]  # fmt: skip
    tracker.log(3, {"train/loss": 33})
    assert rows(tmp_path)[-1]["train/loss"] == 33


def test_a_failure_while_dropping_rows_keeps_the_file(track, tmp_path, monkeypatch):
    tracker = track()
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": step})
    tracker.finish()
    before = rows(tmp_path)

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        track(resumed_step=1)
    assert rows(tmp_path) == before


def test_a_new_run_does_not_write_into_an_old_one(track):
    tracker = track()
    tracker.log(1, {"train/loss": 1})
    tracker.finish()
    with pytest.raises(ConfigError, match=r"already holds the metrics .* run\.resume=latest"):
        track()


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: .*; remove the line"):
        read_metrics(file)


def test_only_the_main_process_writes(tmp_path):
    class Rank1:
        is_main_process = False
        trackers = ()

    tracker = Tracker(Rank1(), tmp_path / "run", config={})
    tracker.log(1, {"train/loss": 1})
    tracker.log_images(1, "samples/train", torch.zeros(1, 3, 4, 4), ["a"])
    tracker.finish()
    assert not (tmp_path / "run").exists()


def test_images_become_a_grid_of_the_same_pixels(track, tmp_path):
    images = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    track().log_images(7, "samples/eval", images, [str(i) for i in range(5)])
    grid = Image.open(tmp_path / "run" / "samples" / "eval_000007.png")
    assert grid.size == (3 * 6 + 2 * 2, 2 * 8 + 2)  # 3 columns, 2 rows, gaps of 2
    fifth = torch.tensor(list(grid.crop((8, 10, 14, 18)).getdata())).reshape(8, 6, 3)
    assert torch.equal(fifth, (images[4] * 255).round().permute(1, 2, 0).long())


def test_pixels_are_clamped_and_nan_is_black():
    images = torch.tensor([-1.0, 2.0, float("nan")]).reshape(1, 3, 1, 1)
    assert to_pixels(images).flatten().tolist() == [0, 255, 0]


def test_images_of_another_shape_are_refused(track):
    with pytest.raises(ShapeError, match=r"got \(1, 1, 4, 4\) and 1"):
        track().log_images(1, "samples/eval", torch.zeros(1, 1, 4, 4), ["a"])
    with pytest.raises(ShapeError, match=r"got \(1, 3, 4, 4\) and 2"):
        track().log_images(1, "samples/eval", torch.zeros(1, 3, 4, 4), ["a", "b"])


def test_a_missing_package_is_named_with_its_remedy(track, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install -e '\.\[tensorboard\]'"):
        track(["tensorboard"])
    with pytest.raises(ConfigError, match="'aim' is not a tracker; one of: wandb, tensorboard"):
        require_trackers(["aim"])


def test_tensorboard_gets_scalars_images_and_purges_after_a_resume(track, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    tracker = track(["tensorboard"])
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": float(step)})
    tracker.log_images(2, "samples/train", torch.rand(2, 3, 4, 4), ["a", "b"])
    tracker.finish()
    tracker = track(["tensorboard"], resumed_step=1)
    tracker.log(2, {"train/loss": 22.0})
    tracker.finish()
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 22.0)]
    assert "config/text_summary" in events.Tags()["tensors"]


def wandb_records(file):
    """The records of an offline W&B run, which is a log in LevelDB's format."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, parts = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<4xHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = internal.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_gets_config_tags_rows_and_one_id(track, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = track(["wandb"], name="n", tags=["t"], mode="offline")
    tracker.log(1, {"train/loss": 0.5, "train/kl": float("nan")})
    tracker.log_images(1, "samples/train", torch.rand(1, 3, 8, 8), ["a red circle"])
    tracker.finish()
    identity = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    track(["wandb"], resumed_step=1, mode="offline").finish()
    files = sorted((tmp_path / "run").rglob("run-*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{identity}"}
    found = list(wandb_records(files[0]))
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.display_name, list(run.tags), run.project) == ("n", ["t"], "flowrl")
    assert {update.key for update in run.config.update} >= {"run", "rewards"}
    history = [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert history[0]["step"] == "1" and history[0]["train/loss"] == "0.5"
    assert "train/kl" not in history[0] and history[0]["track/nonfinite"] == "1"
    assert "a red circle" in history[1]["samples/train/captions"]
