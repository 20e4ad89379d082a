"""W&B's parameter distributions: what they mean here, for the checks and for optuna.

optuna draws a raw value, a float, an int or the index of a value; `Dimension.value` turns it into
what W&B would give. So quantised, normal and beta distributions, which optuna has not, are exact
too. Reading order: `KEYS`, `ParameterConfig`, `Dimension`.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from flowrl.errors import ConfigError
from flowrl.strict import Record, validate
from flowrl.yamlio import show

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Number = int | float
Path = tuple[str, ...]

# W&B's name of a distribution -> the keys that it needs, and those that it may have.
_RANGE = ("min", "max")
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "constant": (("value",), ()),
    "categorical": (("values",), ()),
    "categorical_w_probabilities": (("values", "probabilities"), ()),
    "int_uniform": (_RANGE, ()),
    "uniform": (_RANGE, ()),
    "q_uniform": (_RANGE, ("q",)),
    "log_uniform": (_RANGE, ()),
    "log_uniform_values": (_RANGE, ()),
    "q_log_uniform": (_RANGE, ("q",)),
    "q_log_uniform_values": (_RANGE, ("q",)),
    "inv_log_uniform": (_RANGE, ()),
    "inv_log_uniform_values": (_RANGE, ()),
    "normal": ((), ("mu", "sigma")),
    "q_normal": ((), ("mu", "sigma", "q")),
    "log_normal": ((), ("mu", "sigma")),
    "q_log_normal": ((), ("mu", "sigma", "q")),
    "beta": ((), ("a", "b")),
    "q_beta": ((), ("a", "b", "q")),
}
_IN_A_GRID = ("constant", "categorical", "int_uniform", "q_uniform")
# Distributions that are drawn by their quantile, which stays this far from 0 and 1.
_TAIL = 1e-6
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


class ParameterConfig(Record):
    """One parameter of a sweep's file."""

    distribution: (
        Literal[
            "constant", "categorical", "categorical_w_probabilities", "int_uniform", "uniform",
            "q_uniform", "log_uniform", "log_uniform_values", "q_log_uniform",
            "q_log_uniform_values", "inv_log_uniform", "inv_log_uniform_values", "normal",
            "q_normal", "log_normal", "q_log_normal", "beta", "q_beta",
        ]
        | None
    ) = Field(default=None, description="null = by the keys that are given")  # fmt: skip
    value: Any = Field(default=None, description="the only value")
    values: tuple[Any, ...] | None = Field(
        default=None, min_length=1, description="values to choose from"
    )
    probabilities: tuple[float, ...] | None = Field(
        default=None, description="probability of each of the values"
    )
    min: Number | None = Field(default=None, description="lower end, or its logarithm")
    max: Number | None = Field(default=None, description="upper end, or its logarithm")
    q: Number = Field(default=1.0, gt=0, description="step of a quantised distribution")
    mu: Number = Field(default=0.0, description="mean, of log_normal that of the logarithm")
    sigma: Number = Field(default=1.0, gt=0, description="standard deviation, likewise")
    a: Number = Field(default=1.0, gt=0, description="first parameter of beta")
    b: Number = Field(default=1.0, gt=0, description="second parameter of beta")
    parameters: dict[str, Any] | None = Field(
        default=None, min_length=1, description="parameters below this one"
    )

    @property
    def kind(self) -> str:
        """The distribution, inferred as W&B does where it is not given; empty = it cannot be."""
        given = self.model_fields_set
        if self.distribution is not None:
            return self.distribution
        if "value" in given:
            return "constant"
        if "values" in given:
            return "categorical_w_probabilities" if "probabilities" in given else "categorical"
        if {"min", "max"} <= given:
            are_whole = isinstance(self.min, int) and isinstance(self.max, int)
            return "int_uniform" if are_whole else "uniform"
        return ""


