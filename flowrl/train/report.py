"""`report.html`: one page that shows what a run did, without network, scripts or other files.

Every number on it was read from the run's folder; what is missing is said, with the reason. Reading
order: `make_report`, then a function per section in the order of the page. The page's words are in
`report.html.j2`, its looks in `report.css`, its curves in `curves.py`.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowrl import __version__
from flowrl.config import load_config
from flowrl.errors import ConfigError
from flowrl.train import curves, failures, gallery, overoptimisation
from flowrl.train.card import usage
from flowrl.train.keys import KEYS, match_key
from flowrl.train.runfiles import JSON, RunFiles, read_run, write_text

REPORT = "report.html"
_FOLDER = Path(__file__).parent


def make_report(run: Path) -> Path:
    """Write the page of a run, finished or not.

    Args:
        run: the run's folder.

    Returns:
        The page, `run/report.html`; it is replaced in one move.

    Raises:
        ConfigError: the folder is not a run's.
    """
    run = Path(run)
    files = read_run(run)
    return render(
        _FOLDER / "report.html.j2",
        run / REPORT,
        header=header(files),
        result=result(files),
        proxy=overoptimisation.section(files),
        samples=gallery.samples(files),
        method=method_rows(files),
        method_name=files.method.get("name", ""),
        settings=files.settings,
        training=curves.training(files),
        failures=failures.section(files),
        cost=cost(files),
        artefacts=artefacts(files),
        env=files.env,
        metrics=all_metrics(files),
        problems=files.problems,
    )


def render(template: Path, path: Path, **values: Any) -> Path:
    """Write a page that looks like a run's: a template laid over `page.html.j2`, with its parts.

    Args:
        template: the file; the report's own templates are found beside it.
        path: the page, replaced in one move.
        values: what the template needs.

    Returns:
        The page.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["plain"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["signed"] = lambda value: number(value, signed=True)
    page = environment.get_template(template.name).render(version=__version__, **values)
    write_text(path, page)
    return path


def light_colors() -> dict[str, str]:
    """The page's colours on a light ground by the names of their variables, e.g. "s1"."""
    css = (_FOLDER / "report.css").read_text(encoding="utf-8")
    light = css[: css.index("@media")]
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))


# --------------------------------------------------------------------------- sections


