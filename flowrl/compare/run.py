"""The runs of a comparison as processes: finished ones are skipped, interrupted ones go on.

Reading order: `run_all`, `job_of`; how a process is started, resumed and stopped is in
`flowrl.train.processes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from flowrl.compare.spec import Comparison, Plan
from flowrl.train.control import Interrupt
from flowrl.train.processes import LOG, Job, Pool, failure, is_finished, shared_cores, state_of
from flowrl.train.report import duration, number
from flowrl.train.runfiles import read_run

__all__ = ["LOG", "is_finished", "job_of", "outcome", "run_all", "train_command"]


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
    plans = {plan.folder: plan for plan in comparison.plans}
    all_jobs = [job_of(plan) for plan in comparison.plans]
    # Refuses before any starts.
    states = {job.folder: state_of(job, elsewhere="--out") for job in all_jobs}
    waiting = [job for job in all_jobs if states[job.folder] != "finished"]
    for job in all_jobs:
        if job not in waiting:
            say(f"{job.title}: finished before, {outcome(plans[job.folder])}")
    failed: list[Plan] = []
    with Pool(shared_cores(cores, jobs)) as pool, Interrupt().listening() as interrupt:
        while waiting or pool.jobs:
            if interrupt.requested:
                pool.stop(say)
                raise KeyboardInterrupt
            while waiting and len(pool.jobs) < jobs:
                job = waiting.pop(0)
                pool.start(job, states[job.folder])
            for job, code in pool.wait():
                plan = plans[job.folder]
                if code == 0 and is_finished(job.folder):
                    say(f"{job.title}: {outcome(plan)}")
                else:
                    say(failure(job, code))
                    failed.append(plan)
    return failed


def job_of(plan: Plan) -> Job:
    """A run of the comparison as a process."""
    command = (sys.executable, "-m", "flowrl", *train_command(plan))
    return Job(plan.title, plan.folder, command, plan.config)


def train_command(plan: Plan) -> list[str]:
    """The arguments of `flowrl` that make a run."""
    return ["train", str(plan.file), *plan.overrides]


def outcome(plan: Plan) -> str:
    """A run's result in a line: held-out score before and after, steps and training time."""
    files = read_run(plan.folder)
    scores = [each.get("score") for each in files.evals]
    score = f"score {number(scores[0])} → {number(scores[-1])}" if scores else "no evaluation"
    minutes = files.status.get("minutes") or 0
    return f"{score}, {files.status.get('step', 0)} steps, {duration(60 * minutes)} of training"
