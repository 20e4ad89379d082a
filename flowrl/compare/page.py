"""What is written about a comparison: compare.html, compare.png, compare.json and compare.md.

Every number was read from the runs' folders by `collect`. Reading order: `make_page`, then a
function per part of the page, whose words are in `compare.html.j2`.
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

from flowrl.compare.collect import Quantity, Results, collect
from flowrl.compare.curves import AXES, Curve, show
from flowrl.compare.figures import color, is_many, multiples, plots_of, score_limits
from flowrl.compare.run import LOG
from flowrl.compare.spec import Comparison
from flowrl.errors import ConfigError
from flowrl.train import gallery
from flowrl.train.plots import lines_png
from flowrl.train.report import light_colors, number, render
from flowrl.train.runfiles import JSON, write_json, write_text

NAME = "compare"
_GROUPS = {
    "score": "Held-out score",
    "eval": "Other held-out metrics, at the end",
    "skill": "Score per skill, at the end",
    "training": "Training",
    "cost": "Cost",
}
# The table of methods: keys of quantities, and the heads of their columns.
_OVERVIEW = {
    "end": "held-out score",
    "eval/*/mean": "*",
    "gold_at_equal_proxy": "gold at equal proxy",
    "gold_of_base_there": "the baseline's there",
    "eval/diversity": "diversity",
    "eval/distance": "distance from base",
    "kl": "KL",
    "reach_seconds": "time to the baseline's score",
    "step_time": "s per step",
    "perf/nfe_per_image": "evaluations per image",
    "perf/train_rows_per_image": "trained rows per image",
    "steps": "steps",
    "perf/max_memory_gb": "GB",
}


def make_page(comparison: Comparison, *, command: str) -> list[Path]:
    """Writes the page and its companions from whatever runs there are.

    Args:
        comparison: what was run.
        command: that repeats it.

    Returns:
        The files written.

    Raises:
        ConfigError: no run has anything to show.
    """
    results = collect(comparison)
    if not results.curves:
        raise ConfigError(
            f"{comparison.folder} holds no run of {comparison.file} with an evaluation before and "
            f"one after training; run {command}"
        )
    folder = comparison.folder
    html, png, data, markdown = (folder / f"{NAME}.{end}" for end in ("html", "png", "json", "md"))
    lines_png(
        [(panel["title"], label, series) for panel, label, series in plots_of(results)],
        png,
        colors=light_colors(),
        limits=score_limits(results),
    )
    write_json(data, as_json(comparison, results, command))
    write_text(markdown, to_markdown(comparison, results))
    render(
        Path(__file__).parent / "compare.html.j2",
        html,
        config=comparison.config,
        folder=folder,
        date=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        facts=facts(comparison, results),
        lacking=results.lacking,
        warnings=warnings(results),
        entries=entries(comparison, results),
        overview=overview(results),
        tables=[
            {
                "title": title,
                "rows": _rows(results, group),
                "is_folded": group == "skill" or is_many(results),
            }
            for group, title in _GROUPS.items()
            if any(quantity.group == group for quantity in results.quantities)
        ],
        seeds=seeds_note(results),
        panels=[panel for panel, _, _ in plots_of(results)],
        multiples=multiples(results, comparison.baseline) if is_many(results) else [],
        samples=samples(results),
        runs=[_run_row(curve) for curves in results.curves.values() for curve in curves],
        command=command,
    )
    return [html, png, data, markdown]


# --------------------------------------------------------------------------- parts of the page


def facts(comparison: Comparison, results: Results) -> list[tuple[str, str]]:
    """What all runs share, as (name, value)."""
    budget = comparison.config.budget
    one = next(iter(results.curves.values()))[0]
    unit = {"minutes": "min of training", "steps": "steps", "evaluations": "network evaluations"}
    rewards = [each["name"] for each in one.files.option("rewards", [])]
    return [
        ("budget of a run", f"{number(budget.amount)} {unit[budget.kind]}"),
        ("seeds", ", ".join(str(seed) for seed in comparison.config.seeds)),
        ("baseline", comparison.baseline),
        ("model", str(one.files.option("model.id"))),
        ("reward", " + ".join(rewards)),
        ("device", str(one.files.env.get("device", "not known"))),
    ]


def warnings(results: Results) -> list[str]:
    """What differs between the runs although the numbers ask for it to be equal."""
    everyone = [curve for curves in results.curves.values() for curve in curves]
    found = []
    for what, value in (
        ("The runs were made on different devices", lambda c: c.files.env.get("device")),
        ("The runs had different numbers of threads", lambda c: c.files.env.get("OMP_NUM_THREADS")),
        ("The runs were made by different versions", lambda c: c.files.env.get("commit")),
        ("The evaluations took different numbers of sampler steps", _evaluated("num_steps")),
        ("The evaluations used different guidance", _evaluated("guidance_scale")),
    ):
        values = {json.dumps(value(curve)).strip('[]"'): curve.plan.title for curve in everyone}
        if len(values) > 1:
            listed = "; ".join(f"{each} ({title})" for each, title in values.items())
            found.append(f"{what}: {listed}.")
    return found


def entries(comparison: Comparison, results: Results) -> list[JSON]:
    """Per entry: its colour, method and paper, the paper's claim, and the value obtained."""
    claims = {entry.name: entry.claim for entry in comparison.config.runs}
    found = []
    for index, name in enumerate(results.curves):
        method = results.curves[name][0].files.method
        found.append(
            {
                "name": name,
                "color": color(index),
                "method": method.get("name", ""),
                "paper": method.get("paper") or "",
                "claim": claims[name] or "",
                "obtained": obtained(name, comparison.baseline, results),
            }
        )
    return found


