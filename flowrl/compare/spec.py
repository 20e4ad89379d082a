"""A comparison: its strict YAML file, and the runs that follow from it.

Every run is a plain `flowrl train` with overrides; what makes the runs comparable (seed, budget,
one row of metrics per step, equal held-out evaluation) is set here or refused. Reading order: the
records, `load_comparison`, `_plan`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowrl.config import Config, load_config
from flowrl.errors import ConfigError, closest
from flowrl.strict import Record, validate
from flowrl.yamlio import files_beside, read_yaml, show

Kind = Literal["minutes", "steps", "evaluations"]

# With a budget of time or evaluations the number of steps must not end a run first.
UNLIMITED_STEPS = 1_000_000
_LIMITS = {
    "minutes": "run.max_minutes", "steps": "run.steps", "evaluations": "run.max_evaluations"
}  # fmt: skip
# Held-out scores compare only where these are equal; the sampler's settings may be a method's own.
_EQUAL = ("data", "seed", "samples_per_prompt", "max_prompts")

Args = dict[str, Any]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class BudgetConfig(Record):
    """What every run may spend; exactly one of the three."""

    minutes: float | None = Field(default=None, gt=0, description="training time, minutes")
    steps: int | None = Field(default=None, ge=1, description="training steps")
    evaluations: int | None = Field(
        default=None, ge=1, description="network evaluations of rollout and training together"
    )

    @model_validator(mode="after")
    def _is_one(self) -> BudgetConfig:
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        if len(given) != 1:
            listed = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
            raise ValueError(
                f"budget takes exactly one of minutes, steps and evaluations, got {listed}; "
                "keep the one that is to be equal"
            )
        return self

    @property
    def kind(self) -> Kind:
        """Which of the three is given."""
        return next(kind for kind in ("minutes", "steps", "evaluations") if self._value(kind))

    @property
    def amount(self) -> float:
        """How much of it, in its unit."""
        value = self._value(self.kind)
        assert value is not None
        return value

    def _value(self, kind: str) -> float | None:
        return {"minutes": self.minutes, "steps": self.steps, "evaluations": self.evaluations}[kind]


class EntryConfig(Record):
    """One of the things compared."""

    name: PlainName = Field(description="name in tables and folders")
    config: str = Field(min_length=1, description="config file, relative to the comparison's file")
    overrides: Args = Field(default_factory=dict, description="dotted keys set for this entry")
    claim: str | None = Field(
        default=None, min_length=1, description="what its paper claims, as a sentence"
    )


class CompareConfig(Record):
    """A comparison's file."""

    name: PlainName = Field(description="name of the comparison, and of its folder below runs/")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="values of run.seed, one run each per entry"
    )
    budget: BudgetConfig = Field(description="what every run may spend")
    overrides: Args = Field(default_factory=dict, description="dotted keys set for every run")
    runs: tuple[EntryConfig, ...] = Field(min_length=1, description="what is compared")
    baseline: str | None = Field(
        default=None, description="entry against which ratios are stated; null = the first"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        names = [entry.name for entry in self.runs]
        for what, values in (("seeds", self.seeds), ("runs", names)):
            for value in values:
                if list(values).count(value) > 1:
                    raise ValueError(
                        f"{what}: {value!r} is there {list(values).count(value)} times, so these "
                        "runs would share a folder; keep one or rename it"
                    )
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(
                f"baseline={self.baseline} is not a run; {closest(self.baseline, names)}"
            )
        return self


@dataclass(frozen=True)
class Plan:
    """One run of a comparison.

    Attributes:
        entry: the entry's name.
        seed: of the run.
        file: its config file.
        overrides: texts for `flowrl train`, all but run.resume.
        config: what both resolve to.
        folder: the run's.
    """

    entry: str
    seed: int
    file: Path
    overrides: tuple[str, ...]
    config: Config
    folder: Path

    @property
    def title(self) -> str:
        """As a line names it."""
        return f"{self.entry}, seed {self.seed}"


@dataclass(frozen=True)
class Comparison:
    """A comparison that can be run.

    Attributes:
        file: the YAML file.
        folder: where runs and page are written.
        config: what the file says, with the seeds asked for.
        plans: of all runs; the first seed of every entry first, so that an early stop is fair.
    """

    file: Path
    folder: Path
    config: CompareConfig
    plans: tuple[Plan, ...]

    @property
    def baseline(self) -> str:
        """The entry against which ratios are stated."""
        return self.config.baseline or self.config.runs[0].name


def load_comparison(
    file: Path, *, out: Path | None = None, seeds: Sequence[int] | None = None
) -> Comparison:
    """The comparison in a YAML file, every run's configuration checked.

    Args:
        file: the YAML file.
        out: where to write; None = runs/<name>.
        seeds: instead of the file's.

    Raises:
        ConfigError: for whatever is not understood or does not compare; names the file and run.
    """
    data = read_yaml(file)
    if seeds is not None:
        data = data | {"seeds": list(seeds)}
    config = validate(CompareConfig, data, where=str(file), sources={}, has_overrides=False)
    folder = Path("runs") / config.name if out is None else out
    plans = tuple(
        _plan(file, folder, config, entry, seed) for seed in config.seeds for entry in config.runs
    )
    _require_equal_evaluation(file, plans)
    return Comparison(file, folder, config, plans)


def _plan(file: Path, folder: Path, config: CompareConfig, entry: EntryConfig, seed: int) -> Plan:
    where = f"{file}: run {entry.name}"
    path = file.parent / entry.config
    if not path.is_file():
        raise ConfigError(
            f"{where}: config: {entry.config}: no such file relative to this one; "
            f"{files_beside(path)}"
        )
    name = f"{entry.name}_seed{seed}"
    own = _own_settings(config.budget) | {
        "run.seed": seed, "run.name": name, "run.output_dir": str(folder), "track.log_every": 1
    }  # fmt: skip
    free: Args = {}
    for source, given in ((str(file), config.overrides), (where, entry.overrides)):
        for key, value in given.items():
            if key in own or key in ("run", "track", "run.resume"):
                raise ConfigError(
                    f"{source}: overrides.{key}={show(value)} is set by the comparison itself; "
                    "remove it (the budget decides how long runs are)"
                )
        free |= given
    overrides = tuple(f"{key}={_as_yaml(value)}" for key, value in (free | own).items())
    try:
        loaded = load_config(path, overrides)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if config.budget.kind != "steps" and loaded.optim.schedule != "constant":
        raise ConfigError(
            f"{where}: optim.schedule={loaded.optim.schedule} needs the number of steps, which a "
            f"budget of {config.budget.kind} does not fix; set budget: {{steps: ...}} or "
            "optim.schedule=constant"
        )
    return Plan(entry.name, seed, path, overrides, loaded, folder / name)


def _own_settings(budget: BudgetConfig) -> Args:
    """The keys of all limits: the budget's set, the others off."""
    return {
        key: budget.amount if kind == budget.kind else UNLIMITED_STEPS if kind == "steps" else None
        for kind, key in _LIMITS.items()
    }


def _as_yaml(value: Any) -> str:
    """A value as the text of an override."""
    return json.dumps(value, ensure_ascii=False)


def _require_equal_evaluation(file: Path, plans: Sequence[Plan]) -> None:
    """Raise unless all runs are scored by the same rewards on the same prompts and noise."""
    first = plans[0]
    for plan in plans[1:]:
        ours, theirs = plan.config.eval, first.config.eval
        pairs = [(f"eval.{key}", getattr(ours, key), getattr(theirs, key)) for key in _EQUAL]
        pairs.append(("eval.rewards", _measured(plan.config), _measured(first.config)))
        for key, here, there in pairs:
            if here != there:
                raise ConfigError(
                    f"{file}: {key} is {here} for {plan.entry} and {there} for {first.entry}, so "
                    f"their held-out scores do not compare; set {key} in the file's overrides"
                )


def _measured(config: Config) -> list[str]:
    rewards = config.rewards if config.eval.rewards is None else config.eval.rewards
    return [f"{reward.name}{reward.args or ''}" for reward in rewards]
