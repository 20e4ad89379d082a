"""What every command that trains from data alone does around its run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from flowrl.commands.env import describe_environment
from flowrl.config import dump_config
from flowrl.pretrain.schema import FREE, run_folder

if TYPE_CHECKING:
    from flowrl.pretrain.loop import PretrainRun


def run_training(
    loaded: Any,
    build: Callable[[], PretrainRun],
    describe: Callable[[PretrainRun], str],
    *,
    command: Sequence[str],
) -> None:
    """Trains, evaluates and exports.

    Args:
        loaded: the config, with the sections of `flowrl.pretrain.schema`.
        build: makes its run.
        describe: says what is trained on what.
        command: as typed, to go on with.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    from flowrl.train.machine import end_training
    from flowrl.train.resume import find_checkpoint
    from flowrl.train.runfiles import write_json

    folder = run_folder(loaded)
    find_checkpoint(loaded, folder, free=FREE)  # refuses before anything older is touched
    run = build()
    if run.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        dump_config(loaded, folder / "config.yaml")
        write_json(folder / "env.json", dict(describe_environment()))
        print(describe(run), flush=True)
    run.accelerator.wait_for_everyone()
    outcome = run.run()
    if run.accelerator.is_main_process and outcome != "interrupted":
        print(f"model: {folder / 'final'}")
    end_training(run.accelerator)
    if outcome == "interrupted":
        again = shlex.join(["flowrl", *command, "run.resume=latest"])
        print(f"saved; go on with: {again}", file=sys.stderr)
        raise KeyboardInterrupt
