"""The report's panels: which metrics stand together, and the sentence that says how to read them.

A panel is a dict of `title`, `note`, `legend` [(label, color, line)] and `svg`; where a run
logged nothing for it, `svg` is empty and `missing` says so. Reading order: `heldout`, `training`,
`cost`, `phases`.
"""

from __future__ import annotations

import math
from typing import Any

from flowrl.train.plots import NUM_COLORS, Point, Series, line_svg, smoothed, stack_svg
from flowrl.train.runfiles import RunFiles

Panel = dict[str, Any]

# Steps of which a smoothed curve is the mean: a twentieth of the run, where that is worth it.
_SMOOTH_FROM = 40
_SMOOTH_SHARE = 20

_SKILL_COLORS = (2, 3, 4, 5, 6, 8, 7)

_PHASES = (
    ("perf/rollout_s", "rollout", 1),
    ("perf/decode_s", "decode", 2),
    ("perf/reward_wait_s", "reward", 3),
    ("perf/train_s", "training", 4),
)


def heldout(files: RunFiles) -> Panel:
    """The held-out score over steps, overall and per skill."""
    skills = list(dict.fromkeys(tag for each in files.evals for tag in each.get("skills") or {}))
    series = [
        Series(
            tag.replace("_", " "),
            [
                (each["step"], _float(each["skills"][tag]))
                for each in files.evals
                if tag in (each.get("skills") or {})
            ],
            _SKILL_COLORS[index % len(_SKILL_COLORS)],
            is_strong=False,
        )
        for index, tag in enumerate(skills)
    ]
    score = [(float(each["step"]), _float(each.get("score"))) for each in files.evals]
    series.append(Series("score", score, 1))
    values = [y for each in series for _, y in each.points if math.isfinite(y)]
    is_share = bool(values) and min(values) >= 0 and max(values) <= 1
    panel = make_panel("Held-out score", "", series, wide=True, limits=(0, 1) if is_share else None)
    panel["legend"] = [*panel["legend"][-1:], *panel["legend"][:-1]]
    return panel


def training(files: RunFiles) -> list[Panel]:
    """The panels about learning, in the order in which one looks at them; none without a step."""
    if not any(key.startswith("train/") for key in files.metric_keys()):
        return []
    panels = [_reward(files), *_rewards(files)]
    columns = files.column
    panels.append(
        make_panel(
            "Deviation of the ratio",
            "Largest |ratio − 1| of a step's decisions, logarithmic. It is 0 on the first pass and "
            "grows with every update on the same samples.",
            [Series("", columns("train/ratio_max_dev"), 4)],
            log=True,
        )
    )
    panels.append(
        make_panel(
            "Clipped decisions",
            "Share of decisions beyond the upper and the lower bound of the ratio.",
            [
                Series("upper bound", columns("train/clip_frac_high"), 2),
                Series("lower bound", columns("train/clip_frac_low"), 6),
            ],
            limits=(0, None),
        )
    )
    panels.append(
        make_panel(
            "Divergence",
            "KL per decision: from the policy that drew the samples (half the mean squared "
            "log-ratio), and from the reference where the method asks for it.",
            [
                Series("from the behaviour policy", columns("train/approx_kl"), 5),
                Series("from the reference", columns("train/kl"), 1),
            ],
        )
    )
    panels.append(
        make_panel(
            "Gradient norm",
            "Before clipping"
            + (
                f"; longer ones are cut to {files.option('optim.max_grad_norm'):g}."
                if files.option("optim.max_grad_norm")
                else "."
            ),
            _with_mean("gradient norm", columns("train/grad_norm"), 3),
            limits=(0, None),
        )
    )
    panels.append(
        make_panel(
            "Samples that teach nothing",
            "Share of groups whose rewards are all equal, and of samples whose reward failed.",
            [
                Series("equal groups", columns("train/zero_std_frac"), 7),
                Series("failed rewards", columns("train/invalid_frac"), 8),
            ],
            limits=(0, None),
        )
    )
    return [*panels, *_moving(files)]


def _reward(files: RunFiles) -> Panel:
    points = files.column("train/reward_mean")
    spread = dict(files.column("train/reward_std"))
    band = [spread.get(x, 0.0) for x, _ in points]
    window = _window(len(points))
    note = "Mean over the rollout; the band is ± one standard deviation over its samples."
    if window == 1:
        return make_panel("Training reward", note, [Series("", points, 1, band)])
    return make_panel(
        "Training reward",
        note,
        [
            Series("step", points, 1, band, is_strong=False),
            Series(f"mean of {window} steps", smoothed(points, window), 1),
        ],
    )