def obtained(entry: str, baseline: str, results: Results) -> str:
    """A sentence with an entry's result, against the baseline where it is another."""

    def value(key: str, name: str = entry, digits: int = 3) -> str:
        stat = results.stat(key, name)
        return "–" if stat is None else show(stat, digits)

    num = len(results.curves[entry])
    steps = fmean(curve.spent["steps"][-1] for curve in results.curves[entry])
    text = (
        f"held-out score {value('start')} before and {value('end')} after "
        f"{steps:.0f} steps ({num} seed{'s' if num > 1 else ''})"
    )
    if entry == baseline or baseline not in results.curves:
        return f"{text}; {value('step_time', digits=2)} s per step."
    for key, words in (("seconds", "time"), ("steps", "steps"), ("evaluations", "evaluations")):
        key = f"at_equal_{key}"
        if results.stat(key, entry) is not None:
            text += f"; at equal {words} {value(key)} against {value(key, baseline)}"
    if results.stat("gold_at_equal_proxy", entry):
        text += (
            f"; where the proxy is as high as in {baseline}, gold is "
            f"{value('gold_at_equal_proxy')} against {value('gold_of_base_there')}"
        )
    if results.stat("reach_seconds", entry) and results.stat("reach_steps", entry):
        text += (
            f"; {baseline}'s final score is reached in {value('reach_seconds', digits=2)} of its "
            f"time and {value('reach_steps', digits=2)} of its steps"
        )
    return (
        f"{text}. A step takes {value('step_time_ratio', digits=2)} times as long as one of "
        f"{baseline} ({value('step_time', digits=2)} s against "
        f"{value('step_time', baseline, 2)} s), with "
        f"{value('evaluations_per_step_ratio', digits=2)} times its network evaluations."
    )


def overview(results: Results) -> JSON:
    """The table of methods: heads of its columns, and a row of cells per entry."""
    keys = {quantity.key: quantity for quantity in results.quantities}
    one = next(iter(results.curves.values()))[0].plan.config
    the_score = {f"eval/{each.label}/mean" for each in (one.eval.rewards or one.rewards)[:1]}
    columns = [
        (key, head.replace("*", key.removeprefix("eval/").removesuffix("/mean")))
        for pattern, head in _OVERVIEW.items()
        for key in sorted(keys)
        if fnmatch(key, pattern) and not key.startswith("eval/skill/") and key not in the_score
    ]
    # A spread of 0, as of counts, would only take room.
    cells = {
        key: [re.sub(r" ± 0\.?0*$", "", cell) for cell in _cells(keys[key], results)]
        for key, _ in columns
    }
    return {
        "heads": [head for _, head in columns],
        "rows": [
            {"name": name, "cells": [cells[key][index] for key, _ in columns]}
            for index, name in enumerate(results.curves)
        ],
    }


