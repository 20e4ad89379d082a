"""Curves of a run as SVG that lives in a page: its text, and its colours in light and in dark.

matplotlib draws with marker colours, which become the page's CSS variables (`--ink`, `--muted`,
`--grid`, `--s1` ... `--s8`), and leaves text as text. `lines_png` draws the same curves in the
page's light colours, for a text that cannot hold SVG. Nothing here knows what a metric means.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FormatStrFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

NUM_COLORS = 8
_LARGE = 10_000
_MAX_MARKERS = 30
_MAX_BARS = 40
_TICKS = [1, 2, 2.5, 5, 10]
_DASHES: Sequence[Any] = ("-", (0, (3, 1.6)), (0, (0.8, 1.8)))
NUM_DASHES = len(_DASHES)
_LEGEND_INSIDE = 8  # entries; a longer legend stands beside the plots

Point = tuple[float, float]
Colors = dict[str, str]

# What stands in an SVG until the page's CSS variables take its place, by their names.
_MARKERS: Colors = {"ink": "#0a0b0c", "muted": "#0d0e0f", "grid": "#1a1b1c"} | {
    f"s{index}": f"#a0b0{0xC0 + index:02x}" for index in range(1, NUM_COLORS + 1)
}


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: for the legend; empty = not in it.
        points: (x, y); y may be NaN, which leaves a gap.
        color: 1 to NUM_COLORS, the page's `--s<color>`.
        band: half-widths around y, or None.
        is_strong: drawn thick; the others are thin and half transparent.
        is_stepped: the value holds until the next point.
        text: written beside the last point, which is then drawn larger.
        dash: 0 = solid; 1 and 2 are broken, for more curves than colours.
    """

    label: str
    points: Sequence[Point]
    color: int = 1
    band: Sequence[float] | None = None
    is_strong: bool = True
    is_stepped: bool = False
    text: str = ""
    dash: int = 0

    @property
    def line(self) -> str:
        """How the page's legend draws it: a class of report.css."""
        return ("", "dashed", "dotted")[self.dash] if self.is_strong else "thin"


def line_svg(
    series: Sequence[Series],
    *,
    label: str,
    wide: bool = False,
    limits: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    x_label: str = "training step",
    x_log: bool = False,
) -> str:
    """Curves over the training step, or over another quantity.

    Args:
        series: at least one point between them.
        label: read out to those who do not see the picture.
        wide: the whole width of the page instead of half of it.
        limits: of the y axis; None = as the data has it.
        log: logarithmic y axis; what is not positive is left out.
        x_label: what the x axis shows.
        x_log: logarithmic x axis, in powers of two; every x is positive.

    Returns:
        An `<svg>` element.
    """
    with _figure(wide) as (figure, axes):
        _draw_all(axes, series, limits, log, x_label, _MARKERS, x_log=x_log)
        return _to_svg(figure, label)


def lines_png(
    plots: Sequence[tuple[str, str, Sequence[Series]]],
    path: Path,
    *,
    colors: Colors,
    limits: tuple[float | None, float | None] = (None, None),
    x_log: bool = False,
) -> None:
    """Plots side by side as a PNG file, with a legend in the first one, or beside the last.

    Args:
        plots: title, what the x axis shows, and the curves of each.
        path: the file.
        colors: by the names of the page's variables; `report.light_colors` has them.
        limits: of the y axes; None = as the data has it.
        x_log: logarithmic x axes, in powers of two.
    """
    with matplotlib.rc_context(_style_sheet(colors)):
        num = sum(bool(each.label) for each in plots[0][2])
        size = (5.6 * len(plots), 3.6) if num <= _LEGEND_INSIDE else (5.6 * len(plots) + 2.4, 4.6)
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, x_label, series) in zip(
            figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True
        ):
            _draw_all(axes, series, limits, False, x_label, colors, x_log=x_log)
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        if num <= _LEGEND_INSIDE:
            figure.axes[0].legend(frameon=False, loc="best")
        else:
            figure.axes[-1].legend(
                frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.8
            )
        figure.savefig(path, format="png")


def _draw_all(
    axes: Axes,
    series: Sequence[Series],
    limits: tuple[float | None, float | None],
    log: bool,
    x_label: str,
    colors: Colors,
    *,
    x_log: bool = False,
) -> None:
    if x_log:
        axes.set_xscale("log", base=2)
    for each in series:
        _draw(axes, each, log, colors)
    if log:
        axes.set_yscale("log")
    axes.set_ylim(*limits)
    xs = {x for each in series for x, _ in each.points}
    if len(xs) == 1:
        axes.set_xlim(*((min(xs) / 2, 2 * max(xs)) if x_log else (min(xs) - 1, max(xs) + 1)))
    for each in series:
        if each.text:
            _write(axes, each, colors)
    _style(axes, log, x_label=x_label, is_integer=all(x == int(x) for x in xs), x_log=x_log)


