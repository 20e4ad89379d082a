"""What a local sweep does with its runs, told by runs that only count: no model, a second each.

Kills, among others: more runs side by side than jobs; a resumed run that starts anew; a retry of a
run that ended early; a target that stops nothing; values that do not fit and end the sweep.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flowrl.errors import ConfigError
from flowrl.sweep.local import run_local
from flowrl.sweep.spec import load_sweep
from flowrl.sweep.table import read_rows
from flowrl.sweep.trials import open_study
from flowrl.train.processes import is_finished
from flowrl.train.track import read_metrics

pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parents[2]

# Stands for the trainer: reads the config, logs a score of step x lr, keeps a folder as it does.
PROGRAM = """\
#!{python}
import json, signal, sys, time
from pathlib import Path
from flowrl.config import dump_config, load_config
assert sys.argv[1] == "train", sys.argv
config = load_config(sys.argv[2], sys.argv[3:])
run = Path(config.run.output_dir) / config.run.name
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
checkpoints = sorted(run.glob("checkpoints/step_*"))
assert bool(checkpoints) == (config.run.resume == "latest"), (checkpoints, config.run.resume)
step = int(checkpoints[-1].name.partition("_")[2]) if checkpoints else 0
dump_config(config, run / "config.yaml")
if Path("broken").exists() and config.optim.lr == 0.5:
    sys.exit("broken")
def end(state, reason, code):
    (run / "checkpoints" / f"step_{{step:06d}}").mkdir(parents=True)
    status = dict(state=state, reason=reason, step=step, minutes=step / 60)
    (run / "status.json").write_text(json.dumps(status))
    sys.exit(code)
while step < config.run.steps:
    step += 1
    score = None if config.optim.lr == 0.25 else step * config.optim.lr
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({{"step": step, "time": time.time(), "eval/score": score}}) + "\\n")
    time.sleep(0.05)
    if asked:
        end("stopped", "a signal", 130)
end("finished", "", 0)
"""
FILE = """\
program: flowrl
name: count
method: grid
metric: {{name: eval/score, goal: maximize{metric}}}
parameters:
  {parameters}
