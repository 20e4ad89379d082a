"""A sweep's trials in optuna's journal: their values, across restarts, and the tables.

Kills, among others: a resumed random sweep that draws the first values again; a grid that skips the
point at which it was killed; a journal taken over by another sweep; a table in the wrong order.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from flowrl.errors import ConfigError
from flowrl.sweep.local import number_of_trials
from flowrl.sweep.plot import write_plot
from flowrl.sweep.spec import Sweep, load_sweep
from flowrl.sweep.table import read_rows, write_tables
from flowrl.sweep.trials import ask, num_queued, open_study, read_history, trial_values

pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parents[2]
FILE = """\
program: flowrl
name: demo
method: %s
metric: {name: eval/score, goal: maximize}
parameters:
  optim.lr: {%s}
  method.args.strategy: {values: [progressive, "a|b", null]}
  run.seed: {value: 7}
command: [flowrl, train, rl.yaml, "run.name=${oc.env:WANDB_RUN_ID}", "${args_json}"]
"""
LOG = "distribution: log_uniform_values, min: 1.0e-4, max: 1.0"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "rl.yaml").write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\n")
    monkeypatch.chdir(tmp_path)

    def write(method: str, learning_rate: str = LOG, more: str = "") -> Sweep:
        (tmp_path / "sweep.yaml").write_text(FILE % (method, learning_rate) + more)
        return load_sweep(tmp_path / "sweep.yaml")

    return write


def draw(sweep: Sweep, folder: Path, num: int) -> list[Any]:
    """Values of so many trials, each asked for by a process of its own, as after restarts."""
    return [trial_values(sweep, ask(sweep, open_study(sweep, folder))) for _ in range(num)]


def test_a_random_sweep_draws_the_same_whether_or_not_it_is_interrupted(
    make: Any, tmp_path: Path
) -> None:
    sweep = make("random")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    restarted = draw(sweep, tmp_path / "a", 5)
    study = open_study(sweep, tmp_path / "b")
    assert [trial_values(sweep, ask(sweep, study)) for _ in range(5)] == restarted
    rates = [values[("optim.lr",)] for values in restarted]
    assert len(set(rates)) == 5 and all(1e-4 <= rate <= 1 for rate in rates)
    assert {values[("run.seed",)] for values in restarted} == {7}


def test_a_grid_has_each_point_once_also_where_it_was_killed_between_two_lines(
    make: Any, tmp_path: Path
) -> None:
    sweep = make("grid", "values: [0.1, 0.2]")
    drawn = draw(sweep, tmp_path, 2)
    study = open_study(sweep, tmp_path)
    study.enqueue_trial({"point": 2})  # and killed here
    assert num_queued(study) == 1
    drawn += draw(sweep, tmp_path, 4)
    assert drawn == sweep.grid and len(drawn) == 6
    assert num_queued(open_study(sweep, tmp_path)) == 0


def test_bayes_looks_where_it_was_good(make: Any, tmp_path: Path) -> None:
    sweep = make("bayes")
    study = open_study(sweep, tmp_path)
    rates = []
    for _ in range(40):
        trial = ask(sweep, study)
        rate = trial_values(sweep, trial)[("optim.lr",)]
        rates.append(rate)
        study.tell(trial, 1.0 if 1e-3 <= rate <= 1e-2 else 0.0)
    # A quarter of the range in its logarithm: a random search would have about 5 of 20 there.
    assert sum(1e-3 <= rate <= 1e-2 for rate in rates[20:]) >= 10


def test_a_journal_of_another_sweep_is_refused_with_what_differs(make: Any, tmp_path: Path) -> None:
    draw(make("random"), tmp_path, 1)
    draw(make("random", more="run_cap: 9\ndescription: more runs\n"), tmp_path, 1)
    with pytest.raises(ConfigError) as caught:
        open_study(make("random", LOG.replace("1.0e-4", "1.0e-3")), tmp_path)
    assert "parameters.optim.lr.min: 0.0001 there, 0.001 now" in str(caught.value)
    assert "--output" in str(caught.value)


def test_the_number_of_runs_comes_from_the_call_the_file_or_the_grid(make: Any) -> None:
    grid = make("grid", "values: [0.1, 0.2]")
    assert number_of_trials(grid, None) == 6
    assert number_of_trials(grid, 4) == 4 and number_of_trials(grid, 40) == 6
    assert number_of_trials(make("random", more="run_cap: 9\n"), None) == 9
    assert number_of_trials(make("random", more="run_cap: 9\n"), 12) == 12
    with pytest.raises(ConfigError, match=r"method: bayes has no end of its own; set run_cap"):
        number_of_trials(make("bayes"), None)


def write_run(folder: Path, scores: list[float | None], **status: Any) -> None:
    folder.mkdir()
    rows = [{"step": 10 * i, "eval/score": score} for i, score in enumerate(scores)]
    text = "".join(json.dumps(row) + "\n" for row in [{"step": 1, "train/loss": 3.0}, *rows])
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "eval/sc')  # killed while it wrote
    (folder / "status.json").write_text(json.dumps(status))


def test_tables_and_plot_say_how_each_run_went_the_best_first(make: Any, tmp_path: Path) -> None:
    from optuna.trial import TrialState

    sweep = make("random")
    study = open_study(sweep, tmp_path)
    assert write_tables(sweep, study, tmp_path) == write_plot(sweep, study, tmp_path) == []
    drawn = [trial_values(sweep, ask(sweep, study)) for _ in range(5)]
    ended = {"state": "finished", "step": 20, "minutes": 1.5, "reason": ""}
    write_run(tmp_path / "trial_0000", [0.25, 0.5, 0.4], **ended)
    write_run(tmp_path / "trial_0001", [0.25, 0.75], state="stopped", step=10, reason="a signal")
    write_run(tmp_path / "trial_0002", [None, None], **ended)
    write_run(tmp_path / "trial_0003", [0.25], state="failed", step=3, reason="boom")
    study.tell(0, 0.5)
    study.tell(1, 0.75)
    study.tell(2, state=TrialState.FAIL)
    assert read_history(tmp_path / "trial_0000", "eval/score") == [(0, 0.25), (10, 0.5), (20, 0.4)]
    rows = {row.name: row for row in read_rows(sweep, study, tmp_path)}
    assert [row.state for row in rows.values()] == [
        "finished", "ended early", "no value", "failed", "open"
    ]  # fmt: skip
    first = rows["trial_0000"]
    assert (first.best, first.best_step, first.last, first.steps, first.minutes) == (
        0.5, 10, 0.4, 20, 1.5
    )  # fmt: skip
    markdown, table = write_tables(sweep, study, tmp_path)
    with table.open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["run"] for line in lines][:3] == ["trial_0001", "trial_0000", "trial_0003"]
    assert float(lines[0]["optim.lr"]) == drawn[1][("optim.lr",)]  # all its digits
    assert lines[3]["best"] == "" and "run.seed" not in lines[0]
    text = markdown.read_text()
    assert text.index("trial_0001") < text.index("trial_0000") < text.index("trial_0002")
    assert "best `eval/score`" in text and "The best again, without trackers" in text
    assert f'"optim.lr": {drawn[1][("optim.lr",)]}' in text
    assert "a|b" not in text.partition("The best again")[0]  # it would end a cell
    (plot,) = write_plot(sweep, study, tmp_path)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_best_of_a_metric_to_minimize_is_its_lowest(make: Any, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    make("random")
    file.write_text(file.read_text().replace("maximize", "minimize"))
    sweep = load_sweep(file)
    study = open_study(sweep, tmp_path)
    for number, scores in enumerate(([0.5, 0.3, 0.4], [0.2, 0.6])):
        ask(sweep, study)
        write_run(tmp_path / f"trial_{number:04d}", list(scores), state="finished")
        study.tell(number, min(scores))
    assert [row.best for row in read_rows(sweep, study, tmp_path)] == [0.3, 0.2]
    with write_tables(sweep, study, tmp_path)[1].open() as stream:
        assert [line["best"] for line in csv.DictReader(stream)] == ["0.2", "0.3"]
