"""What surrounds the steps of any run: its tracker, its progress, its signals and its status.

`running` is the `with` in which a loop lives; status.json says what became of the run, whatever
ended it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from flowrl.config import to_dict
from flowrl.train.control import Interrupt
from flowrl.train.progress import Progress
from flowrl.train.runfiles import write_json
from flowrl.train.step import total
from flowrl.train.track import Tracker


@dataclass(frozen=True)
class Life:
    """What a loop speaks to between its steps.

    Attributes:
        accelerator: the run's.
        folder: the run's.
        tracker: takes metrics and images.
        progress: what a person sees.
        interrupt: whether a signal has come.
        where: steps done and seconds of training, for status.json.
    """

    accelerator: Accelerator
    folder: Path
    tracker: Tracker
    progress: Progress
    interrupt: Interrupt
    where: Callable[[], tuple[int, float]]

    def must_end(self, limits: str) -> str | None:
        """Says "interrupted" or "stopped" if any process has a signal or a limit; else None.

        Args:
            limits: which were reached here, "" for none.
        """
        if any_process(self.accelerator, self.interrupt.requested):
            return "interrupted"
        return "stopped" if any_process(self.accelerator, bool(limits)) else None

    def ended(self, how: str, limits: str) -> None:
        """Writes how the loop was left: "finished", "stopped" or "interrupted"."""
        why = {"stopped": limits or "another process's limit", "interrupted": "a signal"}
        self.status("finished" if how == "finished" else "stopped", why.get(how, ""))

    def status(self, state: str, reason: str = "") -> None:
        """Writes status.json."""
        if self.accelerator.is_main_process:
            step, seconds = self.where()
            status = {
                "state": state, "step": step, "minutes": round(seconds / 60, 2), "reason": reason,
            }  # fmt: skip
            write_json(self.folder / "status.json", status)


@contextmanager
def running(
    config: Any,
    accelerator: Accelerator,
    folder: Path,
    *,
    resumed_step: int | None,
    where: Callable[[], tuple[int, float]],
) -> Iterator[Life]:
    """Opens tracker and progress, listens to signals, and writes what becomes of the run.

    Args:
        config: a record with the sections `run` and `track`.
        accelerator: made with the trackers.
        folder: the run's.
        resumed_step: of the checkpoint that it goes on from; None = a new run.
        where: see `Life`.

    Raises:
        ConfigError: the folder holds another run.
    """
    run, track = config.run, config.track
    tracker = Tracker(
        accelerator,
        folder,
        config=to_dict(config),
        trackers=track.trackers,
        name=run.name,
        project=track.project,
        entity=track.entity,
        mode=track.mode,
        tags=track.tags,
        group=track.group,
        resumed_step=resumed_step,
    )
    progress = Progress(
        run.steps,
        start=resumed_step or 0,
        quiet=not accelerator.is_main_process,
        max_minutes=run.max_minutes,
    )
    interrupt = Interrupt()
    life = Life(accelerator, folder, tracker, progress, interrupt, where)
    try:
        with progress, interrupt.listening():
            life.status("running")
            yield life
    except KeyboardInterrupt:
        life.status("stopped", "interrupted twice; the last checkpoint stands")
        raise
    except BaseException as error:
        life.status("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        tracker.finish()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so: all must leave a loop together."""
    return total(accelerator, [float(flag)])[0] > 0
