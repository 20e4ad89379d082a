"""A sweep's file in W&B's format, read strictly: what would fail in a run is refused before it.

A sweep that W&B takes may still be wrong: an unknown key is ignored there, and a mistyped parameter
fails in every run. Here each value is laid over the config as an agent would do it. Reading order:
the records, `load_sweep`, `Sweep.configs`, `check_metric`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from flowrl.config import Config, load_config
from flowrl.errors import ConfigError, closest
from flowrl.strict import Record, validate
from flowrl.sweep.command import TrainCommand, Values, check_printed, parse_command
from flowrl.sweep.hyperband import Goal, bands_from_first, bands_to_last
from flowrl.sweep.space import Dimension, read_parameters
from flowrl.train.keys import match_key
from flowrl.yamlio import read_yaml, show

# Of a larger grid, only the values are tried one by one.
_MAX_TRIED = 1000


class MetricConfig(Record):
    """What the sweep is for."""

    name: str = Field(min_length=1, description="key of docs/metrics.md")
    goal: Goal = Field(default="minimize", description="W&B's default is minimize")
    target: float | None = Field(
        default=None, description="no run starts after one has reached this"
    )
    impute: Literal["latest", "best", "worst"] = Field(
        default="worst", description="what W&B's bayes takes for a failed run; not used here"
    )
    impute_while_running: Literal["latest", "best", "worst", "false"] = Field(
        default="false", description="the same of a run that is going on; not used here"
    )


class StoppingConfig(Record):
    """Hyperband's early termination; `min_iter`, or `max_iter` and `s`."""

    type: Literal["hyperband"] = Field(description="the only one there is")
    min_iter: int | None = Field(default=None, ge=1, description="values of the metric, first band")
    max_iter: int | None = Field(default=None, ge=1, description="values in a whole run")
    s: float | None = Field(default=None, ge=1, description="number of bands below max_iter")
    eta: float = Field(default=3.0, gt=1, description="one run in eta goes on beyond a band")
    strict: bool = Field(
        default=True, description="judge by the value at the band, not by the best so far"
    )

    @model_validator(mode="after")
    def _has_bands(self) -> StoppingConfig:
        pair = (self.max_iter is None, self.s is None)
        if self.min_iter is None and any(pair):
            raise ValueError("early_terminate needs min_iter, or max_iter and s; give one of them")
        if self.min_iter is not None and not all(pair):
            raise ValueError("early_terminate takes min_iter, or max_iter and s, not both")
        if not self.bands:
            raise ValueError(
                f"early_terminate: max_iter={self.max_iter} divided by eta={self.eta:g} is below "
                "1, so no run would end early; raise max_iter"
            )
        return self

    @property
    def bands(self) -> list[int]:
        """Numbers of values at which runs are compared, ascending."""
        if self.min_iter is not None:
            return bands_from_first(self.min_iter, self.eta)
        assert self.max_iter is not None and self.s is not None
        return bands_to_last(self.max_iter, self.s, self.eta)


class SweepConfig(Record):
    """A sweep's file, as far as flowrl and `wandb agent` both understand it."""

    name: str | None = Field(default=None, min_length=1, description="the sweep's name")
    description: str | None = Field(default=None, description="what it is about")
    project: str | None = Field(default=None, min_length=1, description="W&B's project")
    entity: str | None = Field(default=None, min_length=1, description="W&B's team or user")
    program: str = Field(min_length=1, description="W&B wants one: flowrl")
    command: tuple[str, ...] = Field(min_length=1, description="words of the line an agent runs")
    method: Literal["grid", "random", "bayes"] = Field(description="how values are chosen")
    metric: MetricConfig | None = Field(default=None, description="what the sweep is for")
    parameters: dict[str, Any] = Field(min_length=1, description="what is varied")
    early_terminate: StoppingConfig | None = Field(default=None, description="which runs end early")
    run_cap: int | None = Field(default=None, ge=1, description="runs in all")

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        needy = [f"method: {self.method}"] if self.method == "bayes" else []
        needy += ["early_terminate"] if self.early_terminate is not None else []
        if self.metric is None and needy:
            raise ValueError(f"{needy[0]} needs metric; give its name and goal")
        return self


@dataclass(frozen=True)
class Sweep:
    """A sweep whose file means what it says.

    Attributes:
        file: the YAML file.
        config: what it holds.
        command: of a run.
        dimensions: the parameters that vary, by name.
        constants: those that do not, and their values.
    """

    file: Path
    config: SweepConfig
    command: TrainCommand
    dimensions: tuple[Dimension, ...]
    constants: Mapping[tuple[str, ...], Any]

    @property
    def name(self) -> str:
        """The file's name for it, or the file's own."""
        return self.config.name or self.file.stem

    @cached_property
    def grid(self) -> list[Values]:
        """The values of every run of a grid, in W&B's order.

        Raises:
            ConfigError: a distribution has no grid.
        """
        try:
            axes = [dimension.grid() for dimension in self.dimensions]
        except ConfigError as error:
            raise ConfigError(f"{self.file}: {error}") from error
        paths = [dimension.path for dimension in self.dimensions]
        return [
            {**self.constants, **dict(zip(paths, values, strict=True))}
            for values in itertools.product(*axes)
        ]

    def corners(self) -> Iterator[Values]:
        """Values for a check: each parameter at each of its extremes, the others at their first."""
        first = {dimension.path: dimension.extremes()[0] for dimension in self.dimensions}
        yield {**self.constants, **first}
        for dimension in self.dimensions:
            for value in dimension.extremes()[1:]:
                yield {**self.constants, **first, dimension.path: value}

    def config_of(self, values: Values, *, name: str, folder: Path) -> Config:
        """The configuration of a run that writes to `folder/name`.

        Raises:
            ConfigError: names the sweep's file, and the parameter as the override that it becomes.
        """
        arguments = self.command.local_arguments(values, name=name, folder=folder)
        try:
            return load_config(self.command.config, arguments)
        except ConfigError as error:
            lines = "\n".join(f"{self.file}: {line}" for line in str(error).splitlines())
            raise ConfigError(lines) from error

    def configs(self) -> list[Config]:
        """The configurations at the corners of the space; those of a whole grid are tried too.

        Raises:
            ConfigError: of the first that does not load.
        """
        if self.config.method == "grid" and len(self.grid) <= _MAX_TRIED:
            for values in self.grid:
                self.config_of(values, name="check", folder=Path("runs"))
        return [
            self.config_of(values, name="check", folder=Path("runs")) for values in self.corners()
        ]