@dataclass(frozen=True)
class Dimension:
    """One parameter with its place.

    Attributes:
        path: its name, or the names of the parameters that it lies below and its own.
        kind: W&B's distribution, a key of KEYS.
        spec: the numbers.
    """

    path: Path
    kind: str
    spec: ParameterConfig

    @property
    def name(self) -> str:
        """The config's dotted key."""
        return ".".join(self.path)

    @property
    def is_log(self) -> bool:
        """Whether an axis of its values is better logarithmic."""
        return "log" in self.kind

    def distribution(self) -> BaseDistribution:
        """What optuna draws raw values from."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "categorical":
            return CategoricalDistribution(range(len(self._values)))
        if self.kind == "int_uniform":
            low, high = self._range
            return IntDistribution(int(low), int(high))
        low, high, is_log = self._raw_range()
        return FloatDistribution(low, high, log=is_log)

    def value(self, raw: Any) -> Any:
        """What W&B would give: raw is an index of `values`, an int, a float or a quantile."""
        if self.kind == "categorical":
            return self._values[raw]
        if self.kind == "int_uniform":
            return int(raw)
        if self.kind == "categorical_w_probabilities":
            assert self.spec.probabilities is not None
            place = bisect_right(list(accumulate(self.spec.probabilities)), raw)
            return self._values[min(place, len(self._values) - 1)]
        value = self._transform(float(raw))
        if self.kind.startswith("q_"):
            steps = round(value / self.spec.q)
            return steps * self.spec.q
        return value

    def extremes(self) -> list[Any]:
        """All values, or the lowest and the highest that can be drawn: what a check looks at."""
        if self.kind in ("categorical", "categorical_w_probabilities"):
            return list(self._values)
        if self.kind == "int_uniform":
            return [int(each) for each in self._range]
        low, high, _ = self._raw_range()
        return [self.value(low), self.value(high)]

    def grid(self) -> list[Any]:
        """All values in the order of W&B's grid; q_uniform leaves its upper end out, as W&B does.

        Raises:
            ConfigError: the distribution has no grid.
        """
        if self.kind == "categorical":
            return list(self._values)
        low, high = self._range if self.kind in _IN_A_GRID else (0, 0)
        if self.kind == "int_uniform":
            return list(range(int(low), int(high) + 1))
        if self.kind == "q_uniform":
            return [low + i * self.spec.q for i in range(math.ceil((high - low) / self.spec.q))]
        raise ConfigError(
            f"parameters.{self.name}: a grid has no {self.kind}; give values, or method: random"
        )

    @property
    def _values(self) -> tuple[Any, ...]:
        assert self.spec.values is not None
        return self.spec.values

    @property
    def _range(self) -> tuple[Number, Number]:
        assert self.spec.min is not None and self.spec.max is not None
        return self.spec.min, self.spec.max

    def _raw_range(self) -> tuple[float, float, bool]:
        """(lowest raw value, highest, whether raw values are uniform in their logarithm)."""
        base = self.kind.removeprefix("q_")
        if base == "categorical_w_probabilities":
            return 0.0, 1.0, False
        if base in ("normal", "log_normal", "beta"):
            return _TAIL, 1 - _TAIL, False
        low, high = self._range
        if base == "uniform":
            return float(low), float(high), False
        if base == "log_uniform":
            return math.exp(low), math.exp(high), True
        if base == "inv_log_uniform":  # log(1 / x) lies between min and max
            return math.exp(-high), math.exp(-low), True
        return float(low), float(high), True

    def _transform(self, raw: float) -> float:
        """Quantiles become values; other raw values are values already."""
        base, spec = self.kind.removeprefix("q_"), self.spec
        if base == "beta":
            from scipy.stats import beta  # type: ignore[import-untyped]

            return float(beta.ppf(raw, spec.a, spec.b))
        if base not in ("normal", "log_normal"):
            return raw
        value = NormalDist(spec.mu, spec.sigma).inv_cdf(raw)
        return math.exp(value) if base == "log_normal" else value


def read_parameters(data: Mapping[str, Any], where: str, above: Path = ()) -> list[Dimension]:
    """The parameters of a sweep's file in the order of their names, as W&B sorts them.

    Args:
        data: the section `parameters`.
        where: names the file in errors.
        above: names of the parameters that these lie below.

    Raises:
        ConfigError: a parameter that W&B would not take or that means nothing; names file and key.
    """
    found: list[Dimension] = []
    for name, plain in sorted(data.items()):
        path = (*above, name)
        place = f"{where}: parameters.{'.'.join(path)}"
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{place}: W&B takes names of letters, digits, '_', '.' and '-' that begin with a "
                "letter or '_'; write a dotted key such as rewards.0.weight"
            )
        if not isinstance(plain, dict):
            raise ConfigError(
                f"{place} is {show(plain)}; write {{value: ...}}, {{values: [...]}} or "
                "{min: ..., max: ...}"
            )
        spec = validate(ParameterConfig, plain, where=place, sources={}, has_overrides=False)
        if spec.parameters is None:
            found.append(_dimension(path, spec, place))
            continue
        if len(plain) > 1:
            more = ", ".join(key for key in plain if key != "parameters")
            raise ConfigError(f"{place}: beside parameters stands {more}; W&B takes one or other")
        found += read_parameters(spec.parameters, where, path)
    return found


def _dimension(path: Path, spec: ParameterConfig, place: str) -> Dimension:
    """A parameter whose keys fit its distribution."""
    kind = spec.kind
    if not kind:
        raise ConfigError(f"{place}: give value, values, min and max, or a distribution")
    needed, optional = KEYS[kind]
    given = spec.model_fields_set - {"distribution"}
    missing = [key for key in needed if key not in given]
    extra = sorted(given - {*needed, *optional})
    if missing or extra:
        takes = " and ".join(needed) or "nothing"
        more = f", and may have {', '.join(optional)}" if optional else ""
        found = ", ".join(sorted(given)) or "nothing"
        raise ConfigError(
            f"{place}: {kind} needs {takes}{more}; {found} is given; correct the keys"
        )
    _check_numbers(spec, kind, place)
    return Dimension(path, kind, spec)


def _check_numbers(spec: ParameterConfig, kind: str, place: str) -> None:
    if spec.min is not None and spec.max is not None:
        if not spec.min < spec.max:
            raise ConfigError(f"{place}: min {spec.min} is not below max {spec.max}; swap them")
        if kind.endswith("log_uniform_values") and spec.min <= 0:
            raise ConfigError(f"{place}: min {spec.min} has no logarithm; use a number above 0")
        if kind == "int_uniform" and not all(isinstance(x, int) for x in (spec.min, spec.max)):
            raise ConfigError(f"{place}: int_uniform needs whole numbers; use uniform or q_uniform")
    if spec.probabilities is not None and spec.values is not None:
        total = math.fsum(spec.probabilities)
        if len(spec.probabilities) != len(spec.values) or abs(total - 1) > 1e-6:
            raise ConfigError(
                f"{place}: {len(spec.values)} values have {len(spec.probabilities)} probabilities "
                f"with the sum {total:g}; give one per value, with the sum 1"
            )
        if min(spec.probabilities) < 0:
            raise ConfigError(f"{place}: a probability is below 0; give shares of 1")
