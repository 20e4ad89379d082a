"""The monitor that guards a run: a held-out reward, where it was best, and when to stop waiting.

A reward that is trained on rises; what was meant by it may rise no longer (Gao et al.,
arXiv:2210.10760). So the trainer follows another reward over its evaluations, of the evaluated
weights, and keeps those of the best evaluation in `RUN/best`. The trainer saves a checkpoint before
it writes that folder: a checkpoint never knows of another best than the one that is there, but for
a run that goes back to an older one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.config import Config, to_dict
from flowrl.train.runfiles import write_json

BEST = "best"
NOTE = "best.json"
# What of `eval` may change without making scores that do not compare.
_FREE = ("every", "num_samples_shown")


class Monitor:
    """The best evaluation so far by the reward `monitor.reward`; the same on all ranks.

    Attributes:
        step, score: of the best evaluation; None and -inf before the first one.
        num_worse: evaluations since then.
    """

    def __init__(self, config: Config) -> None:
        assert config.monitor.reward is not None
        self.reward = config.monitor.reward
        self.patience = config.monitor.early_stop
        measured = {k: v for k, v in to_dict(config)["eval"].items() if k not in _FREE}
        self._measured = {"monitor": self.reward, **measured}
        self.forget()

    def forget(self) -> None:
        """Begins anew: the next evaluation is the best."""
        self.step: int | None = None
        self.score = -math.inf
        self.num_worse = 0

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes in an evaluation; True = it is the best, and its weights are worth keeping.

        Those of step 0 are not: they are the base model. A score that is NaN is no best.
        """
        score = metrics[f"eval/{self.reward}/mean"]
        if not score > self.score:
            self.num_worse += 1
            return False
        self.step, self.score, self.num_worse = step, score, 0
        return step > 0

    def limit(self) -> str:
        """Why the run should end; empty while it should not."""
        if self.patience is None or self.num_worse < self.patience:
            return ""
        best = "never a number" if self.step is None else f"{self.score:.4g} at step {self.step}"
        return f"monitor.early_stop={self.patience} (best {self.reward}: {best})"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores."""
        score = self.score if math.isfinite(self.score) else None
        return {
            "measured": self._measured,
            "step": self.step,
            "score": score,
            "num_worse": self.num_worse,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes over what a checkpoint stored, unless it was measured in another way."""
        self.forget()
        if state is None or state["measured"] != self._measured:
            return
        self.step, self.num_worse = state["step"], state["num_worse"]
        self.score = -math.inf if state["score"] is None else state["score"]


def write_note(folder: Path, monitor: Monitor, run: Path) -> None:
    """Writes `folder/best.json`: step, reward and score of the best, and its other scores."""
    file = run / "eval" / f"step_{monitor.step:06d}.json"
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    note = {"step": monitor.step, "reward": monitor.reward, "score": monitor.score}
    write_json(folder / NOTE, note | {name: evaluation[name] for name in ("rewards", "distance")})


def read_note(run: Path) -> dict[str, Any]:
    """What `best.json` of a run says; empty where there is none that can be read."""
    try:
        note = json.loads((run / BEST / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
