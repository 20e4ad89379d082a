"""A run's folder as data, read with indulgence: whatever is missing or damaged becomes a sentence.

The report is made of every run, also of one that was killed in its first second, so nothing here
raises but for a folder that is no run at all. Reading order: `RunFiles`, `read_run`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowrl.config import load_config
from flowrl.configdoc import describe_fields
from flowrl.errors import ConfigError
from flowrl.train.track import FAILURES, METRICS
from flowrl.yamlio import read_yaml

JSON = dict[str, Any]
_LISTED = 5


@dataclass(frozen=True)
class Setting:
    """A configuration value and what it means."""

    key: str
    value: Any
    meaning: str


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds.

    Attributes:
        folder: the folder.
        config: the resolved configuration; empty if there is none.
        settings: the values that differ from the defaults, in the config's order.
        method, env, status: the JSON files of these names; empty if there is none.
        rows: of metrics.jsonl, in order.
        evals: the held-out evaluations, by step.
        failures: rows of failures.jsonl, in order; a run that lost nothing has no such file.
        problems: what is missing or could not be read, and why, as sentences.
    """

    folder: Path
    config: JSON
    settings: list[Setting]
    method: JSON
    env: JSON
    status: JSON
    rows: list[JSON]
    evals: list[JSON]
    failures: list[JSON] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def column(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of one metric in the rows that have it; NaN where it was not finite."""
        return [
            (float(row["step"]), math.nan if row[key] is None else float(row[key]))
            for row in self.rows
            if key in row
        ]

    def metric_keys(self) -> list[str]:
        """All metric keys, in the order in which they first appear."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def option(self, key: str, default: Any = None) -> Any:
        """The configuration's value of a dotted key."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8 that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the `with` ends well.

    A process killed in between leaves the old folder, or between the two renames none; never half.
    """
    new, old = (folder.with_name(f".{folder.name}.{kind}.tmp") for kind in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_run(folder: Path) -> RunFiles:
    """Everything that the report needs of a run's folder.

    Raises:
        ConfigError: the folder does not exist, or holds neither a configuration nor metrics.
    """
    marks = ("config.yaml", METRICS, "status.json")
    if not any((folder / name).is_file() for name in marks):
        raise ConfigError(_no_run(folder, marks))
    problems: list[str] = []
    config, settings = _config(folder, problems)
    status = _json(folder / "status.json", problems, "it was killed before it could write one")
    rows = _rows(folder / METRICS, problems)
    return RunFiles(
        folder=folder,
        config=config,
        settings=settings,
        method=_json(folder / "method.json", problems, "the method table is left out"),
        env=_json(folder / "env.json", problems, "the environment is left out"),
        status=status,
        rows=rows,
        evals=_evals(folder / "eval", _last_step(rows, status), problems),
        failures=_lines(lost, problems) if (lost := folder / FAILURES).is_file() else [],
        problems=problems,
    )


def _no_run(folder: Path, marks: tuple[str, ...]) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; give the folder that flowrl train made{_runs_in(folder)}"
    if not folder.is_dir():
        return f"{folder} is a file; give the folder that flowrl train made, such as runs/NAME"
    return (
        f"{folder} is not a run's folder: it holds none of {', '.join(marks)}; give the folder "
        f"that flowrl train made{_runs_in(folder)}"
    )


def _runs_in(folder: Path) -> str:
    """The runs inside the folder, or beside it, as the end of a message."""
    for place in (folder, folder.parent):
        found = sorted(each.parent for each in place.glob("*/config.yaml"))[:_LISTED]
        if found:
            return f": {', '.join(str(each) for each in found)}"
    return ", such as runs/NAME"


def _config(folder: Path, problems: list[str]) -> tuple[JSON, list[Setting]]:
    file = folder / "config.yaml"
    try:
        config = read_yaml(file)
    except ConfigError as error:
        problems.append(f"The configuration could not be read: {error}.")
        return {}, []
    try:
        changed = load_config(file).model_dump(mode="json", exclude_defaults=True)
    except ConfigError as error:
        problems.append(
            "All configuration values are listed, because this version of flowrl does not read "
            f"the file: {error}."
        )
        changed = config
    meanings = {row.key: row.description for row in describe_fields()}
    return config, [Setting(key, value, _meaning(key, meanings)) for key, value in flatten(changed)]


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; empty sections and lists are left out."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from flatten(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(each, dict) for each in value):
        for index, each in enumerate(value):
            yield from flatten(each, f"{key}.{index}")
    elif value not in ([], ()):
        yield key, value


def _meaning(key: str, meanings: dict[str, str]) -> str:
    """What is known about a key; a free argument has its section's words."""
    name = re.sub(r"\.\d+(?=\.|$)", "[]", key)
    while name:
        if name in meanings:
            return meanings[name]
        name = name.rpartition(".")[0]
    return ""


def _json(file: Path, problems: list[str], consequence: str) -> JSON:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"The run has no {file.name}: {consequence}.")
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"{file.name} could not be read ({error}): {consequence}.")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{file.name} holds no JSON object: {consequence}.")
        return {}
    return data


def _rows(file: Path, problems: list[str]) -> list[JSON]:
    if not file.is_file():
        problems.append("The run has no metrics.jsonl: it ended before its first training step.")
        return []
    return _lines(file, problems)


def _lines(file: Path, problems: list[str]) -> list[JSON]:
    """The rows of a file of JSON lines, each with a step."""
    rows, damaged = [], []
    for number, line in enumerate(file.read_text("utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            damaged.append(str(number))
    if damaged:
        lines = ", ".join(damaged[:_LISTED]) + (", ..." if len(damaged) > _LISTED else "")
        problems.append(
            f"Lines of {file.name} that could not be read are left out: {lines} (a process "
            "killed while it writes leaves half a line at the end)."
        )
    return rows


def _last_step(rows: list[JSON], status: JSON) -> int | None:
    steps = [int(row["step"]) for row in rows]
    if isinstance(status.get("step"), int):
        steps.append(status["step"])
    return max(steps, default=None)


def _evals(folder: Path, last_step: int | None, problems: list[str]) -> list[JSON]:
    """The evaluations by step, without those of a continuation that a resume abandoned."""
    evals = []
    for file in sorted(folder.glob("step_*.json")):
        data = _json(file, problems, "this evaluation is left out")
        if not isinstance(data.get("step"), int):
            if data:
                problems.append(f"{file.name} has no step: this evaluation is left out.")
            continue
        if last_step is not None and data["step"] > last_step:
            problems.append(
                f"{file.name} is left out: the run is at step {last_step}, so it belongs to a "
                "continuation that was given up by a resume."
            )
            continue
        evals.append(data)
    return sorted(evals, key=lambda each: int(each["step"]))
