"""A comparison's runs as real processes: skipped, resumed, reported, refused.

Kills, among others: a finished run that is run again; a failure that stops the others; Ctrl-C that
loses a run or leaves one behind; a result of another configuration taken for this one's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowrl.compare.run import is_finished, run_all
from flowrl.compare.spec import load_comparison
from flowrl.errors import ConfigError
from flowrl.train.track import read_metrics
from tests.artefacts.tiny_run import write_config

ROOT = Path(__file__).resolve().parents[2]
FILE = """\
name: tiny
seeds: [0]
budget: {{steps: 2}}
overrides: {{method.args.interval: 9, optim.lr: {lr}}}
runs:
  - {{name: bad, config: full.yaml, overrides: {{data.train: "{folder}/mine.txt"}}}}
  - {{name: good, config: full.yaml}}
"""


def write_file(folder: Path, text: str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def launch(file: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flowrl", "compare", str(file), *options],
        cwd=file.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def compare(file: Path, *options: str, code: int = 0) -> str:
    process = launch(file, *options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out + err
    return out + err


def test_a_failure_is_reported_and_repeated_while_finished_runs_are_kept(tmp_path: Path) -> None:
    write_config(tmp_path, "full")
    file = write_file(tmp_path, FILE.format(folder=tmp_path, lr=0.02))
    text = compare(file, "--jobs", "2", code=1)
    assert "bad, seed 0: failed with exit code 2" in text and "mine.txt: no such file" in text
    assert "run the same command again" in text and "  | " in text
    assert "good, seed 0: score 0." in text and "2 steps" in text
    good, bad = (tmp_path / f"runs/tiny/{name}_seed0" for name in ("good", "bad"))
    assert is_finished(good) and not is_finished(bad)
    page = tmp_path / "runs/tiny/compare.html"
    assert "bad, seed 0: nothing to show yet." in page.read_text()

    (tmp_path / "mine.txt").write_text("a red square\na blue circle\na green star\n")
    # What a run leaves that is killed before its first checkpoint: nothing to go on from.
    (bad / "metrics.jsonl").write_text('{"step": 0, "eval/score": 9.0}\n')
    written = (good / "metrics.jsonl").stat().st_mtime_ns
    text = compare(file)
    assert "good, seed 0: finished before, score 0." in text
    assert (good / "metrics.jsonl").stat().st_mtime_ns == written
    assert is_finished(bad) and "nothing to show" not in page.read_text()
    assert [row["step"] for row in read_metrics(bad / "metrics.jsonl")] == [0, 1, 2, 2]
    data = json.loads((tmp_path / "runs/tiny/compare.json").read_text())
    assert set(data["table"]["end"]["entries"]) == {"good", "bad"} and not data["lacking"]
    # 8 images, 4 steps of which the first is shared by the groups and 2 are trained:
    # the rollout takes 2 + 3 * 8 evaluations, training 2 + 8.
    assert data["table"]["evaluations_per_step"]["entries"]["good"]["mean"] == 36

    write_file(tmp_path, FILE.format(folder=tmp_path, lr=0.01))
    comparison = load_comparison(file, out=tmp_path / "runs/tiny")
    with pytest.raises(ConfigError) as caught:
        run_all(comparison, jobs=1, cores=1, say=print)
    message = str(caught.value)
    assert "bad, seed 0 of another configuration" in message
    assert "optim.lr: 0.02 in the folder, 0.01 now" in message and "--out" in message


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    write_config(tmp_path, "full")
    text = FILE.format(folder=tmp_path, lr=0.02).replace("steps: 2", "evaluations: 216")
    entries = [line for line in text.splitlines() if "name: bad" not in line]
    file = write_file(tmp_path, "\n".join(entries) + "\n")
    run = tmp_path / "runs/tiny/good_seed0"
    process = launch(file)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run / "metrics.jsonl")) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    other = launch(file)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    refusal = other.communicate(timeout=300)[1]
    assert process.returncode == 130, out + err
    assert "stopping: waiting for 1" in out
    if other.returncode == 2:  # it came before the first one had stopped
        assert "good, seed 0 is going on" in refusal
        assert any(run.glob("checkpoints/step_*")) and not is_finished(run)
        compare(file)
    assert is_finished(run)
    assert "run.resume=latest" in (run / "log.txt").read_text()
    # A step takes 36 network evaluations, so the sixth reaches 216.
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["perf/network_evals"] for row in rows] == [36.0 * n for n in range(1, 7)]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "run.max_evaluations=216")


def test_a_budget_of_evaluations_is_kept_across_a_resume(tmp_path: Path) -> None:
    from tests.training.toy_run import FLOW, toy_trainer
    from tests.training.toy_run import write_config as write_toy

    config = write_toy(tmp_path, FLOW)
    # 64 samples, 6 steps in rollout and 5 in training, each evaluated once: 704 a step.
    assert toy_trainer(config, "run.steps=2").run() == "finished"
    again = toy_trainer(
        config, "run.steps=9", "run.max_evaluations=2112", "run.resume=latest"
    )  # fmt: skip
    assert again.run() == "stopped" and again.network_evals == 3 * 704
    rows = read_metrics(tmp_path / "runs/toy/metrics.jsonl")
    assert max(row["step"] for row in rows) == 3


def test_guidance_counts_twice_in_training_as_in_rollout(tmp_path: Path) -> None:
    from tests.training.toy_run import FLOW, toy_trainer
    from tests.training.toy_run import write_config as write_toy

    guided = toy_trainer(write_toy(tmp_path, FLOW), "run.steps=1", "model.guidance_scale=2.0")
    guided.run()
    assert guided.network_evals == 2 * 704
