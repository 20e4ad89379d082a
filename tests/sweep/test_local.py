"""A local sweep of real trainings: made, kept, tried again, ended early.

Kills, among others: a line that `flowrl train` does not take; a finished run that is run again; a
failure that stops the others; a run that is left behind and goes on, or ends without saving.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.train.track import METRICS, read_metrics
from tests.artefacts.tiny_run import write_config

pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parents[2]
FILE = """\
program: flowrl
name: tiny
method: grid
metric: {{name: {metric}, goal: {goal}}}
parameters:
  {parameters}
command: [flowrl, train, full.yaml, "run.name=${{oc.env:WANDB_RUN_ID}}", method.args.interval=9,
          {more} "${{args_no_hyphens}}"]
"""


def write_file(
    folder: Path,
    parameters: str,
    *,
    metric: str = "eval/score",
    goal: str = "maximize",
    more: str = "",
    end: str = "",
) -> Path:
    write_config(folder, "full")
    path = folder / "tiny.yaml"
    text = FILE.format(parameters=parameters, metric=metric, goal=goal, more=more)
    path.write_text(text + end)
    return path


def launch(file: Path, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_SWEEP_ID": "an agent's", "WANDB_RUN_ID": "an agent's"}
    return subprocess.Popen(
        [sys.executable, "-m", "flowrl", "sweep", str(file), "--local", *options],
        cwd=file.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sweep(file: Path, *options: str, code: int = 0) -> str:
    process = launch(file, *options)
    try:
        out, err = process.communicate(timeout=1200)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it ends its runs
        raise
    assert process.returncode == code, out + err
    return out + err


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as stream:
        return {line["run"]: line for line in csv.DictReader(stream)}


def test_finished_runs_are_kept_and_failed_ones_tried_again(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    data = f"data.train: {{values: [shapes/train, {mine}]}}"
    file = write_file(tmp_path, data)
    folder = tmp_path / "out"
    text = sweep(file, "--jobs", "2", "--output", str(folder), code=1)
    assert f"trial_0001 (data.train={mine}): failed with exit code 2" in text
    assert "mine.txt: no such file" in text and "2 steps" in text
    assert {name: row["state"] for name, row in table(folder).items()} == {
        "trial_0000": "finished", "trial_0001": "open",
    }  # fmt: skip
    assert (folder / "results.png").exists()
    log = (folder / "trial_0000/log.txt").read_text()
    assert "-m flowrl train full.yaml method.args.interval=9 data.train=shapes/train" in log
    assert not (folder / "trial_0000/wandb").exists()  # no tracker was asked for

    mine.write_text("a red square\na blue circle\na green star\n")
    written = (folder / "trial_0000" / METRICS).stat().st_mtime_ns
    text = sweep(file, "--output", str(folder))
    assert "trial_0001" in text and "trial_0000 (" not in text
    assert (folder / "trial_0000" / METRICS).stat().st_mtime_ns == written
    rows = table(folder)
    assert {row["state"] for row in rows.values()} == {"finished"} and len(rows) == 2
    scores = [row["eval/score"] for row in read_metrics(folder / "trial_0001" / METRICS)
              if "eval/score" in row]  # fmt: skip
    assert float(rows["trial_0001"]["best"]) == max(scores) and len(scores) == 2


def test_a_run_that_is_left_behind_ends_early_and_stays_ended(tmp_path: Path) -> None:
    # The rate falls to 0 over the steps, so that of the short run is lower from the start; the
    # other one would take hours.
    file = write_file(
        tmp_path,
        "run.steps: {values: [3, 1000000]}",
        metric="train/lr",
        goal="minimize",
        more="optim.schedule=linear, checkpoint.every=0,",
        end="early_terminate: {type: hyperband, min_iter: 1}\n",
    )
    text = sweep(file, "--output", "out")
    assert "trial_0001 (run.steps=1000000): train/lr 0.0" in text and ", ended early" in text
    rows = table(tmp_path / "out")
    assert [row["state"] for row in rows.values()] == ["finished", "ended early"]
    ended = json.loads((tmp_path / "out/trial_0001/status.json").read_text())
    assert (ended["state"], ended["reason"]) == ("stopped", "a signal")
    assert any((tmp_path / "out/trial_0001/checkpoints").glob("step_*"))  # it saved
    assert "trial_0001 (" not in sweep(file, "--output", "out")
    assert table(tmp_path / "out") == rows
    changed = file.read_text().replace("[3, 1000000]", "[4, 1000000]")
    file.write_text(changed)
    message = sweep(file, "--output", "out", code=2)
    assert "parameters.run.steps.values.0: 3 there, 4 now" in message
