"""How much of a slow reward is hidden: a step that scores after the rollout, or during it.

`python benchmarks/overlap.py [key=value ...]` trains the Shapes model on a reward that takes as
long as the rollout and none of this machine's cores, as a served one does. One run without overlap,
and one for every number of parts, in one process; medians of the steps after the first two.
Against the rollout in one piece: small parts hide more and cost more.

Measured on two cores with `data.num_groups=96` (576 images a step): 1.15 times max(rollout, reward)
+ train in 6 parts, 1.06 in 12. With the quick start's 144 images: 1.38, 1.29, 1.24 and 1.27 in 2,
3, 4 and 6 parts, 0.73 to 0.66 of the step without overlap. With 288 images on one thread, beside
another job: 1.26 in 4 and in 8 parts.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl.build import build_parts, build_trainer, run_folder
from flowrl.commands.train import prepare_folder
from flowrl.config import load_config
from flowrl.train.scoring import RewardSet
from flowrl.train.track import read_metrics

STEPS, PARTS = 8, (2, 3, 4, 6, 12)
CONFIG = Path(__file__).parent.parent / "configs/quickstart.yaml"
PHASES = ("step_time_s", "rollout_s", "decode_s", "reward_s", "reward_wait_s", "train_s")


class Distant:
    """Brightness, after `seconds` per sample."""

    inputs = ("images",)
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score(self, *, images: Tensor) -> Tensor:
        """Mean intensity [B] of images [B, 3, H, W]."""
        time.sleep(self.seconds * len(images))
        return images.mean(dim=(1, 2, 3))


def main() -> None:
    """Prints the phases of both, and what they come to."""
    given = sys.argv[1:]
    free = phases(given, seconds=0.0, parts=1)
    drawn = free["rollout_s"] + free["decode_s"]
    config = load_config(CONFIG, given)
    seconds = drawn / (config.data.num_groups * config.data.group_size)
    rows = {
        "no reward": free,
        "after the rollout": phases(given, seconds=seconds, parts=1),
    }
    for parts in PARTS:
        rows[f"during it, {parts} parts"] = phases(given, seconds=seconds, parts=parts)
    print(f"\n{'':24}" + "".join(f"{name.removesuffix('_s'):>12}" for name in PHASES))
    for title, row in rows.items():
        print(f"{title:24}" + "".join(f"{row[name]:12.2f}" for name in PHASES))
    late = rows["after the rollout"]
    bound = max(drawn, late["reward_s"]) + free["train_s"]
    print(f"{'step over':24}{'max(rollout, reward) + train':>30}{'the step without overlap':>28}")
    for title, row in list(rows.items())[2:]:
        step = row["step_time_s"]
        print(f"{title:24}{step / bound:30.2f}{step / late['step_time_s']:28.2f}")


def phases(given: list[str], *, seconds: float, parts: int) -> dict[str, float]:
    """Medians of a short run's phases."""
    with tempfile.TemporaryDirectory() as folder:
        fixed: list[Any] = [
            f"run.output_dir={folder}", f"run.steps={STEPS}", "checkpoint.every=0", "eval.every=0",
            "eval.max_prompts=2", f"scoring.parts={parts}",
        ]  # fmt: skip
        built = build_parts(load_config(CONFIG, [*fixed, *given]), where=CONFIG.name)
        run = run_folder(built.config)
        prepare_folder(built, run)
        trainer = build_trainer(built, run)
        trainer.rewards = RewardSet([("distant", Distant(seconds), 1.0)])
        trainer.run()
        rows = [r for r in read_metrics(run / "metrics.jsonl") if "perf/step_time_s" in r][2:]
    return {name: statistics.median(row[f"perf/{name}"] for row in rows) for name in PHASES}


if __name__ == "__main__":
    main()
