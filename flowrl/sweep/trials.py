"""A sweep's runs as optuna's trials: the journal, the next values, and what a run has logged.

Reading order: `open_study`, `ask`, `trial_values`, `read_history`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError, MissingDependency
from flowrl.sweep.command import Values
from flowrl.sweep.spec import MetricConfig, Sweep
from flowrl.train.resume import differences
from flowrl.train.track import METRICS, read_metrics

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "optuna.journal"
_POINT = "point"  # the one parameter of a grid's trials


def open_study(sweep: Sweep, folder: Path) -> Study:
    """The study in the folder's journal, or a new one.

    Raises:
        ConfigError: the journal is of a sweep with other values.
        MissingDependency: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingDependency(
            "flowrl sweep --local needs optuna, which is not installed; run pip install optuna"
        ) from error
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    assert sweep.config.metric is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name=sweep.name,
        direction=sweep.config.metric.goal,
        load_if_exists=True,
    )
    # What may change between two calls is left out: how many runs, and words.
    plain = sweep.config.model_dump(mode="json", exclude={"description", "run_cap", "entity"})
    now = json.loads(json.dumps(plain))
    before = study.user_attrs.get("sweep")
    if before is None:
        study.set_user_attr("sweep", now)
    elif changed := [f"  {key}: {a} there, {b} now" for key, a, b in differences(before, now, "")]:
        lines = "\n".join(changed)
        raise ConfigError(
            f"{folder} holds another sweep of the name {sweep.name}:\n{lines}\n"
            "set these back, choose another --output, or delete that folder"
        )
    return study


def ask(sweep: Sweep, study: Study) -> Trial:
    """Optuna's next trial: the grid's next point, a random one, or TPE's proposal.

    A sampler is made for each trial, with a seed of the sweep's name and the trial's number: a
    random sweep that was interrupted draws what it would have drawn.
    """
    from optuna.distributions import CategoricalDistribution
    from optuna.samplers import RandomSampler, TPESampler

    number = len(study.trials)
    if sweep.config.method == "grid":
        if not num_queued(study):  # one is, where a process was killed between these two lines
            study.enqueue_trial({_POINT: number})
        return study.ask({_POINT: CategoricalDistribution(range(len(sweep.grid)))})
    seed = derive_seed("sweep", sweep.name, number) % 2**32
    is_random = sweep.config.method == "random"
    study.sampler = RandomSampler(seed=seed) if is_random else TPESampler(seed=seed)
    return study.ask({each.name: each.distribution() for each in sweep.dimensions})


def num_queued(study: Study) -> int:
    """Trials whose values are fixed and that were not asked for yet."""
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def trial_values(sweep: Sweep, trial: Trial | FrozenTrial) -> Values:
    """The values of a trial, with the constants."""
    if sweep.config.method == "grid":
        point: int = trial.params[_POINT]
        return sweep.grid[point]
    drawn: dict[tuple[str, ...], Any] = {
        each.path: each.value(trial.params[each.name]) for each in sweep.dimensions
    }
    return {**sweep.constants, **drawn}


def trial_name(number: int) -> str:
    """A run's name, and that of its folder."""
    return f"trial_{number:04d}"


def read_history(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every finite value of a metric that a run has logged so far, in order."""
    file = folder / METRICS
    if not file.is_file():
        return []
    rows = read_metrics(file)
    return [(int(row["step"]), float(row[metric])) for row in rows if row.get(metric) is not None]


def best_of(history: Sequence[tuple[int, float]], metric: MetricConfig) -> tuple[int, float]:
    """(step, value) of the best value, the first of equals."""
    sign = 1.0 if metric.goal == "minimize" else -1.0
    return min(history, key=lambda each: sign * each[1])
