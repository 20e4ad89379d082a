"""The plot of a sweep: its metric over the runs, and over each parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.sweep.space import Dimension
from flowrl.sweep.spec import Sweep
from flowrl.sweep.table import PLOT, TrialRow, read_rows, show_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna import Study

_MAX_PANELS = 7


def write_plot(sweep: Sweep, study: Study, folder: Path) -> list[Path]:
    """Writes results.png; returns it, or nothing where no run has a value yet."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from flowrl.train.report import light_colors

    metric = sweep.config.metric
    assert metric is not None
    rows = read_rows(sweep, study, folder)
    if not any(row.best is not None for row in rows):
        return []
    colors = light_colors()
    shown = sweep.dimensions[:_MAX_PANELS]
    lines = math.ceil((1 + len(shown)) / 4)
    columns = math.ceil((1 + len(shown)) / lines)
    style: dict[Any, Any] = {
        "font.size": 8.5,
        "text.color": colors["ink"],
        "axes.edgecolor": colors["grid"],
        "axes.labelcolor": colors["muted"],
        "xtick.color": colors["muted"],
        "ytick.color": colors["muted"],
    }
    with rc_context(style):
        figure = Figure(figsize=(3.4 * columns, 3.0 * lines), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        _over_runs(grid[0], rows, colors, is_min=metric.goal == "minimize")
        grid[0].set_ylabel(f"best {metric.name} of a run")
        for axes, dimension in zip(grid[1:], shown, strict=False):
            _over_values(axes, rows, dimension, colors)
        for axes in grid[1 + len(shown) :]:
            axes.set_visible(False)
        for axes in grid:
            axes.grid(color=colors["grid"], linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.savefig(folder / PLOT, format="png")
    return [folder / PLOT]


def _over_runs(axes: Axes, rows: list[TrialRow], colors: dict[str, str], *, is_min: bool) -> None:
    """Each run's best, and the best of all so far as a line."""
    from matplotlib.ticker import MaxNLocator

    numbers = [int(row.name.rpartition("_")[2]) for row in rows]
    points = [(n, row.best) for n, row in zip(numbers, rows, strict=True) if row.best is not None]
    best: list[float] = []
    for _, value in points:
        choose = min if is_min else max
        best.append(choose([value, *best[-1:]]))
    axes.step([n for n, _ in points], best, where="post", color=colors["s1"], label="best so far")
    _scatter(axes, [(float(n), row) for n, row in zip(numbers, rows, strict=True)], colors)
    axes.set_xlabel("run")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=7)


def _over_values(
    axes: Axes, rows: list[TrialRow], dimension: Dimension, colors: dict[str, str]
) -> None:
    """Each run's best over one parameter; values that are no numbers stand in their order."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [row.values[dimension.path] for row in rows]
    is_numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if is_numeric:
        places = [float(value) for value in values]
        span = max(places) / min(places) if min(places) > 0 else 1.0
        if dimension.is_log or span >= 20:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        texts = [show_value(value) for value in values]
        order = list(dict.fromkeys(show_value(value) for value in dimension.extremes()))
        places = [float(order.index(text)) for text in texts]
        axes.set_xticks(range(len(order)), [text[:14] for text in order])
        axes.set_xlim(-0.5, len(order) - 0.5)
    _scatter(axes, list(zip(places, rows, strict=True)), colors)
    axes.set_xlabel(dimension.name)


def _scatter(axes: Axes, places: Sequence[tuple[float, TrialRow]], colors: dict[str, str]) -> None:
    """Finished runs as dots, the others as crosses."""
    for is_finished, marker in ((True, "o"), (False, "x")):
        chosen = [
            (x, row.best)
            for x, row in places
            if row.best is not None and (row.state == "finished") == is_finished
        ]
        xs, ys = [x for x, _ in chosen], [y for _, y in chosen]
        if chosen:
            label = "finished" if is_finished else "ended early, or open"
            axes.scatter(xs, ys, s=22, marker=marker, color=colors["s2"], label=label, zorder=3)