def _rewards(files: RunFiles) -> list[Panel]:
    """Each reward by itself, where there is more than one."""
    keys = [
        key for key in files.metric_keys() if key.startswith("reward/") and key.endswith("/mean")
    ]
    if len(keys) < 2:
        return []
    series = [
        Series(key.split("/")[1], files.column(key), 1 + index % NUM_COLORS)
        for index, key in enumerate(keys)
    ]
    note = "Mean of each reward over the rollout, before weighting."
    return [make_panel("Rewards", note, series)]


def _moving(files: RunFiles) -> list[Panel]:
    """What the run changes on schedule, where it does change."""
    panels = []
    for key, title, note in (
        ("train/window_start", "Window", "First of the sampler steps that are stochastic."),
        ("train/lr", "Learning rate", "Of the step's last update."),
    ):
        points = files.column(key)
        if len({y for _, y in points}) > 1:
            panels.append(
                make_panel(title, note, [Series("", points, 6, is_stepped=True)], limits=(0, None))
            )
    return panels


def cost(files: RunFiles) -> list[Panel]:
    """Time per phase, and network evaluations per image, over steps."""
    layers = _layers(files)
    time: Panel = {
        "title": "Time per phase",
        "note": "Seconds of a training step.",
        "legend": [(layer.label, layer.color, "") for layer in layers],
        "svg": stack_svg(layers, label="Time per phase over training steps") if layers else "",
        "missing": "" if layers else "No step has logged its phases.",
    }
    rows = make_panel(
        "Network evaluations per image",
        "A guided evaluation counts as two. States that samples share are evaluated once.",
        [
            Series("rollout", files.column("perf/nfe_per_image"), 1),
            Series("with gradient", files.column("perf/train_rows_per_image"), 4),
        ],
        limits=(0, None),
    )
    return [time, rows]


def phases(files: RunFiles) -> list[dict[str, Any]]:
    """Mean seconds and share of each phase over all logged steps."""
    layers = _layers(files)
    totals = [sum(y for _, y in layer.points if math.isfinite(y)) for layer in layers]
    whole = sum(totals)
    return [
        {
            "label": layer.label,
            "color": layer.color,
            "seconds": total / len(layer.points),
            "share": total / whole,
        }
        for layer, total in zip(layers, totals, strict=True)
        if total > 0
    ]


def _layers(files: RunFiles) -> list[Series]:
    """The phases of a step, and the rest of its time."""
    steps = files.column("perf/step_time_s")
    phases = [
        (name, dict(points), color) for key, name, color in _PHASES if (points := files.column(key))
    ]
    if not steps or not phases:
        return []
    layers = [
        Series(name, [(x, times.get(x, math.nan)) for x, _ in steps], color)
        for name, times, color in phases
    ]
    known = [sum(_or_zero(times.get(x)) for _, times, _ in phases) for x, _ in steps]
    rest = [(x, max(0.0, _or_zero(y) - k)) for (x, y), k in zip(steps, known, strict=True)]
    return [*layers, Series("other", rest, 7)]


def _or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _with_mean(label: str, points: list[Point], color: int) -> list[Series]:
    window = _window(len(points))
    if window == 1:
        return [Series("", points, color)]
    mean = Series(f"mean of {window} steps", smoothed(points, window), color)
    return [Series(label, points, color, is_strong=False), mean]


def _window(num: int) -> int:
    return max(3, num // _SMOOTH_SHARE) if num >= _SMOOTH_FROM else 1


def make_panel(
    title: str,
    note: str,
    series: list[Series],
    *,
    wide: bool = False,
    limits: tuple[float | None, float | None] | None = None,
    log: bool = False,
    x_label: str = "training step",
    x_log: bool = False,
) -> Panel:
    """A figure of the page: curves without a value are left out; options are `line_svg`'s."""
    shown = [each for each in series if any(_is_drawn(y, log) for _, y in each.points)]
    panel: Panel = {"title": title, "note": note, "legend": [], "svg": "", "missing": ""}
    if not shown:
        is_logged = any(each.points for each in series)
        panel["missing"] = _why_empty(is_logged, log)
        return panel
    panel["legend"] = [(each.label, each.color, each.line) for each in shown if each.label]
    panel["svg"] = line_svg(
        shown,
        label=f"{title} over {x_label}s" if x_label.endswith("step") else f"{title}, {x_label}",
        wide=wide,
        limits=limits or (None, None),
        log=log,
        x_label=x_label,
        x_log=x_log,
    )
    return panel


def _is_drawn(y: float, log: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not log)


def _why_empty(is_logged: bool, log: bool) -> str:
    if not is_logged:
        return "This run has not logged it."
    if log:
        return "It was exactly 0 in every step, as it is when samples are used for one update."
    return "It was never a finite number."


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
