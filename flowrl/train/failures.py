"""The report's section on rewards that failed: what was lost, how often calls failed, and why last.

Shares and calls over steps are metrics; the reasons, and the steps that were not logged, stand in
failures.jsonl. Reading order: `section`, `History`, `histories`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flowrl.train.curves import Panel, make_panel
from flowrl.train.plots import NUM_COLORS, Series
from flowrl.train.runfiles import JSON, RunFiles

_SHARE, _CALLS = "invalid_frac", "failed_calls"
_UNKNOWN = "not kept: the run is of an older version"
_SAID_NAN = "it returned NaN or infinity"


@dataclass(frozen=True)
class History:
    """What one reward lost, step by step.

    Attributes:
        reward: its name.
        where: "training" or "evaluation".
        shares: step -> share of its samples without a score.
        calls: step -> calls that failed.
        rows: of failures.jsonl, in order.
        num_steps: steps, or evaluations, in all.
    """

    reward: str
    where: str
    shares: dict[float, float]
    calls: dict[float, float]
    rows: list[JSON]
    num_steps: int

    @property
    def has_failed(self) -> bool:
        """Whether anything of it failed."""
        return any(self.shares.values()) or any(self.calls.values())

    @property
    def share(self) -> float:
        """Share of all its samples without a score; steps that have no row have lost none."""
        known = max(self.num_steps if self.rows else 0, len(self.shares))
        return sum(self.shares.values()) / known

    def table_row(self) -> JSON:
        """Its row in words; a run of an older version kept no numbers of samples and no reasons."""
        last = self.rows[-1] if self.rows else None
        lost, of = (sum(int(row.get(key, 0)) for row in self.rows) for key in ("lost", "of"))
        whole = round(of / max(len(self.rows), 1) * max(self.num_steps, len(self.rows)))
        return {
            "reward": self.reward,
            "where": "training" if self.where == "training" else "held-out",
            "lost": f"{lost} of {whole}" if last else "–",
            "share": percent(self.share),
            "calls": int(sum(self.calls.values())),
            "reason": reason(last) if last else _UNKNOWN,
            "step": last["step"] if last else None,
        }


def section(files: RunFiles) -> JSON | None:
    """What the template needs, with a row per reward that failed; None where nothing was scored."""
    found = list(histories(files))
    if not found:
        return None
    failed = [each for each in found if each.has_failed]
    return {
        "sentence": sentence(files, failed),
        "table": [each.table_row() for each in failed],
        "panels": panels([each for each in failed if each.where == "training"]),
    }


def histories(files: RunFiles) -> Iterator[History]:
    """What is known of every reward, first in training, then on the held-out prompts."""
    steps = {int(row["step"]) for row in files.rows if any(key[:6] == "train/" for key in row)}
    status = files.status.get("step")
    done = max([*steps, status if isinstance(status, int) else 0], default=0)
    keys = [key for key in files.metric_keys() if key.startswith("reward/")]
    logged = [key[len("reward/") : -len(_SHARE) - 1] for key in keys if key.endswith(f"/{_SHARE}")]
    for where, num, names in (("training", done, logged), ("evaluation", len(files.evals), [])):
        rows = [row for row in files.failures if row.get("where") == where]
        for name in dict.fromkeys([*names, *(str(row.get("reward")) for row in rows)]):
            mine = [row for row in rows if row.get("reward") == name]
            shares, calls = (
                {x: y for x, y in files.column(f"reward/{name}/{key}") if math.isfinite(y)}
                if where == "training"
                else {}
                for key in (_SHARE, _CALLS)
            )
            for row in mine:  # also of steps that were not logged, or that ended the run
                step = float(row["step"])
                shares[step] = int(row.get("lost", 0)) / max(int(row.get("of", 0)), 1)
                calls[step] = float(row.get("calls", 0))
            yield History(name, where, shares, calls, mine, max(num, len(mine)))


def sentence(files: RunFiles, failed: list[History]) -> str:
    """What all of it cost the training."""
    if not failed:
        return "No sample lost: every call of a reward was answered, and every sample has a score."
    masked = [value for _, value in files.column("train/invalid_frac") if math.isfinite(value)]
    if any(each.share for each in failed):
        text = "A sample without a score is masked and counted, never taken for 0."
        if masked:
            share = percent(sum(masked) / len(masked))
            text += f" {share} of the samples of the logged steps were not trained on"
            text += " (train/invalid_frac: with the groups of which too little was left)."
        return text
    return "No sample lost: the calls that failed were made again, or in halves, and answered."


def panels(failed: list[History]) -> list[Panel]:
    """Both curves over the training steps; none where training met no failure."""
    if not failed:
        return []
    shares = make_panel(
        "Samples without a score",
        "Share of a step's samples.",
        [_series(each, index, each.shares) for index, each in enumerate(failed)],
        limits=(0, None),
    )
    calls = make_panel(
        "Failed calls",
        "Calls in a step that raised or took too long, every try.",
        [_series(each, index, each.calls) for index, each in enumerate(failed)],
        limits=(0, None),
    )
    return [shares, calls]


def _series(history: History, index: int, values: dict[float, float]) -> Series:
    return Series(history.reward, sorted(values.items()), 1 + index % NUM_COLORS)


def reason(row: JSON) -> str:
    """Why the samples of a row of failures.jsonl have no score."""
    said_nan = int(row.get("lost", 0)) > int(row.get("unanswered", 0))
    words = [str(row.get("reason") or ""), _SAID_NAN if said_nan else ""]
    return "; ".join(word for word in words if word)


def percent(share: float) -> str:
    """A share as a person reads it; what is not 0 is never shown as 0."""
    if 0 < share < 0.0005:
        return "under 0.1 %"
    return f"{100 * share:.1f} %"