command: [./flowrl, train, rl.yaml, "run.name=${{oc.env:WANDB_RUN_ID}}", run.steps={steps},
          "${{args_no_hyphens}}"]
{more}
"""
RATES = "optim.lr: {values: [1.0, 0.5, 2.0]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rl.yaml").write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\n")
    program = tmp_path / "flowrl"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run(
    folder: Path,
    *,
    parameters: str = RATES,
    steps: int = 4,
    more: str = "",
    metric: str = "",
    jobs: int = 3,
    trials: int | None = None,
) -> tuple[list[str], str]:
    """(the runs that failed, what was said) of a sweep."""
    file = folder / "sweep.yaml"
    file.write_text(FILE.format(parameters=parameters, steps=steps, more=more, metric=metric))
    lines: list[str] = []
    failed = run_local(
        load_sweep(file), folder=folder / "out", jobs=jobs, cores=2, trials=trials, say=lines.append
    )
    return failed, "\n".join(lines)


def states(folder: Path) -> list[tuple[str, float | None, int]]:
    sweep = load_sweep(folder / "sweep.yaml")
    rows = read_rows(sweep, open_study(sweep, folder / "out"), folder / "out")
    return [(row.state, row.best, row.steps) for row in rows]


def steps_of(folder: Path, number: int) -> list[int]:
    rows = read_metrics(folder / f"out/trial_{number:04d}/metrics.jsonl")
    return [row["step"] for row in rows]


def started(folder: Path, number: int) -> int:
    return (folder / f"out/trial_{number:04d}/log.txt").read_text().count("\n$ ")


def test_a_failed_run_is_tried_again_and_the_others_are_kept(folder: Path) -> None:
    (folder / "broken").touch()
    failed, said = run(folder)
    assert failed == ["trial_0001"] and "failed with exit code 1" in said and "| broken" in said
    assert states(folder) == [("finished", 4.0, 4), ("open", None, 0), ("finished", 8.0, 4)]
    (folder / "broken").unlink()
    failed, said = run(folder)
    assert failed == [] and "trial_0001 (optim.lr=0.5): eval/score 2.000 at step 4" in said
    assert states(folder) == [("finished", 4.0, 4), ("finished", 2.0, 4), ("finished", 8.0, 4)]
    assert [started(folder, number) for number in range(3)] == [1, 2, 1]


def test_jobs_bound_the_runs_side_by_side(folder: Path) -> None:
    run(folder, jobs=1)
    spans = []
    for number in range(3):
        rows = read_metrics(folder / f"out/trial_{number:04d}/metrics.jsonl")
        spans.append((rows[0]["time"], rows[-1]["time"]))
    assert spans[0][1] < spans[1][0] and spans[1][1] < spans[2][0]


def test_a_signal_saves_the_runs_and_the_next_call_goes_on_with_them(folder: Path) -> None:
    def interrupt() -> None:
        files = [folder / f"out/trial_{number:04d}/metrics.jsonl" for number in (0, 1)]
        while not all(file.exists() for file in files):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    parameters = RATES.replace(", 2.0", "")
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(folder, parameters=parameters, steps=100)
    thread.join()
    assert [state for state, _, _ in states(folder)] == ["open", "open"]
    run(folder, parameters=parameters, steps=100)
    assert states(folder) == [("finished", 100.0, 100), ("finished", 50.0, 100)]
    for number in (0, 1):
        assert steps_of(folder, number) == list(range(1, 101))  # from the checkpoint, not anew
        assert started(folder, number) == 2


def test_a_run_left_behind_ends_early_and_is_not_begun_again(folder: Path) -> None:
    end = "early_terminate: {type: hyperband, min_iter: 2}"
    options = {"parameters": "optim.lr: {values: [1.0, 0.5]}", "more": end, "jobs": 1}
    run(folder, steps=400, trials=1, **options)
    failed, said = run(folder, steps=400, **options)
    assert failed == [] and ", ended early" in said
    (first, second) = states(folder)
    assert first == ("finished", 400.0, 400)
    # It was at 1.0 at its second step, where the other one was at 2.0; the look comes each second.
    assert second[0] == "ended early" and second[2] < 400 and second[1] == second[2] * 0.5
    run(folder, steps=400, **options)
    assert states(folder) == [first, second] and started(folder, 1) == 1


def test_a_target_that_is_reached_starts_no_more_runs(folder: Path) -> None:
    run(folder, metric=", target: 4", jobs=1)  # the first run ends at 4 x 1.0
    assert states(folder) == [("finished", 4.0, 4)]


def test_values_that_were_never_finite_do_not_count(folder: Path) -> None:
    failed, said = run(folder, parameters="optim.lr: {values: [0.25, 1.0]}")
    assert failed == [] and "never had a finite value, so the run does not count" in said
    assert states(folder) == [("no value", None, 4), ("finished", 4.0, 4)]


def test_values_that_do_not_go_together_are_said_and_passed_over(folder: Path) -> None:
    parameters = (
        "data.num_groups: {values: [24, 12]}\n  optim.updates_per_rollout: {values: [1, 8]}"
    )
    failed, said = run(folder, parameters=parameters)
    assert failed == ["trial_0003"] and "not run, its values do not fit" in said
    assert "data.num_groups=12 groups do not divide" in said
    assert [state for state, _, _ in states(folder)] == 3 * ["finished"] + ["not run"]
    assert run(folder, parameters=parameters)[0] == []


def test_a_config_that_has_changed_is_refused_where_runs_are_finished(folder: Path) -> None:
    run(folder, trials=1)
    with (folder / "rl.yaml").open("a") as stream:
        stream.write("eval: {max_prompts: 3}\n")
    with pytest.raises(ConfigError) as caught:
        run(folder)
    message = str(caught.value)
    assert "trial_0000" in message and "eval.max_prompts: null in the folder, 3 now" in message
    assert "choose another --output" in message


def test_two_sweeps_do_not_work_in_one_folder(folder: Path) -> None:
    (folder / "out").mkdir()
    lock = f"import fcntl, time; f = open({str(folder / 'out/.lock')!r}, 'a'); "
    lock += "fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", lock], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError, match="a sweep is going on in"):
            run(folder)
        other.kill()
    assert not list((folder / "out").glob("trial_*"))


def test_runs_are_offline_and_no_part_of_an_agents_sweep(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = folder / "flowrl"
    lines = program.read_text().splitlines()
    lines.insert(1, "import os; print({k: v for k, v in os.environ.items() if 'WANDB' in k})")
    program.write_text("\n".join(lines))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    run(folder, trials=1)
    log = (folder / "out/trial_0000/log.txt").read_text()
    assert "{'WANDB_MODE': 'offline'" in log and "SWEEP_ID" not in log and "RUN_ID'" not in log
    assert json.loads((folder / "out/trial_0000/status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("status", "is_done"),
    [
        ({"state": "finished", "reason": ""}, True),
        ({"state": "stopped", "reason": "run.max_minutes=3"}, True),
        ({"state": "stopped", "reason": "monitor.early_stop=3 (best gold: 0.4 at step 8)"}, True),
        ({"state": "stopped", "reason": "a signal"}, False),
        ({"state": "failed", "reason": "run.max_minutes"}, False),
        ({}, False),
    ],
)
def test_a_run_that_its_own_config_ended_is_finished(
    tmp_path: Path, status: dict[str, str], is_done: bool
) -> None:
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert is_finished(tmp_path) is is_done
