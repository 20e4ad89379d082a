"""What is written about a sweep: results.csv and results.md, the best run first.

Every number was read from the runs' folders; what optuna's journal knows is how a run ended.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.sweep.command import Values
from flowrl.sweep.spec import MetricConfig, Sweep
from flowrl.sweep.trials import best_of, num_queued, read_history, trial_name, trial_values
from flowrl.train.report import duration, number
from flowrl.train.runfiles import write_text

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

CSV, MARKDOWN, PLOT = "results.csv", "results.md", "results.png"


@dataclass(frozen=True)
class TrialRow:
    """A run's line in the table.

    Attributes:
        name: of the run and its folder.
        state: "finished", "ended early", "no value", "not run" (its values did not fit), "failed"
            or "open".
        values: by parameter.
        best, best_step: the metric's best value and its step; None = it has none yet.
        last: its last value.
        steps, minutes: training steps done, and training time.
    """

    name: str
    state: str
    values: Values
    best: float | None
    best_step: int | None
    last: float | None
    steps: int
    minutes: float


def read_rows(sweep: Sweep, study: Study, folder: Path) -> list[TrialRow]:
    """All runs that were begun, in the order of their numbers."""
    begun = [trial for trial in study.trials if trial.state.name != "WAITING"]
    return [_row(sweep, trial, folder / trial_name(trial.number)) for trial in begun]


def best_first(rows: list[TrialRow], metric: MetricConfig) -> list[TrialRow]:
    """Those with a value by it, then the others."""
    sign = 1.0 if metric.goal == "minimize" else -1.0
    return sorted(rows, key=lambda row: (row.best is None, sign * (row.best or 0.0)))


def write_tables(sweep: Sweep, study: Study, folder: Path) -> list[Path]:
    """Writes both tables; returns their files, none if no run was begun."""
    metric = sweep.config.metric
    assert metric is not None
    if len(study.trials) == num_queued(study):
        return []
    rows = best_first(read_rows(sweep, study, folder), metric)
    paths = [folder / MARKDOWN, folder / CSV]
    for path, text in zip(paths, (_markdown(sweep, rows), _csv(sweep, rows)), strict=True):
        write_text(path, text)
    return paths


def describe(values: Values) -> str:
    """Values as a line shows them: optim.lr=0.002, method.args.window=2."""
    return ", ".join(f"{'.'.join(path)}={show_value(value)}" for path, value in values.items())


def outcome(folder: Path, metric: MetricConfig) -> str:
    """A run's result in a line."""
    status = _status(folder)
    history = read_history(folder, metric.name)
    spent = f"{status.get('step', 0)} steps, {duration(60 * (status.get('minutes') or 0))}"
    if not history:
        return f"{metric.name} never had a finite value, so the run does not count; {spent}"
    step, best = best_of(history, metric)
    return f"{metric.name} {number(best)} at step {step}, {number(history[-1][1])} last; {spent}"


def _row(sweep: Sweep, trial: FrozenTrial, folder: Path) -> TrialRow:
    metric = sweep.config.metric
    assert metric is not None
    status, history = _status(folder), read_history(folder, metric.name)
    step, best = best_of(history, metric) if history else (None, None)
    states = {
        "COMPLETE": "ended early" if status.get("reason") == "a signal" else "finished",
        "FAIL": "no value" if folder.exists() else "not run",
        "RUNNING": "failed" if status.get("state") == "failed" else "open",
    }
    return TrialRow(
        name=folder.name,
        state=states[trial.state.name],
        values=trial_values(sweep, trial),
        best=best,
        best_step=step,
        last=history[-1][1] if history else None,
        steps=int(status.get("step") or 0),
        minutes=float(status.get("minutes") or 0.0),
    )


def _csv(sweep: Sweep, rows: list[TrialRow]) -> str:
    """Full precision, for another program; what has no value is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [each.name for each in sweep.dimensions]
    writer.writerow(["run", "state", *names, "best", "best_step", "last", "steps", "minutes"])
    for row in rows:
        values = [row.values[each.path] for each in sweep.dimensions]
        ends = [row.best, row.best_step, row.last, row.steps, row.minutes]
        cells = [json.dumps(v) if isinstance(v, dict | list) else v for v in values]
        writer.writerow([row.name, row.state, *cells, *ends])
    return stream.getvalue()


def _markdown(sweep: Sweep, rows: list[TrialRow]) -> str:
    config, metric = sweep.config, sweep.config.metric
    assert metric is not None
    names = [each.name for each in sweep.dimensions]
    head = ["run", "state", *(f"`{name}`" for name in names), f"best `{metric.name}`",
            "at step", "last", "steps", "minutes"]  # fmt: skip
    lines = [
        f"# {sweep.name}",
        "",
        *([config.description.strip(), ""] if config.description else []),
        f"`{sweep.file}`: {config.method}, to {metric.goal} `{metric.name}`. A run counts by its "
        "best value, as with W&B; a best of many runs is flattered by its noise.",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for row in rows:
        values = [show_value(row.values[each.path]) for each in sweep.dimensions]
        ends = ["–" if x is None else number(x) for x in (row.best, row.best_step, row.last)]
        cells = [row.name, row.state, *values, *ends, str(row.steps), f"{row.minutes:.1f}"]
        lines.append(_line([cell.replace("|", "\\|") for cell in cells]))
    if rows[0].best is not None:
        words = sweep.command.local_line(rows[0].values, name="best", folder=Path("runs"))
        kept = [word for word in words[words.index("train") :] if not word.startswith("track.")]
        again = ["flowrl", *kept]
        lines += ["", "The best again, without trackers:", "", "```bash", shlex.join(again), "```"]
    lines += ["", f"![The metric over runs and values]({PLOT})", ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show_value(value: Any) -> str:
    """A value as tables and plots show it."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')


def _status(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
