"""`flowrl train CONFIG [key=value ...]`: the run, from config to report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.commands.env import describe_environment
from flowrl.config import dump_config, load_config

if TYPE_CHECKING:
    from flowrl.build import Parts


def run(config: Path, overrides: Sequence[str]) -> None:
    """Trains, evaluates, exports and reports.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    loaded = load_config(config, overrides)  # before torch is loaded: a typo answers at once
    from flowrl.build import build_parts, build_trainer, run_folder
    from flowrl.commands.check import print_parts
    from flowrl.train.machine import end_training
    from flowrl.train.resume import find_checkpoint

    folder = run_folder(loaded)
    find_checkpoint(loaded, folder)  # refuses before anything of an older run is touched
    parts = build_parts(loaded, where=config.name)
    if parts.accelerator.is_main_process:
        print_parts(parts)
        prepare_folder(parts, folder)
    parts.accelerator.wait_for_everyone()
    trainer = build_trainer(parts, folder)
    try:
        outcome = trainer.run()
    finally:
        if parts.accelerator.is_main_process:
            _report(folder)
    end_training(parts.accelerator)
    if outcome == "interrupted":
        command = shlex.join(["flowrl", "train", str(config), *overrides, "run.resume=latest"])
        print(f"saved; go on with: {command}", file=sys.stderr)
        raise KeyboardInterrupt


def _report(folder: Path) -> None:
    """The report, also of a run that failed: it says why and where."""
    from rich.console import Console

    from flowrl.train.report import make_report

    Console().print(f"report: {make_report(folder)}", soft_wrap=True, highlight=False)


def prepare_folder(parts: Parts, folder: Path) -> None:
    """Writes what the run is, before it starts."""
    from flowrl.train.runfiles import write_json

    folder.mkdir(parents=True, exist_ok=True)
    dump_config(parts.config, folder / "config.yaml")
    method = {
        "name": parts.method.name,
        "paper": parts.method.paper,
        "rows": [list(row) for row in parts.method.describe()],
    }
    write_json(folder / "method.json", method)
    environment = dict(describe_environment()) | {
        "device": str(parts.accelerator.device),
        "mixed precision": parts.accelerator.mixed_precision,
    }
    write_json(folder / "env.json", environment)
