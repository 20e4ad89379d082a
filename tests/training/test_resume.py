"""A killed run, resumed, is bitwise the run that was never stopped. Real processes, real kills.

Kills: any state left out of the checkpoint (moments, schedule, average, update count); noise or
prompts drawn from a global generator; a save that is not atomic; metrics written twice.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flowrl.errors import CheckpointError, ConfigError
from flowrl.train.track import read_metrics
from tests.training.toy_run import FLOW, TOKEN, toy_trainer, write_config

ROOT = Path(__file__).resolve().parents[2]
STABLE = ("perf/", "time")


def launch(config: Path, *overrides: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/training/toy_run.py")
    command = [sys.executable, script, str(config)]
    return subprocess.Popen(
        [*command, *overrides], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def curve(folder: Path) -> list[dict]:
    rows = read_metrics(folder / "runs/toy/metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(STABLE)} for row in rows]


def weights(folder: Path) -> dict:
    return load_file(next((folder / "runs/toy/final").rglob("*.safetensors")))


def assert_same_run(first: Path, second: Path) -> None:
    assert curve(first) == curve(second)
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)


OPTIONS = ["optim.ema_decay=0.9", "optim.schedule=cosine", "optim.warmup_steps=2", "run.steps=10"]


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    toy_trainer(write_config(whole, FLOW), *OPTIONS).run()
    config = write_config(broken, FLOW)
    kills = 0
    for _ in range(30):
        has_checkpoint = any((broken / "runs/toy/checkpoints").glob("step_*"))
        resume = ["run.resume=latest"] if has_checkpoint else []
        if not resume and (broken / "runs/toy").exists():
            # Killed before the first checkpoint: nothing to go on from, so start again.
            subprocess.run(["rm", "-r", str(broken / "runs/toy")], check=True)
        process = launch(config, *OPTIONS, *resume)
        done = len(list((broken / "runs/toy/checkpoints").glob("step_*"))) if resume else 0
        deadline = time.time() + 120
        # Kill at a different point each time: as soon as a half-written save, or a checkpoint or
        # two more than before, can be seen.
        while process.poll() is None and time.time() < deadline and kills < 4:
            folder = broken / "runs/toy/checkpoints"
            half = any(folder.glob(".step_*")) if folder.exists() else False
            count = len(list(folder.glob("step_*"))) if folder.exists() else 0
            if (kills % 2 == 0 and half) or (kills % 2 == 1 and count > done):
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        output, _ = process.communicate(timeout=240)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output.decode()[-2000:]
    else:
        pytest.fail("the run never finished")
    assert kills >= 3
    assert_same_run(whole, broken)


def test_ctrl_c_saves_exits_130_and_resumes_to_the_same_run(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["run.steps=12", "checkpoint.every=0"]
    toy_trainer(write_config(whole, TOKEN), *options).run()
    config = write_config(broken, TOKEN)
    process = launch(config, *options)
    metrics = broken / "runs/toy/metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("train/loss") >= 2:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.005)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output.decode()[-2000:]
    status = json.loads((broken / "runs/toy/status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < 12
    toy_trainer(config, *options, "run.resume=latest").run()
    assert_same_run(whole, broken)


def test_more_steps_can_be_added_but_the_mathematics_cannot_be_changed(tmp_path):
    config = write_config(tmp_path, FLOW)
    toy_trainer(config, "run.steps=2").run()
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        toy_trainer(config, "run.steps=3", "run.resume=latest", "optim.lr=0.5").run()
    with pytest.raises(CheckpointError, match=r"beyond run\.steps"):
        toy_trainer(config, "run.steps=1", "run.resume=latest").run()
    toy_trainer(config, "run.steps=4", "run.resume=latest").run()
    whole = tmp_path / "whole"
    toy_trainer(write_config(whole, FLOW), "run.steps=4").run()
    assert [row for row in curve(tmp_path) if row["step"] != 2] == [
        row for row in curve(whole) if row["step"] != 2
    ]


def test_a_new_run_does_not_overwrite_an_old_one(tmp_path):
    config = write_config(tmp_path, FLOW)
    toy_trainer(config, "run.steps=1").run()
    before = curve(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.resume|run\.name"):
        toy_trainer(config, "run.steps=1").run()
    assert curve(tmp_path) == before