def header(files: RunFiles) -> JSON:
    """What the run is, when it was made, and how it ended."""
    times = [row["time"] for row in files.rows if isinstance(row.get("time"), int | float)]
    began = times[0] if times else max(each.stat().st_mtime for each in files.folder.iterdir())
    minutes = files.status.get("minutes")
    reward_names = [each.get("name", "?") for each in files.option("rewards", [])]
    facts = [
        ("method", files.method.get("name") or files.option("method.name")),
        ("model", files.option("model.id")),
        ("trained", _trained_part(files)),
        ("reward", " + ".join(reward_names)),
        ("steps", _steps(files)),
        ("device", files.env.get("device")),
        ("seed", files.option("run.seed")),
    ]
    return {
        "name": files.option("run.name", files.folder.resolve().name),
        "paper": files.method.get("paper"),
        "date": datetime.fromtimestamp(began, timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        "facts": [(name, value) for name, value in facts if value not in (None, "")],
        "time": duration(60 * minutes) if isinstance(minutes, int | float) else "",
        "outcome": outcome(files),
    }


def outcome(files: RunFiles) -> str:
    """How the run ended, as a sentence; empty for a run that came to its end."""
    state, reason = files.status.get("state"), files.status.get("reason")
    because = f": {reason}" if reason else ""
    sentences = {
        "finished": "",
        "stopped": f"This run was stopped at step {_steps(files)}{because}.",
        "failed": f"This run failed at step {_steps(files)}{because}.",
        "running": f"This run is going on, or was killed; {_progress(files)}.",
    }
    return sentences.get(str(state), f"How this run ended is not known; {_progress(files)}.")


def result(files: RunFiles) -> JSON:
    """The held-out scores before and after, and the curve between them."""
    if not files.evals:
        why = outcome(files) or "The run's folder has no eval/step_*.json."
        return {"missing": f"There is no held-out evaluation. {why}"}
    first, last = files.evals[0], files.evals[-1]
    is_single = first is last
    rows = [("score", "Score", first.get("score"), last.get("score"))]
    for group, title in (("skills", "skill"), ("rewards", "reward")):
        names = dict.fromkeys([*(first.get(group) or {}), *(last.get(group) or {})])
        rows += [
            (title, name, (first.get(group) or {}).get(name), (last.get(group) or {}).get(name))
            for name in names
        ]
    rows.append(("diversity", "Diversity", first.get("diversity"), last.get("diversity")))
    table = [
        _table_row(*row, is_single) for row in rows if row[2] is not None or row[3] is not None
    ]
    return {
        "missing": "",
        "before": first.get("score"),
        "after": None if is_single else last.get("score"),
        "delta": None if is_single else _minus(last.get("score"), first.get("score")),
        "before_label": "base model" if first["step"] == 0 else f"step {first['step']}",
        "after_label": f"step {last['step']}",
        "table": table,
        "how": _how_evaluated(first, last),
        "unfair": _changed_settings(first, last),
        "single": f"There is one evaluation only, so there is nothing to compare it with. "
        f"{outcome(files)}"
        if is_single
        else "",
        "diversity": [
            number(each["diversity"])
            for each in ([first] if is_single else [first, last])
            if each.get("diversity") is not None
        ],
        "panel": curves.heldout(files),
    }


def method_rows(files: RunFiles) -> list[tuple[str, str]]:
    """The method's table without what the header says already."""
    return [
        (str(slot), str(value))
        for slot, value in files.method.get("rows", [])
        if slot not in ("method", "paper")
    ]


def cost(files: RunFiles) -> JSON:
    """Where the time went and what a step costs."""
    seconds = [value for _, value in files.column("perf/step_time_s") if math.isfinite(value)]
    if not seconds:
        why = "no training step was logged."
        return {"missing": f"There is nothing to say about time: {why}", "table": []}
    table = [("time per step", f"{statistics.median(seconds):.2f} s", "median")]
    for key, title, unit in (
        ("perf/images_per_s", "throughput", "images/s"),
        ("perf/nfe_per_image", "network evaluations in rollout", "per image"),
        ("perf/train_rows_per_image", "network evaluations with gradient", "per image"),
    ):
        values = [value for _, value in files.column(key) if math.isfinite(value)]
        if values:
            table.append((title, f"{statistics.median(values):.3g} {unit}", "median"))
    memory = [value for _, value in files.column("perf/max_memory_gb") if math.isfinite(value)]
    if memory:
        table.append(("peak memory", f"{max(memory):.2f} GB", "maximum"))
    return {
        "missing": "",
        "table": table,
        "phases": curves.phases(files),
        "panels": curves.cost(files),
    }


def artefacts(files: RunFiles) -> JSON:
    """Where the weights are and the code that draws with them."""
    final = files.folder / "final"
    lora, full = final / "pytorch_lora_weights.safetensors", final / "pipeline"
    kind = "lora" if lora.is_file() else "full" if full.is_dir() else ""
    checkpoints = sorted(each.name for each in files.folder.glob("checkpoints/step_*"))
    try:
        code = usage(load_config(files.folder / "config.yaml"), prompt=_prompt(files), folder=final)
    except ConfigError:  # `files.problems` says what is wrong with it
        code = ""
    return {
        "kind": kind,
        "folder": str(files.folder),
        "code": code,
        "path": str(full if kind == "full" else final),
        "why": outcome(files) or "The run's folder has no final/.",
        "checkpoints": checkpoints,
        "size_mb": _megabytes(lora if kind == "lora" else full) if kind else 0,
    }


def all_metrics(files: RunFiles) -> list[JSON]:
    """First and last value of every metric, with its documentation."""
    table = []
    for key in files.metric_keys():
        if key in ("step", "time"):
            continue
        values = [value for _, value in files.column(key)]
        try:
            meaning = KEYS[match_key(key)]
        except ValueError:  # a run of another version
            meaning = ""
        table.append({"key": key, "first": values[0], "last": values[-1], "meaning": meaning})
    return table


# --------------------------------------------------------------------------- words and numbers


def number(value: Any, *, signed: bool = False) -> str:
    """A value as a person reads it: three decimals around 1, an exponent far from it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    size = abs(value)
    if isinstance(value, int) and not signed:
        return str(value)
    text = f"{size:.3f}" if 1e-3 <= size < 1e3 or size == 0 else f"{size:.2e}"
    if size >= 1e3 and size == int(size) and size < 1e6:
        text = str(int(size))
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    return sign + text


def duration(seconds: float) -> str:
    """42 s, 5 min 30 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _progress(files: RunFiles) -> str:
    return (
        f"its last metrics are of step {_last_step(files)}" if files.rows else "it logged nothing"
    )


def _last_step(files: RunFiles) -> int:
    steps = [row["step"] for row in files.rows] + [each["step"] for each in files.evals]
    return max(steps, default=0)


def _steps(files: RunFiles) -> str:
    done, planned = files.status.get("step", _last_step(files)), files.option("run.steps")
    return f"{done}" if planned in (None, done) else f"{done} of {planned}"


def _trained_part(files: RunFiles) -> str | None:
    tuning = files.option("model.tuning")
    if tuning == "lora":
        return f"LoRA, rank {files.option('model.lora.rank')}"
    return "all weights" if tuning == "full" else None


def _minus(after: Any, before: Any) -> float | None:
    return None if after is None or before is None else after - before


def _table_row(kind: str, name: str, before: Any, after: Any, is_single: bool) -> JSON:
    values = [value for value in (before, after) if value is not None]
    return {
        "kind": kind,
        "name": name.replace("_", " ") if kind == "skill" else name,
        "before": before,
        "after": None if is_single else after,
        "delta": None if is_single else _minus(after, before),
        "is_bar": kind != "diversity" and all(0 <= value <= 1 for value in values),
    }


def _how_evaluated(first: JSON, last: JSON) -> str:
    reward = next(iter(last.get("rewards") or {}), None)
    parts = []
    if reward is not None:
        kind = "mean over the skills of" if last.get("skills") else "mean of"
        parts.append(f"Score: {kind} {reward}")
    if last.get("num_samples") is not None:
        parts.append(f"{last['num_samples']} held-out samples")
    if last.get("num_steps") is not None:
        parts.append(f"{last['num_steps']} sampler steps")
    if last.get("guidance_scale") is not None:
        off = " (off)" if last["guidance_scale"] == 1 else ""
        parts.append(f"guidance {last['guidance_scale']:g}{off}")
    if last.get("seed") is not None:
        parts.append(f"seed {last['seed']}, the same noise every time")
    if last.get("weights") is not None:
        parts.append(f"weights: {last['weights']}")
    return "; ".join(parts) + "." if parts else ""


def _changed_settings(first: JSON, last: JSON) -> str:
    """What differs between two evaluations beside the weights, so that they do not compare."""
    names = ("num_samples", "num_steps", "guidance_scale", "seed", "weights")
    changed = [
        f"{name} was {first[name]}, then {last[name]}"
        for name in names
        if name in first and name in last and first[name] != last[name]
    ]
    if not changed:
        return ""
    return (
        f"The first and the last evaluation were made in different ways ({'; '.join(changed)}), so "
        "their difference is not due to training alone."
    )


def _prompt(files: RunFiles) -> str:
    """A prompt of the run."""
    shown = [row for each in files.evals for row in each.get("samples") or []]
    return str(shown[0].get("prompt")) if shown else "a prompt"


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files) / 1e6