def samples(results: Results) -> JSON:
    """The same prompts and noise: before training, and after it by every entry."""
    runs = [curves[0] for curves in results.curves.values() if curves[0].files.evals]
    views = [gallery.View("before", run.files, run.files.evals[0]) for run in runs[:1]]
    views += [gallery.View(run.plan.entry, run.files, run.files.evals[-1]) for run in runs]
    seeds = sorted({run.plan.seed for run in runs})
    return gallery.side_by_side(views) | {"seeds": ", ".join(map(str, seeds))}


def seeds_note(results: Results) -> str:
    """How many seeds the means are over."""
    counts = {entry: len(curves) for entry, curves in results.curves.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{num} of {entry}" for entry, num in counts.items())
        return f"Mean ± standard deviation over seeds: {listed}."
    num = next(iter(counts.values()))
    if num == 1:
        return "One seed each, so nothing is known about the spread between seeds."
    return f"Mean ± standard deviation over {num} seeds."


def _rows(results: Results, group: str) -> list[JSON]:
    return [
        {"label": quantity.label, "cells": _cells(quantity, results)}
        for quantity in results.quantities
        if quantity.group == group
    ]


def _cells(quantity: Quantity, results: Results) -> list[str]:
    found = [quantity.stats.get(entry) for entry in results.curves]
    return ["–" if stat is None else show(stat, quantity.digits) for stat in found]


def _run_row(curve: Curve) -> JSON:
    score = [row.get("eval/score") for row in (curve.evals[0], curve.evals[-1])]
    return {
        "title": curve.plan.title,
        "state": "finished" if curve.is_finished else curve.files.status.get("state", "unknown"),
        "scores": f"{number(score[0])} → {number(score[1])}",
        "steps": int(curve.spent["steps"][-1]),
        "seconds": f"{curve.spent['seconds'][-1]:.1f}",
        "threads": curve.files.env.get("OMP_NUM_THREADS", ""),
        "commit": curve.files.env.get("commit", ""),
        "folder": str(curve.plan.folder),
        "log": str(curve.plan.folder / LOG),
    }


# --------------------------------------------------------------------------- other files


def as_json(comparison: Comparison, results: Results, command: str) -> JSON:
    """All numbers of the page, and the curves of every run."""
    return {
        "name": comparison.config.name,
        "command": command,
        "budget": {comparison.config.budget.kind: comparison.config.budget.amount},
        "seeds": list(comparison.config.seeds),
        "baseline": comparison.baseline,
        "common": results.common,
        "lacking": results.lacking,
        "warnings": warnings(results),
        "table": {
            quantity.key: {
                "label": quantity.label,
                "group": quantity.group,
                "entries": {name: vars(stat) for name, stat in quantity.stats.items()},
            }
            for quantity in results.quantities
        },
        "runs": [
            {
                "entry": curve.plan.entry,
                "seed": curve.plan.seed,
                "folder": str(curve.plan.folder),
                "is_finished": curve.is_finished,
                "evaluations": [
                    {axis: curve.spent[axis][index] for axis in AXES}
                    | {key: value for key, value in row.items() if key.startswith("eval/")}
                    for index, row in enumerate(curve.evals)
                ],
            }
            for curves in results.curves.values()
            for curve in curves
        ],
    }


def to_markdown(comparison: Comparison, results: Results) -> str:
    """The table as Markdown, with the sentence about each entry."""
    names = list(results.curves)
    table = overview(results)
    lines = [
        f"| | {' | '.join(table['heads'])} |",
        f"|---|{'---:|' * len(table['heads'])}",
        *(f"| {row['name']} | {' | '.join(row['cells'])} |" for row in table["rows"]),
        "",
        f"| {comparison.config.name} | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for group, title in _GROUPS.items():
        rows = _rows(results, group)
        if rows:
            lines.append(f"| **{title}** |{' |' * len(names)}")
        lines += [f"| {row['label']} | {' | '.join(row['cells'])} |" for row in rows]
    lines += ["", seeds_note(results), *results.lacking, *warnings(results), ""]
    for entry in entries(comparison, results):
        claim = f" The paper: {entry['claim']}" if entry["claim"] else ""
        lines.append(f"- **{entry['name']}**.{claim} Obtained: {entry['obtained']}")
    return "\n".join(lines) + "\n"


def _evaluated(key: str) -> Any:
    return lambda curve: [each.get(key) for each in curve.files.evals[-1:]]
