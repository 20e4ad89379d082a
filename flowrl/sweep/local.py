"""A sweep without an account: optuna chooses the values, this machine makes the runs.

A run is a process with the command line that an agent would issue; where it writes and its place in
optuna's journal follow from its number. What is not told to the journal is open: the same command
takes it up again, as a comparison does. Reading order: `run_local`, `_LocalSweep`.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.errors import ConfigError
from flowrl.sweep.command import Values
from flowrl.sweep.hyperband import is_left_behind
from flowrl.sweep.plot import write_plot
from flowrl.sweep.spec import Sweep
from flowrl.sweep.table import describe, outcome, write_tables
from flowrl.sweep.trials import (
    ask,
    best_of,
    num_queued,
    open_study,
    read_history,
    trial_name,
    trial_values,
)
from flowrl.train.control import Interrupt
from flowrl.train.processes import Job, Pool, failure, shared_cores, state_of
from flowrl.train.track import METRICS

if TYPE_CHECKING:
    from optuna import Study

_LOOK_S = 1.0
_INTERRUPTED = 130  # what `flowrl train` exits with when a signal has stopped it
# An agent's variables would make these runs part of its sweep.
_AGENTS = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH")


def run_local(
    sweep: Sweep,
    *,
    folder: Path,
    jobs: int,
    cores: int,
    trials: int | None,
    say: Callable[[str], None],
) -> list[str]:
    """Makes the runs that are still missing, and writes table and plot.

    Args:
        sweep: a sweep with a metric.
        folder: for the journal, the runs and the results.
        jobs: runs side by side.
        cores: CPU cores, shared out among the jobs.
        trials: runs in all, those made before included; None = the file's run_cap, or the grid's.
        say: takes a line about each run that ended.

    Returns:
        The runs that failed, by name; `say` has had the end of their logs and the remedy.

    Raises:
        ConfigError: the number of runs is open; the folder is in use, or holds another sweep.
        KeyboardInterrupt: by a signal; all runs have been stopped, and saved.
    """
    total = number_of_trials(sweep, trials)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"WANDB_MODE": "offline"} | shared_cores(cores, jobs)
    for name in _AGENTS:
        environment.pop(name, None)
    with _alone(folder):
        local = _LocalSweep(sweep, open_study(sweep, folder), folder, total, say)
        try:
            with Pool(environment) as pool, Interrupt().listening() as interrupt:
                return local.run(pool, interrupt, jobs)
        finally:
            for path in (
                *write_tables(sweep, local.study, folder),
                *write_plot(sweep, local.study, folder),
            ):
                say(str(path))


def number_of_trials(sweep: Sweep, trials: int | None) -> int:
    """How many runs the sweep has in all.

    Raises:
        ConfigError: nothing says so.
    """
    limits = [] if trials is None else [trials]
    if trials is None and sweep.config.run_cap is not None:
        limits.append(sweep.config.run_cap)
    if sweep.config.method == "grid":
        limits.append(len(sweep.grid))
    if not limits:
        raise ConfigError(
            f"{sweep.file}: method: {sweep.config.method} has no end of its own; set run_cap, or "
            "give --trials"
        )
    return min(limits)


class _LocalSweep:
    """The open runs of a sweep, and what their ends mean.

    Attributes:
        study: optuna's; a trial is told when its run has come to its end.
        failed: names of the runs that failed, or could not be made.
    """

    def __init__(
        self, sweep: Sweep, study: Study, folder: Path, total: int, say: Callable[[str], None]
    ) -> None:
        assert sweep.config.metric is not None
        self.sweep = sweep
        self.metric = sweep.config.metric
        self.study = study
        self.folder = folder
        self.total = total
        self.say = say
        self.failed: list[str] = []
        self._ended_early: set[Path] = set()
        self._numbers: dict[Path, int] = {}
        self._histories: dict[Path, tuple[int, list[float]]] = {}
        self._looked = 0.0

    def run(self, pool: Pool, interrupt: Interrupt, jobs: int) -> list[str]:
        """Brings all runs to their end; returns the names of those that failed."""
        waiting = self._open_jobs()
        while True:
            if interrupt.requested:
                pool.stop(self.say)
                raise KeyboardInterrupt
            while len(pool.jobs) < jobs:
                begun = waiting.pop(0) if waiting else self._next_job()
                if begun is None:
                    break
                state = state_of(begun, elsewhere="--output")
                if state == "finished":
                    self._conclude(begun)
                else:
                    pool.start(begun, state)
            if not pool.jobs:
                return self.failed
            for job, code in pool.wait():
                was_asked = job.folder in self._ended_early
                if code == 0 or (was_asked and code == _INTERRUPTED):
                    self._conclude(job)
                else:
                    self.say(failure(job, code))
                    self.failed.append(job.folder.name)
                write_tables(self.sweep, self.study, self.folder)
            self._look_at(pool)

    def _open_jobs(self) -> list[Job]:
        """The runs that were begun and not told.

        Raises:
            ConfigError: a run, finished ones too, is of another configuration than it would be
                now: the config file has changed.
        """
        waiting = []
        for trial in self.study.trials:
            is_open = trial.state.name == "RUNNING"
            if is_open or (self.folder / trial_name(trial.number)).exists():
                job = self._job(trial.number, trial_values(self.sweep, trial))
                state_of(job, elsewhere="--output")
                waiting += [job] if is_open else []
        return waiting

    def _next_job(self) -> Job | None:
        """A new run; None if there is none to make. Values that do not go together are told so."""
        from optuna.trial import TrialState

        while len(self.study.trials) - num_queued(self.study) < self.total:
            if self._has_reached_target():
                return None
            trial = ask(self.sweep, self.study)
            values = trial_values(self.sweep, trial)
            try:
                return self._job(trial.number, values)
            except ConfigError as error:
                self.study.tell(trial.number, state=TrialState.FAIL)
                name = trial_name(trial.number)
                self.say(f"{name} ({describe(values)}): not run, its values do not fit:\n{error}")
                self.failed.append(name)
        return None

    def _has_reached_target(self) -> bool:
        goal, target = self.metric.goal, self.metric.target
        if target is None:
            return False
        values = [trial.value for trial in self.study.trials if trial.value is not None]
        return any(v <= target if goal == "minimize" else v >= target for v in values)

    def _job(self, number: int, values: Values) -> Job:
        name = trial_name(number)
        folder = self.folder / name
        self._numbers[folder] = number
        return Job(
            f"{name} ({describe(values)})",
            folder,
            self.sweep.command.local_line(values, name=name, folder=self.folder),
            self.sweep.config_of(values, name=name, folder=self.folder),
        )

    def _conclude(self, job: Job) -> None:
        """Tells optuna how a run ended: by its best value, as W&B does."""
        from optuna.trial import TrialState

        history = read_history(job.folder, self.metric.name)
        number = self._numbers[job.folder]
        if history:
            self.study.tell(number, best_of(history, self.metric)[1])
        else:
            self.study.tell(number, state=TrialState.FAIL)
        early = ", ended early" if job.folder in self._ended_early else ""
        self.say(f"{job.title}: {outcome(job.folder, self.metric)}{early}")

    def _look_at(self, pool: Pool) -> None:
        """Asks the runs that are left behind to stop."""
        stopping = self.sweep.config.early_terminate
        if stopping is None or time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        folders = [self.folder / trial_name(trial.number) for trial in self.study.trials]
        histories = {folder: self._history(folder) for folder in folders}
        for job in pool.jobs:
            if job.folder not in self._ended_early and is_left_behind(
                histories[job.folder],
                list(histories.values()),
                bands=stopping.bands,
                eta=stopping.eta,
                goal=self.metric.goal,
                strict=stopping.strict,
            ):
                self._ended_early.add(job.folder)
                pool.ask_to_stop(job)

    def _history(self, folder: Path) -> list[float]:
        """A run's values so far, read again only where its file has grown."""
        file = folder / METRICS
        size = file.stat().st_size if file.is_file() else 0
        known = self._histories.get(folder)
        if known is None or known[0] != size:
            values = [value for _, value in read_history(folder, self.metric.name)]
            known = self._histories[folder] = (size, values)
        return known[1]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside the `with`, no other process sweeps in the folder.

    Raises:
        ConfigError: one does.
    """
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"a sweep is going on in {folder}, started by another process; wait for it, stop "
                "that one, or choose another --output"
            ) from error
        yield