def load_sweep(file: Path) -> Sweep:
    """The sweep in a YAML file; `Sweep.configs` tries its values.

    Raises:
        ConfigError: for whatever is not understood, or would mean something else to W&B; names the
            file and the key.
    """
    data = read_yaml(file)
    _require_same(yaml.safe_load(file.read_text(encoding="utf-8")), data, file, "")
    config = validate(SweepConfig, data, where=str(file), sources={}, has_overrides=False)
    command = parse_command(config.command, config.program, str(file))
    parameters = read_parameters(config.parameters, str(file))
    constants = {each.path: each.spec.value for each in parameters if each.kind == "constant"}
    varied = tuple(each for each in parameters if each.kind != "constant")
    if not varied:
        raise ConfigError(
            f"{file}: parameters: none of {', '.join(each.name for each in parameters)} varies; "
            "give values, or min and max, to one of them"
        )
    for each in parameters:
        values = [each.spec.value] if each.kind == "constant" else each.extremes()
        check_printed(each, values, command.macro, str(file))
    return Sweep(file, config, command, varied, constants)


def _require_same(theirs: Any, ours: Any, file: Path, key: str) -> None:
    """Raise where W&B's reader, of YAML 1.1, takes a value for something else than ours."""
    if isinstance(theirs, dict) and isinstance(ours, dict) and len(theirs) == len(ours):
        for (name, inner), (own_name, own) in zip(theirs.items(), ours.items(), strict=True):
            _require_same(name, own_name, file, f"{key}.{own_name}" if key else own_name)
            _require_same(inner, own, file, f"{key}.{own_name}" if key else own_name)
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, (inner, own) in enumerate(zip(theirs, ours, strict=True)):
            _require_same(inner, own, file, f"{key}.{index}")
    elif type(theirs) is not type(ours) or theirs != ours:
        hint = "write 1.0e-4 for 1e-4" if isinstance(ours, float) else "put texts in quotes"
        raise ConfigError(
            f"{file}: {key}: W&B reads YAML 1.1 and takes this for {show(theirs)}, not for "
            f"{show(ours)}; {hint}"
        )


def check_metric(
    sweep: Sweep, config: Config, *, measured: Collection[str], tags: Collection[str]
) -> None:
    """Refuses a metric that the runs never log.

    Args:
        sweep: whose metric it is.
        config: of a run.
        measured: labels of the rewards of the held-out evaluation.
        tags: skills of the held-out prompts.

    Raises:
        ConfigError: it is no metric, or not one of these runs; or early termination would see it
            at the run's ends only.
    """
    if sweep.config.metric is None:
        return
    name = sweep.config.metric.name
    place = f"{sweep.file}: metric.name={name}"
    try:
        pattern = match_key(name)
    except ValueError as error:
        raise ConfigError(f"{place}: {str(error).partition('. Add it')[0]}") from error
    trained = [reward.label for reward in config.rewards]
    named = {
        "eval/<name>/mean": (measured, "a reward that is measured"),
        "eval/skill/<tag>": (tags, "a skill of the held-out prompts"),
        "reward/<name>/mean": (trained, "a reward that is trained on"),
        "reward/<name>/std": (trained, "a reward that is trained on"),
    }
    if pattern in named:
        known, what = named[pattern]
        given = name.split("/")[2 if pattern == "eval/skill/<tag>" else 1]
        if given not in known:
            raise ConfigError(f"{place}: {given} is not {what}; {closest(given, known)}")
    if name.startswith("samples/"):
        raise ConfigError(f"{place}: these are images; name a number, such as eval/score")
    if name == "eval/distance" and config.monitor.reward is None:
        raise ConfigError(f"{place}: it is logged where monitor.reward is set; set it in command")
    if sweep.config.early_terminate is not None:
        _check_stopping(sweep, config, name)


def _check_stopping(sweep: Sweep, config: Config, metric: str) -> None:
    """Raise when no run could reach a band before its end."""
    assert sweep.config.early_terminate is not None
    first = sweep.config.early_terminate.bands[0]
    place = f"{sweep.file}: early_terminate"
    if metric.startswith("eval/"):
        every = config.eval.every
        if not every:
            raise ConfigError(
                f"{place}: {metric} is logged at both ends of a run, because eval.every=0; set "
                "eval.every in command"
            )
        count = 1 + math.ceil(config.run.steps / every)
        how = f"eval.every={every}"
    else:
        count, how = config.run.steps // config.track.log_every, "track.log_every"
    if first >= count:
        raise ConfigError(
            f"{place}: the first band is at {first} values of {metric}, but a run logs {count} "
            f"(run.steps={config.run.steps}, {how}); lower min_iter, or max_iter"
        )
