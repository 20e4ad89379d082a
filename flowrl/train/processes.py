"""Runs as processes: finished ones are skipped, interrupted ones go on, all are stopped cleanly.

Each is a `flowrl train` in a session of its own, so that Ctrl-C reaches it once, from here, and it
saves. What a folder holds decides what happens to it; comparisons and sweeps share this. Reading
order: `Job`, `state_of`, `Pool`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from flowrl.config import Config, load_config, to_dict
from flowrl.errors import ConfigError
from flowrl.train.resume import differences
from flowrl.train.track import METRICS

LOG = "log.txt"
State = Literal["new", "unsaved", "interrupted", "finished"]

_POLL_S = 0.2
_TAIL_LINES = 15
_GRACE_S = 20.0
# Where a run is and how it was started says nothing about its result.
_FREE = ("run.resume", "run.output_dir", "run.name", "track")
# Of status.json: a run that its own config ended came to its end.
_OWN_LIMITS = ("run.max_", "monitor.early_stop")


@dataclass(frozen=True)
class Job:
    """A run and how it is made.

    Attributes:
        title: as a line names it.
        folder: the run's.
        command: the whole command line, all but run.resume.
        config: what it resolves to.
    """

    title: str
    folder: Path
    command: tuple[str, ...]
    config: Config


def state_of(job: Job, *, elsewhere: str) -> State:
    """What the run's folder holds: nothing, a run without a checkpoint, one with, or a result.

    Args:
        job: the run.
        elsewhere: the option that chooses another folder, for the message.

    Raises:
        ConfigError: it holds a run of another configuration.
    """
    stored = job.folder / "config.yaml"
    if not stored.is_file():
        return "unsaved" if (job.folder / METRICS).exists() else "new"
    changed = [
        f"  {key}: {before} in the folder, {after} now"
        for key, before, after in differences(to_dict(load_config(stored)), to_dict(job.config), "")
        if not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    ]
    if changed:
        lines = "\n".join(changed)
        raise ConfigError(
            f"{job.folder} holds {job.title} of another configuration:\n{lines}\n"
            f"set these back, choose another {elsewhere}, or delete that folder to run it again"
        )
    if is_finished(job.folder):
        return "finished"
    has_checkpoint = any(job.folder.glob("checkpoints/step_*"))
    return "interrupted" if has_checkpoint else "unsaved"


def is_finished(folder: Path) -> bool:
    """Whether a run came to its last step, or to the limit that its config sets."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    reason = status.get("reason", "")
    is_spent = status.get("state") == "stopped" and any(each in reason for each in _OWN_LIMITS)
    return status.get("state") == "finished" or is_spent


def failure(job: Job, code: int) -> str:
    """How a run failed: its exit code, the end of its log and the remedy."""
    log = job.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    tail = "\n".join(f"  | {line}" for line in lines)
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    return (
        f"{job.title}: {how}; the end of {log}:\n{tail}\n"
        "  Correct what it says and run the same command again: finished runs are kept, and this "
        "one goes on from its last checkpoint."
    )


@dataclass
class _Active:
    """A run that is going on."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]


class Pool:
    """The runs that are going on; leaving the `with` ends what is left of them.

    Args:
        environment: variables of the processes.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._active: list[_Active] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abort()

    @property
    def jobs(self) -> list[Job]:
        """Those going on, the oldest first."""
        return [each.job for each in self._active]

    def start(self, job: Job, state: State) -> None:
        """Starts or continues a run.

        Raises:
            ConfigError: another process is at work in the folder.
        """
        job.folder.mkdir(parents=True, exist_ok=True)
        log = (job.folder / LOG).open("ab")
        try:  # the child inherits the lock, so it holds also where this process was killed
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            log.close()
            raise ConfigError(
                f"{job.title} is going on in {job.folder}, started by another process; wait for it "
                "or stop that one"
            ) from error
        if state == "unsaved":
            _clear(job.folder)
        command = [*job.command, *(["run.resume=latest"] if state == "interrupted" else [])]
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            log.close()
            raise ConfigError(f"{job.title}: {command[0]} cannot be run ({error})") from error
        self._active.append(_Active(job, process, log))

    def wait(self) -> list[tuple[Job, int]]:
        """Waits a moment; the runs that have ended meanwhile, with their exit codes."""
        time.sleep(_POLL_S)
        ended = [each for each in self._active if each.process.poll() is not None]
        for each in ended:
            self._active.remove(each)
            each.log.close()
        return [(each.job, each.process.returncode) for each in ended]

    def ask_to_stop(self, job: Job) -> None:
        """Asks one run to finish its step, save and end; `wait` tells when it has."""
        for each in self._active:
            if each.job == job:
                each.process.send_signal(signal.SIGTERM)

    def stop(self, say: Callable[[str], None]) -> None:
        """Asks all runs to save and waits for them; a second signal ends the waiting."""
        say(f"stopping: waiting for {len(self._active)} to finish the step and save")
        for each in self._active:
            each.process.send_signal(signal.SIGINT)
        for each in self._active:
            each.process.wait()

    def _abort(self) -> None:
        """Ends what is still there, after an error or a second signal."""
        for each in self._active:
            if each.process.poll() is None:
                each.process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for each in self._active:
            try:
                each.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
            each.log.close()
        self._active.clear()


def shared_cores(cores: int, jobs: int) -> dict[str, str]:
    """This process's variables, with the cores shared out among the jobs.

    What the user has set wins: on cores that others use as well, fewer threads are much faster.
    """
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ


def _clear(folder: Path) -> None:
    """Removes a run that ended before its first checkpoint: there is nothing to go on from."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOG:
            path.unlink()
