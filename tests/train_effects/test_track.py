"""The metrics file is valid JSON, documented, and holds every step once, resumes included."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from flowrl.errors import ConfigError, MissingDependency, ShapeError
from flowrl.train import keys, wandb_run
from flowrl.train.keys import KEYS, match_key
from flowrl.train.track import Tracker, read_metrics, require_trackers, to_pixels
from flowrl.train.wandb_run import Sample

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
    for wrong in ("reward//mean", "reward/a/b/mean", "train/ratio_mean/x", "xtrain/loss", ""):
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
    with pytest.raises(ShapeError, match=r"got \(1, 1, 4, 4\), 1 and 0"):
        track().log_images(1, "samples/eval", torch.zeros(1, 1, 4, 4), ["a"])
    with pytest.raises(ShapeError, match=r"got \(1, 3, 4, 4\), 2 and 0"):
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


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B without an account, and without what this machine says about it."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its variables once in a process
    for name in ("MODE", "RUN_ID", "SWEEP_ID", "RUN_GROUP", "SWEEP_PARAM_PATH"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return monkeypatch


def wandb_runs(tmp_path):
    """(id, records) of each offline run, the oldest first."""
    files = sorted((tmp_path / "run").rglob("run-*.wandb"))
    return [(file.stem.removeprefix("run-"), complete_records(file)) for file in files]


def complete_records(file):
    """All records: W&B's service may write the last ones after `finish` has returned."""
    message = pytest.importorskip("google.protobuf.message")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            found = list(wandb_records(file))
        except (message.DecodeError, struct.error):
            found = []
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end")


def run_record(records):
    return next(record.run for record in records if record.HasField("run"))


