"""The numbers of a comparison: what was reached at which cost, over seeds, and the table of them.

Reading order: `Quantity`, `Results`, `collect`, then a function per part of the table.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flowrl.compare.curves import (
    AXES,
    SCORE,
    Axis,
    Curve,
    Stat,
    first_reached,
    interpolated,
    mean_curve,
    over_seeds,
    path_over_proxy,
    read_curve,
)
from flowrl.compare.spec import Comparison

_KL_STEPS = 10


@dataclass(frozen=True)
class Quantity:
    """One line of the table.

    Attributes:
        key: in compare.json.
        label: in words, with the unit.
        group: the part of the table that it belongs to.
        digits: decimals shown.
        stats: per entry; absent where no run of it has the number.
    """

    key: str
    label: str
    group: str
    digits: int
    stats: dict[str, Stat]


@dataclass(frozen=True)
class Results:
    """All numbers of a comparison.

    Attributes:
        curves: per entry, its runs that have something to show, by seed.
        lacking: the runs that have not, or not all, as sentences.
        common: per axis, the largest cost that all of `curves` reached.
        quantities: the table.
        guarded: (proxy, gold), where every run has the same monitor of the same proxy; else None.
    """

    curves: dict[str, list[Curve]]
    lacking: list[str]
    common: dict[Axis, float]
    quantities: list[Quantity]
    guarded: tuple[str, str] | None = None

    def stat(self, key: str, entry: str) -> Stat | None:
        """A number of the table."""
        return next((q.stats.get(entry) for q in self.quantities if q.key == key), None)


def collect(comparison: Comparison) -> Results:
    """All numbers, from whatever runs there are."""
    curves: dict[str, list[Curve]] = {}
    lacking = []
    for plan in comparison.plans:
        curve = read_curve(plan)
        if curve is None:
            lacking.append(f"{plan.title}: nothing to show yet.")
            continue
        curves.setdefault(plan.entry, []).append(curve)
        if not curve.is_finished:
            state = curve.files.status.get("state", "unknown")
            at = int(curve.evals[-1]["step"])
            lacking.append(f"{plan.title}: not finished ({state}); counted up to step {at}.")
    names = [entry.name for entry in comparison.config.runs]
    curves = {name: curves[name] for name in names if name in curves}  # in the order of the file
    everyone = [curve for group in curves.values() for curve in group]
    common: dict[Axis, float] = {}
    if everyone:
        common = {axis: min(curve.spent[axis][-1] for curve in everyone) for axis in AXES}
    guarded = guard_of(comparison)
    table = _table(comparison, curves, common, guarded)
    return Results(curves, lacking, common, table, guarded)


def guard_of(comparison: Comparison) -> tuple[str, str] | None:
    """(proxy, gold) of all runs: what stands for the trained reward, and the monitor."""
    monitors = [plan.config.monitor for plan in comparison.plans]
    proxies, golds = {each.proxy for each in monitors}, {each.reward for each in monitors}
    if len(proxies) > 1 or len(golds) > 1:
        return None
    proxy, gold = proxies.pop(), golds.pop()
    return None if proxy is None or gold is None else (proxy, gold)


# --------------------------------------------------------------------------- the table


def _table(
    comparison: Comparison,
    curves: dict[str, list[Curve]],
    common: dict[Axis, float],
    guarded: tuple[str, str] | None,
) -> list[Quantity]:
    base = comparison.baseline
    quantities = [
        *_scores(curves, common), *_reached(curves, base), *_other_metrics(curves),
        *(_overoptimisation(curves, guarded, base) if guarded else []), *_costs(curves),
    ]  # fmt: skip
    for key, label in (
        ("step_time", f"time per step against {base}"),
        ("evaluations_per_step", f"network evaluations per step against {base}"),
    ):
        if ratio := _against(quantities, key, label, base):
            below = 1 + [quantity.key for quantity in quantities].index(key)
            quantities.insert(below, ratio)
    order = ("score", "eval", "skill", "training", "cost")
    return sorted(quantities, key=lambda quantity: order.index(quantity.group))


def _line(
    curves: dict[str, list[Curve]],
    key: str,
    label: str,
    group: str,
    digits: int,
    value: Callable[[Curve], float | None],
) -> list[Quantity]:
    """A line of the table, or none where no run has the number."""
    found = {entry: over_seeds(value(each) for each in runs) for entry, runs in curves.items()}
    stats = {entry: stat for entry, stat in found.items() if stat is not None}
    return [Quantity(key, label, group, digits, stats)] if stats else []


def _scores(curves: dict[str, list[Curve]], common: dict[Axis, float]) -> list[Quantity]:
    lines = [
        *_line(curves, "start", "before training", "score", 3, lambda c: c.first(SCORE)),
        *_line(curves, "end", "at the end", "score", 3, lambda c: c.final(SCORE)),
    ]
    labels: dict[Axis, str] = {
        "seconds": "after {:.3g} s of training",
        "steps": "after {:g} steps",
        "evaluations": "after {:.4g} network evaluations",
    }
    for axis, label in labels.items():
        if axis in common and math.isfinite(common[axis]):
            at, spent = partial(_score_at, axis=axis, spent=common[axis]), common[axis]
            lines += _line(curves, f"at_equal_{axis}", label.format(spent), "score", 3, at)
    return lines


def _reached(curves: dict[str, list[Curve]], base: str) -> list[Quantity]:
    """The cost at which an entry's mean curve reaches the baseline's final score, over its cost.

    Nothing for an entry that never does, as far as all of its runs go; nothing at all where the
    baseline itself did not rise.
    """
    if base not in curves:
        return []
    ends = [curve.points("steps")[-1] for curve in curves[base] if curve.points("steps")]
    target = statistics.fmean(score for _, score in ends)
    if target <= mean_curve(curves[base], "steps")[0][0][1]:
        return []
    lines = []
    words: dict[Axis, str] = {"seconds": "time", "evaluations": "evaluations", "steps": "steps"}
    for axis, what in words.items():
        whole = statistics.fmean(curve.spent[axis][-1] for curve in curves[base])
        found = {
            entry: Stat(spent / whole, None, len(runs))
            for entry, runs in curves.items()
            if (spent := first_reached(mean_curve(runs, axis)[0], target)) is not None
        }
        label = f"{what} to reach {base}'s final score, over {base}'s {what}"
        lines.append(Quantity(f"reach_{axis}", label, "score", 2, found))
    return [line for line in lines if line.stats]


def _score_at(curve: Curve, *, axis: Axis, spent: float) -> float | None:
    return interpolated(curve.points(axis), spent)


def _other_metrics(curves: dict[str, list[Curve]]) -> list[Quantity]:
    """Every other metric of the evaluations, at the end; diversity before as well."""
    everyone = [curve for runs in curves.values() for curve in runs]
    keys = dict.fromkeys(
        key
        for curve in everyone
        for row in curve.evals
        for key in row
        if key.startswith("eval/") and key != SCORE
    )
    first = "eval/diversity"
    lines = _line(curves, f"{first}/start", "diversity before", "eval", 3, lambda c: c.first(first))
    for key in sorted(keys, key=lambda key: (key != first, key)):
        name = key.removeprefix("eval/").removesuffix("/mean")
        is_skill = name.startswith("skill/")
        label = name.removeprefix("skill/").replace("_", " ") if is_skill else name
        group = "skill" if is_skill else "eval"
        lines += _line(curves, key, label, group, 3, partial(Curve.final, key=key))
    return lines


def _overoptimisation(
    curves: dict[str, list[Curve]], guarded: tuple[str, str], base: str
) -> list[Quantity]:
    """What is left of gold where the proxy has risen as far as in the baseline, and its best."""
    proxy, gold = guarded
    paths = {
        name: [path_over_proxy(each, guarded) for each in runs] for name, runs in curves.items()
    }
    if base not in paths or not all(path for runs in paths.values() for path in runs):
        return []

    def at(entry: str, level: float) -> Stat | None:
        return over_seeds(first_reached([(y, x) for x, y in p], level) for p in paths[entry])

    def line(key: str, label: str, values: dict[str, Stat | None]) -> Quantity:
        known = {name: stat for name, stat in values.items() if stat is not None}
        return Quantity(key, label, "eval", 3, known)

    # As far as every run of both goes.
    levels = {
        name: min(max(x for x, _ in path) for path in [*runs, *paths[base]])
        for name, runs in paths.items()
    }
    best = {name: over_seeds(max(y for _, y in path) for path in runs)
            for name, runs in paths.items()}  # fmt: skip
    return [
        line("gold_best", f"{gold} at its best", best),
        line("equal_proxy", f"{proxy} that all its runs and {base}'s reach",
             {name: Stat(level, None, len(paths[name])) for name, level in levels.items()}),
        line("gold_at_equal_proxy", f"{gold} there",
             {name: at(name, level) for name, level in levels.items()}),
        line("gold_of_base_there", f"{gold} of {base} there",
             {name: at(base, level) for name, level in levels.items()}),
    ]  # fmt: skip


def _costs(curves: dict[str, list[Curve]]) -> list[Quantity]:
    def kl(curve: Curve) -> float | None:
        values = curve.values("train/kl")[-_KL_STEPS:]
        return statistics.fmean(values) if values else None

    def median(key: str) -> Callable[[Curve], float | None]:
        return lambda curve: statistics.median(curve.values(key) or [math.nan])

    def evaluations_per_step(curve: Curve) -> float | None:
        steps = curve.spent["steps"][-1]
        return curve.spent["evaluations"][-1] / steps if steps else None

    lines = _line(curves, "kl", f"KL, mean of the last {_KL_STEPS} steps", "training", 5, kl)
    cost = "cost"
    lines += _line(curves, "steps", "steps", cost, 1, lambda c: c.spent["steps"][-1])
    lines += _line(curves, "seconds", "training time, s", cost, 1, lambda c: c.spent["seconds"][-1])
    lines += _line(curves, "step_time", "time per step, s", cost, 2, median("perf/step_time_s"))
    for key, label, digits in (
        ("perf/rollout_s", "rollout, s", 2),
        ("perf/decode_s", "decode, s", 2),
        ("perf/reward_wait_s", "reward, s", 2),
        ("perf/train_s", "forward and backward, s", 2),
        ("perf/nfe_per_image", "network evaluations per image, rollout", 2),
        ("perf/train_rows_per_image", "trained rows per image", 2),
    ):
        lines += _line(curves, key, label, cost, digits, median(key))
    lines += _line(
        curves, "evaluations_per_step", "network evaluations per step", cost, 0,
        evaluations_per_step,
    )  # fmt: skip
    lines += _line(
        curves, "perf/max_memory_gb", "peak memory, GB", cost, 2,
        lambda c: max(c.values("perf/max_memory_gb"), default=math.nan),
    )  # fmt: skip
    return lines


def _against(quantities: Sequence[Quantity], key: str, label: str, base: str) -> Quantity | None:
    """The ratio of means to the baseline's; no spread, because the seeds are not paired."""
    line = next((quantity for quantity in quantities if quantity.key == key), None)
    if line is None or base not in line.stats:
        return None
    whole = line.stats[base].mean
    stats = {name: Stat(stat.mean / whole, None, stat.num) for name, stat in line.stats.items()}
    return Quantity(f"{key}_ratio", label, line.group, 2, stats)
