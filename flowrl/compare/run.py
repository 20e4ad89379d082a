"""The runs of a comparison as processes: finished ones are skipped, interrupted ones go on.

Each is a `flowrl train` in a session of its own, so that Ctrl-C reaches it once, from here, and it
saves. What a folder holds decides what happens to it. Reading order: `run_all`, `state_of`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from flowrl.compare.spec import Comparison, Plan
from flowrl.config import load_config, to_dict
from flowrl.errors import ConfigError
from flowrl.train.checkpoint import differences
from flowrl.train.control import Interrupt
from flowrl.train.report import duration, number
from flowrl.train.runfiles import read_run
from flowrl.train.track import METRICS

LOG = "log.txt"
State = Literal["new", "unsaved", "interrupted", "finished"]

_POLL_S = 0.2
_TAIL_LINES = 15
_GRACE_S = 20.0
# Where a run is and how it was started says nothing about its result.
_FREE = ("run.resume", "run.output_dir", "run.name", "track")


@dataclass
class _Active:
    """A run that is going on."""

    plan: Plan
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def run_all(
    comparison: Comparison, *, jobs: int, cores: int, say: Callable[[str], None]
) -> list[Plan]:
    """Brings every run to its end.

    Args:
        comparison: what to run.
        jobs: runs side by side.
        cores: CPU cores, shared out among the jobs.
        say: takes a line about each run that ended.

    Returns:
        The runs that failed; `say` has had the end of their logs and the remedy.

    Raises:
        ConfigError: a folder holds a run of another configuration, or one that is going on.
        KeyboardInterrupt: by a signal; all runs have been stopped, and saved.
    """
    states = {plan.folder: state_of(plan) for plan in comparison.plans}  # refuses before any starts
    waiting = [plan for plan in comparison.plans if states[plan.folder] != "finished"]
    for plan in comparison.plans:
        if plan not in waiting:
            say(f"{plan.title}: finished before, {outcome(plan)}")
    # What the user has set wins: on cores that others use as well, fewer threads are much faster.
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} | os.environ
    active: list[_Active] = []
    failed: list[Plan] = []
    try:
        with Interrupt().listening() as interrupt:
            while waiting or active:
                if interrupt.requested:
                    _stop(active, say)
                    raise KeyboardInterrupt
                while waiting and len(active) < jobs:
                    plan = waiting.pop(0)
                    active.append(_start(plan, states[plan.folder], environment))
                time.sleep(_POLL_S)
                for each in [each for each in active if each.process.poll() is not None]:
                    active.remove(each)
                    each.log.close()
                    if not _is_done(each, say):
                        failed.append(each.plan)
    finally:
        _abort(active)
    return failed


def state_of(plan: Plan) -> State:
    """What the run's folder holds: nothing, a run without a checkpoint, one with, or a result.

    Raises:
        ConfigError: it holds a run of another configuration.
    """
    stored = plan.folder / "config.yaml"
    if not stored.is_file():
        return "unsaved" if (plan.folder / METRICS).exists() else "new"
    changed = [
        f"  {key}: {before} in the folder, {after} now"
        for key, before, after in differences(
            to_dict(load_config(stored)), to_dict(plan.config), ""
        )
        if not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    ]
    if changed:
        lines = "\n".join(changed)
        raise ConfigError(
            f"{plan.folder} holds {plan.title} of another configuration:\n{lines}\n"
            "set these back, choose another --out, or delete that folder to run it again"
        )
    if is_finished(plan.folder):
        return "finished"
    has_checkpoint = any(plan.folder.glob("checkpoints/step_*"))
    return "interrupted" if has_checkpoint else "unsaved"


def is_finished(folder: Path) -> bool:
    """Whether a run came to its last step, or to the limit that its config sets."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    is_spent = status.get("state") == "stopped" and "run.max_" in status.get("reason", "")
    return status.get("state") == "finished" or is_spent


def train_command(plan: Plan, *more: str) -> list[str]:
    """The arguments of `flowrl` that make a run."""
    return ["train", str(plan.file), *plan.overrides, *more]


def outcome(plan: Plan) -> str:
    """A run's result in a line: held-out score before and after, steps and training time."""
    files = read_run(plan.folder)
    scores = [each.get("score") for each in files.evals]
    score = f"score {number(scores[0])} → {number(scores[-1])}" if scores else "no evaluation"
    minutes = files.status.get("minutes") or 0
    return f"{score}, {files.status.get('step', 0)} steps, {duration(60 * minutes)} of training"


def _start(plan: Plan, state: State, environment: dict[str, str]) -> _Active:
    """Starts or continues a run.

    Raises:
        ConfigError: another process is at work in the folder.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    log = (plan.folder / LOG).open("ab")
    try:  # the child inherits the lock, so it holds also where this process was killed
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        log.close()
        raise ConfigError(
            f"{plan.title} is going on in {plan.folder}, started by another process; wait for it "
            "or stop that one"
        ) from error
    if state == "unsaved":
        _clear(plan.folder)
    more = ["run.resume=latest"] if state == "interrupted" else []
    arguments = train_command(plan, *more)
    log.write(f"\n$ flowrl {' '.join(arguments)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", "flowrl", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    return _Active(plan, process, log)


def _clear(folder: Path) -> None:
    """Removes a run that ended before its first checkpoint: there is nothing to go on from."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOG:
            path.unlink()


def _is_done(ended: _Active, say: Callable[[str], None]) -> bool:
    """Tells how a run ended; True if it came to its end."""
    plan, code = ended.plan, ended.process.returncode
    if code == 0 and is_finished(plan.folder):
        say(f"{plan.title}: {outcome(plan)}")
        return True
    log = plan.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    tail = "\n".join(f"  | {line}" for line in lines)
    how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
    say(
        f"{plan.title}: {how}; the end of {log}:\n{tail}\n"
        "  Correct what it says and run the same command again: finished runs are kept, and this "
        "one goes on from its last checkpoint."
    )
    return False


def _stop(active: Sequence[_Active], say: Callable[[str], None]) -> None:
    """Asks all runs to save and waits for them; a second signal ends the waiting."""
    say(f"stopping: waiting for {len(active)} to finish the step and save")
    for each in active:
        each.process.send_signal(signal.SIGINT)
    for each in active:
        each.process.wait()


def _abort(active: Sequence[_Active]) -> None:
    """Ends what is still there, after an error or a second signal."""
    for each in active:
        if each.process.poll() is None:
            each.process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for each in active:
        try:
            each.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()
        each.log.close()
