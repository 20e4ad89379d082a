"""The report's section on over-optimisation: what is trained on (the proxy) against what is meant.

Two pictures of the held-out means, in the order of steps: the monitor over the proxy, and both over
the distance from the base (Gao et al., arXiv:2210.10760, fig. 1); and one sentence that says where
the monitor was best. Without `monitor.reward` the first held-out reward that is not trained on
takes its place. Reading order: `section`, `sentence`, `panels`.
"""

from __future__ import annotations

import math

from flowrl.schema import RewardConfig
from flowrl.train.curves import Panel, make_panel
from flowrl.train.monitor import BEST, read_note
from flowrl.train.plots import Point, Series
from flowrl.train.runfiles import JSON, RunFiles

# Proxy and monitor share an axis unless that would make one of them this many times flatter.
_MAX_STRETCH = 5
_PROXY, _GOLD = 2, 1  # colours


def section(files: RunFiles) -> JSON | None:
    """What the template needs; None where nothing but what is trained on was evaluated."""
    measured = list(dict.fromkeys(n for each in files.evals for n in each.get("rewards") or {}))
    trained = _trained(files)
    gold = files.option("monitor.reward")
    if gold is None:
        gold = next((name for name in measured if name not in trained), None)
    proxy = files.option("monitor.proxy")
    weights = {n: w for n, w in trained.items() if n in measured} if proxy is None else {proxy: 1.0}
    if gold not in measured or not weights:
        return None
    best = best_evaluation(files, gold)
    return {
        "gold": gold,
        "is_guarded": files.option("monitor.reward") is not None,
        "sentence": sentence(files, gold, best),
        "panels": panels(files, gold, weights, best, is_trained=proxy is None),
    }


def best_evaluation(files: RunFiles, gold: str) -> JSON | None:
    """The evaluation with the highest mean, the first of equals; None where there is no number."""
    scored = [each for each in files.evals if _mean(each, {gold: 1.0}) is not None]
    return max(scored, key=lambda each: each["rewards"][gold], default=None)


def sentence(files: RunFiles, gold: str, best: JSON | None) -> str:
    """Where the monitor was best, how it ended, and where the weights of the best are."""
    if best is None:
        return f"{gold} was never a finite number on the held-out prompts."
    last = files.evals[-1]
    score, step, end = _text(best["rewards"][gold]), best["step"], _mean(last, {gold: 1.0})
    if best is files.evals[0] and best is last:
        return f"There is one evaluation only: {gold} is {score} at step {step}."
    if best is last:
        text = f"{gold} was still rising: its best is that of the last evaluation, {score} at step "
        text += str(step)
    else:
        peaked = f"peaked at step {step} ({score})"
        if step == 0:
            peaked = f"was never above the base model's {score}"
        ended = "is no number" if end is None else f"is {_text(end)}"
        text = f"{gold} {peaked} and {ended} at the end, step {last['step']}"
    note = read_note(files.folder)
    if (note.get("reward"), note.get("step")) == (gold, step):
        text += f"; the weights of step {step} are in {BEST}/"
    return f"{text}."


def panels(
    files: RunFiles, gold: str, weights: dict[str, float], best: JSON | None, *, is_trained: bool
) -> list[Panel]:
    """The monitor over the proxy, then both over the distance from the base.

    Args:
        files: the run's.
        gold: the monitor.
        weights: the proxy, a weighted sum of rewards.
        best: the evaluation that is marked.
        is_trained: the proxy is what is trained on, not a stand-in.
    """
    name = " + ".join(n if w == 1 else f"{w:g} x {n}" for n, w in weights.items())
    wanted = {gold: 1.0}
    found = []
    if weights != wanted:
        points = [
            (x, y, each)
            for each in files.evals
            if (x := _mean(each, weights)) is not None and (y := _mean(each, wanted)) is not None
        ]
        role = "is trained on" if is_trained else "stands for what is trained on"
        found.append(
            make_panel(
                f"{gold} against {name}",
                f"Held-out means of every evaluation, joined in the order of steps; {name} {role}. "
                f"Where the line turns down, more of it costs some {gold}.",
                _path(points, best, "", _GOLD),
                x_label=f"{name}, held-out mean",
            )
        )
    curves = {gold: _over_distance(files, wanted, best, gold, _GOLD)}
    if weights != wanted:
        curves[name] = _over_distance(files, weights, None, name, _PROXY)
    together = [list(curves)] if _is_comparable(list(curves.values())) else [[n] for n in curves]
    for names in together:
        panel = make_panel(
            f"{' and '.join(names)} by distance from the base",
            "Held-out means, and how far the network has moved: the root mean square change of "
            "what it predicts on fixed samples of the base model (eval/distance).",
            [series for each in names for series in curves[each]],
            x_label="distance from the base model",
        )
        if not any(curves.values()):
            panel["missing"] = "The distance is measured where monitor.reward is set."
        found.append(panel)
    return found


def _over_distance(
    files: RunFiles, weights: dict[str, float], best: JSON | None, label: str, color: int
) -> list[Series]:
    points = [
        (float(each["distance"]), y, each)
        for each in files.evals
        if each.get("distance") is not None and (y := _mean(each, weights)) is not None
    ]
    return _path(points, best, label, color)


def _path(
    points: list[tuple[float, float, JSON]], best: JSON | None, label: str, color: int
) -> list[Series]:
    """A line through the points; of a monitor with words at the best and the last."""
    if not points:
        return []
    line: list[Point] = [(x, y) for x, y, _ in points]
    series = [Series(label, line, color)]
    for index, (x, y, each) in enumerate(points):
        name = f"step {each['step']}" if each["step"] else "base model"
        if each is best:
            series.append(Series("", [(x, y)], color, text=f"{name}, best"))
        elif best is not None and index == len(points) - 1:
            series.append(Series("", [(x, y)], color, text=name))
    return series


def _is_comparable(curves: list[list[Series]]) -> bool:
    """Whether curves can be read on one axis: as those of shares can, and those of like spread."""

    def span(series: list[Series]) -> float:
        values = [y for each in series for _, y in each.points]
        return max(values, default=0.0) - min(values, default=0.0)

    whole = span([each for series in curves for each in series])
    return whole <= max(1.0, _MAX_STRETCH * min(map(span, curves)))


def _text(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _mean(evaluation: JSON, weights: dict[str, float]) -> float | None:
    """The weighted sum of an evaluation's means; None where one of them is missing."""
    rewards = evaluation.get("rewards") or {}
    values = [rewards.get(name) for name in weights]
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return float(sum(w * v for w, v in zip(weights.values(), values, strict=True)))


def _trained(files: RunFiles) -> dict[str, float]:
    """Label and weight of the rewards trained on."""
    rows = [row for row in files.option("rewards", []) if isinstance(row.get("name"), str)]
    weighed = {RewardConfig(name=r["name"]).label: float(r.get("weight", 1.0)) for r in rows}
    return {label: weight for label, weight in weighed.items() if weight}