def stack_svg(layers: Sequence[Series], *, label: str, wide: bool = False) -> str:
    """Layers upon each other, all with the same x: bars for few steps, areas for many."""
    with _figure(wide) as (figure, axes):
        x = [point[0] for point in layers[0].points]
        base = [0.0] * len(x)
        for layer in layers:
            heights = [0.0 if math.isnan(y) else y for _, y in layer.points]
            top = [low + height for low, height in zip(base, heights, strict=True)]
            if len(x) <= _MAX_BARS:
                axes.bar(x, heights, bottom=base, width=0.7, color=_MARKERS[f"s{layer.color}"])
            else:
                axes.fill_between(x, base, top, color=_MARKERS[f"s{layer.color}"], linewidth=0)
            base = top
        axes.set_ylim(0, None)
        if len(x) == 1:
            axes.set_xlim(x[0] - 1, x[0] + 1)
        _style(axes)
        return _to_svg(figure, label)


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Means of the last `window` points (fewer at the start), leaving NaN out."""
    means = []
    for end in range(1, len(points) + 1):
        recent = [y for _, y in points[max(0, end - window) : end] if not math.isnan(y)]
        means.append((points[end - 1][0], sum(recent) / len(recent) if recent else math.nan))
    return means


def _style_sheet(colors: Colors) -> dict[Any, Any]:
    return {  # matplotlib's own type is a list of all its keys
        "svg.fonttype": "none",
        "svg.hashsalt": "flowrl",
        "font.size": 8.5,
        "axes.unicode_minus": True,
        "text.color": colors["ink"],
        "axes.edgecolor": colors["grid"],
        "axes.labelcolor": colors["muted"],
        "xtick.color": colors["muted"],
        "ytick.color": colors["muted"],
        "grid.color": colors["grid"],
        "grid.linewidth": 0.6,
    }


@contextmanager
def _figure(wide: bool) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_style_sheet(_MARKERS)):
        width, height = (10.9, 3.3) if wide else (5.25, 2.3)
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        # Fixed margins, in inches: panels below each other line up, and no layout has to be solved.
        figure.subplots_adjust(
            left=0.5 / width, right=1 - 0.08 / width, bottom=0.42 / height, top=1 - 0.17 / height
        )
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def _draw(axes: Axes, series: Series, log: bool, colors: Colors) -> None:
    x = [point[0] for point in series.points]
    y = [math.nan if log and not point[1] > 0 else point[1] for point in series.points]
    color = colors[f"s{series.color}"]
    finite = sum(not math.isnan(each) for each in y)
    marker = "o" if series.is_strong and finite <= _MAX_MARKERS else None
    axes.plot(
        x,
        y,
        label=series.label or "_",  # the underscore keeps it out of a legend
        color=color,
        linewidth=1.9 if series.is_strong else 1.0,
        linestyle=_DASHES[series.dash],
        alpha=1.0 if series.is_strong else 0.6,
        marker=marker,
        markersize=3.2,
        solid_capstyle="round",
        dash_capstyle="round",
        drawstyle="steps-post" if series.is_stepped else "default",
    )
    if series.band is not None:
        low = [each - half for each, half in zip(y, series.band, strict=True)]
        high = [each + half for each, half in zip(y, series.band, strict=True)]
        if len(x) == 1:
            axes.vlines(x, low, high, color=color, alpha=0.3, linewidth=6)
        axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)


def _write(axes: Axes, series: Series, colors: Colors) -> None:
    """The text beside the last point, towards the middle of the axes, and the point."""
    x, y = series.points[-1]
    is_right = x > sum(axes.get_xlim()) / 2
    axes.plot([x], [y], marker="o", markersize=6.5, color=colors[f"s{series.color}"])
    axes.annotate(
        series.text,
        (x, y),
        xytext=(-7 if is_right else 7, 6),
        textcoords="offset points",
        ha="right" if is_right else "left",
        color=colors["ink"],
    )


def _style(
    axes: Axes,
    log: bool = False,
    *,
    x_label: str = "training step",
    is_integer: bool = True,
    x_log: bool = False,
) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, pad=5)
    if x_log:
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=is_integer, nbins=8, steps=_TICKS))
    if axes.get_xlim()[1] >= _LARGE:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not log:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_TICKS))
    axes.set_xlabel(x_label, fontsize=8)
    axes.margins(x=0.015)


def _to_svg(figure: Figure, label: str) -> str:
    """The figure as an element of an HTML page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    for variable, color in _MARKERS.items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # it would style the whole page
    # Several pictures share a page, and with it one space of ids.
    name = f"p{zlib.crc32(label.encode()):x}"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    head = re.search(r'viewBox="([^"]+)"', svg)
    assert head is not None
    opening = (
        f'<svg viewBox="{head[1]}" role="img" aria-label="{_escape(label)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + svg[svg.index(">") + 1 :].strip()


def _escape(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ('"', "&quot;")):
        text = text.replace(character, entity)
    return text