def test_wandb_offline_gets_config_tags_rows_and_one_id(track, tmp_path, offline):
    (tmp_path / "run").mkdir()
    method = {"name": "x", "paper": "p", "rows": [["method", "x"], ["clip_range", "1e-4"]]}
    (tmp_path / "run/method.json").write_text(json.dumps(method))
    (tmp_path / "run/env.json").write_text('{"flowrl": "0.1", "commit": "abc+", "platform": "L"}')
    tracker = track(["wandb"], name="n", tags=["t"], group="g", mode="offline")
    tracker.log(1, {"train/loss": 0.5, "train/kl": float("nan")})
    tracker.log_images(1, "samples/train", torch.rand(1, 3, 8, 8), ["a red circle"])
    tracker.finish()
    identity = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    track(["wandb"], resumed_step=1, mode="offline", group="g").finish()
    runs = wandb_runs(tmp_path)
    assert [name for name, _ in runs] == [identity, identity]
    assert {run_record(records).run_group for _, records in runs} == {"g"}
    found = runs[0][1]
    run = run_record(found)
    assert (run.display_name, list(run.tags), run.project) == ("n", ["t"], "flowrl")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["run"] == CONFIG["run"] and config["rewards"] == CONFIG["rewards"]
    assert config["about"] == {
        "flowrl": "0.1", "commit": "abc+", "method": {"method": "x", "clip_range": "1e-4"},
    }  # fmt: skip
    history = [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert history[0]["step"] == "1" and history[0]["train/loss"] == "0.5"
    assert "train/kl" not in history[0] and history[0]["track/nonfinite"] == "1"
    assert "a red circle" in history[1]["samples/train/captions"]


def test_wandb_gets_a_table_of_samples_and_a_summary_of_the_best(track, tmp_path, offline):
    tracker = track(["wandb"], mode="offline")
    seed = 2**62 + 1  # a browser's number would lose the 1
    samples = [
        Sample("a red circle", seed, 4, {"strict": 1.0, "graded": 0.5}),
        Sample("a blue star", seed, 5, {"strict": float("nan"), "graded": 0.25}),
    ]
    tracker.log(2, {"eval/score": 0.75, "eval/diversity": 0.9, "train/loss": 9.0})
    tracker.log(4, {"eval/score": 0.5, "eval/a/mean": -1.0, "eval/diversity": 0.1})
    images = torch.rand(2, 3, 8, 8)
    tracker.log_images(4, "samples/eval", images, ["a", "b"], samples)
    with pytest.raises(ShapeError, match=r"N samples or none, got \(2, 3, 8, 8\), 2 and 1"):
        tracker.log_images(4, "samples/eval", images, ["a", "b"], samples[:1])
    (tmp_path / "run/status.json").write_text('{"state": "stopped", "minutes": 1.5, "step": 4}')
    tracker.finish()
    (file,) = (tmp_path / "run").rglob("*.table.json")
    data = json.loads(file.read_text())
    assert data["columns"] == ["step", "image", "prompt", "seed", "sample", "strict", "graded"]
    rows = [[cell for i, cell in enumerate(row) if i != 1] for row in data["data"]]
    assert rows == [
        [4, "a red circle", str(seed), 4, 1.0, 0.5],
        [4, "a blue star", str(seed), 5, None, 0.25],
    ]
    summary, tables = {}, []
    for record in wandb_runs(tmp_path)[0][1]:
        if record.HasField("artifact"):
            tables.append(sorted(entry.path for entry in record.artifact.manifest.contents))
        if record.HasField("summary"):
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    ((*pictures, table),) = tables  # W&B shows a table with its pictures from an artifact
    assert table == "samples/eval_table.table.json" and len(pictures) == 2
    assert all(path.endswith(".png") for path in pictures)
    best = {key: value for key, value in summary.items() if key.startswith(("best/", "run/"))}
    assert best == {
        "best/eval/score": 0.75, "best/step": 2, "best/eval/a/mean": -1.0,
        "run/state": "stopped", "run/minutes": 1.5,
    }  # fmt: skip


def test_an_agent_decides_on_the_identity_of_a_sweep_s_run(track, tmp_path, offline):
    offline.setenv("WANDB_RUN_ID", "agent123")
    offline.setenv("WANDB_SWEEP_ID", "sweep456")
    tracker = track(["wandb"], mode="offline", name="n", entity="mine")
    assert (tmp_path / "run/wandb_id.txt").read_text() == "agent123\n"
    assert tracker.accelerator.trackers[0].tracker.sweep_id == "sweep456"
    tracker.finish()
    assert [name for name, _ in wandb_runs(tmp_path)] == ["agent123"]
    for name in ("RUN_ID", "SWEEP_ID"):
        offline.delenv(f"WANDB_{name}")
    sys.modules["wandb"].teardown()
    track(["wandb"], mode="offline", resumed_step=0).finish()  # by hand, without the agent
    assert [name for name, _ in wandb_runs(tmp_path)] == ["agent123", "agent123"]
    offline.setenv("WANDB_RUN_ID", "other")
    with pytest.raises(ConfigError, match=r"is the W&B run agent123, but WANDB_RUN_ID=other"):
        track(["wandb"], mode="offline", resumed_step=0)


def test_a_run_that_is_resumed_online_is_asked_for_by_its_id(tmp_path, monkeypatch):
    for name in ("RUN_ID", "SWEEP_ID"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    options = {"name": "n", "entity": "team", "mode": "online", "tags": [], "group": "g"}
    first = wandb_run.arguments(tmp_path / "run", **options)
    again = wandb_run.arguments(tmp_path / "run", **options)
    assert first == again and first["id"] == (tmp_path / "run/wandb_id.txt").read_text().strip()
    assert (first["resume"], first["group"], first["entity"]) == ("allow", "g", "team")
    assert wandb_run.arguments(tmp_path / "other", **options)["id"] != first["id"]
    # wandb would say of each run of a sweep that it ignores these.
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    in_a_sweep = wandb_run.arguments(tmp_path / "run", **options)
    assert not {"id", "entity"} & set(in_a_sweep) and in_a_sweep["group"] == "g"
