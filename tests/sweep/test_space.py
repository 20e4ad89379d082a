"""W&B's distributions: their quantiles, worked out by hand, and what optuna draws from.

Kills, among others: a logarithm taken twice; a quantised value off its lattice; an upper end that
is left out; values that are drawn as often as others in spite of their probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from flowrl.errors import ConfigError
from flowrl.sweep.space import KEYS, Dimension, read_parameters

optuna = pytest.importorskip("optuna")


def dimension(**keys: Any) -> Dimension:
    (found,) = read_parameters({"optim.lr": keys}, "s.yaml")
    return found


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"value": None}, "constant"),
        ({"values": [1]}, "categorical"),
        ({"values": [1, 2], "probabilities": [0.5, 0.5]}, "categorical_w_probabilities"),
        ({"min": 1, "max": 3}, "int_uniform"),
        ({"min": 1, "max": 3.0}, "uniform"),
    ],
)
def test_a_distribution_that_is_not_named_is_inferred_as_w_and_b_does(
    keys: dict[str, Any], kind: str
) -> None:
    assert dimension(**keys).kind == kind


RANGE = {"min": 1.0, "max": 4.0}


@pytest.mark.parametrize(
    ("keys", "low", "high"),
    [
        ({"distribution": "uniform", **RANGE}, 1.0, 4.0),
        ({"distribution": "log_uniform_values", **RANGE}, 1.0, 4.0),
        ({"distribution": "log_uniform", **RANGE}, math.e, math.e**4),
        # log(1 / x) lies between min and max.
        ({"distribution": "inv_log_uniform", **RANGE}, math.exp(-4), math.exp(-1)),
        ({"distribution": "inv_log_uniform_values", **RANGE}, 1.0, 4.0),
        # round(1 / 3) * 3 = 0 and round(4 / 3) * 3 = 3: as W&B has it, also below min.
        ({"distribution": "q_uniform", "q": 3, **RANGE}, 0, 3),
        ({"distribution": "q_log_uniform_values", "q": 2.5, **RANGE}, 0.0, 5.0),
        ({"distribution": "int_uniform", "min": 2, "max": 5}, 2, 5),
    ],
)
def test_the_ends_of_a_range_are_w_and_b_s(keys: dict[str, Any], low: float, high: float) -> None:
    ends = dimension(**keys).extremes()
    assert ends == pytest.approx([low, high])
    assert {type(end) for end in ends} == {type(low)}  # an int q gives whole numbers


@pytest.mark.parametrize(
    ("keys", "median", "above"),
    [
        # One standard deviation above the median is the quantile 0.8413447.
        ({"distribution": "normal", "mu": 2.0, "sigma": 0.5}, 2.0, 2.5),
        ({"distribution": "log_normal", "mu": 1.0, "sigma": 2.0}, math.e, math.e**3),
        ({"distribution": "q_normal", "mu": 2.2, "sigma": 1.0, "q": 1}, 2, 3),
        # Beta(1, 1) is uniform, Beta(2, 1) has the distribution function x^2.
        ({"distribution": "beta"}, 0.5, 0.8413447),
        ({"distribution": "beta", "a": 2, "b": 1}, 0.5**0.5, 0.8413447**0.5),
        ({"distribution": "q_beta", "q": 0.25}, 0.5, 0.75),
    ],
)
def test_a_quantile_becomes_its_value(keys: dict[str, Any], median: float, above: float) -> None:
    found = dimension(**keys)
    assert found.value(0.5) == pytest.approx(median)
    assert found.value(0.8413447) == pytest.approx(above, rel=1e-5)


def test_probabilities_are_kept() -> None:
    found = dimension(values=["a", "b", "c"], probabilities=[0.2, 0.0, 0.8])
    assert [found.value(u) for u in (0.0, 0.19, 0.2, 0.5, 1.0)] == ["a", "a", "c", "c", "c"]


def test_optuna_draws_what_the_file_says() -> None:
    parameters = read_parameters(
        {
            "a": {"values": [[1], {"x": None}, "t"]},
            "b": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
            "c": {"distribution": "q_uniform", "min": 4, "max": 16, "q": 4},
            "d": {"min": 0, "max": 2},
        },
        "s.yaml",
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: dict[str, list[Any]] = {each.name: [] for each in parameters}
    for _ in range(400):
        trial = study.ask({each.name: each.distribution() for each in parameters})
        for each in parameters:
            drawn[each.name].append(each.value(trial.params[each.name]))
    a, b, c, d = (drawn[name] for name in "abcd")
    assert [x for i, x in enumerate(a) if x not in a[:i]].__len__() == 3
    # The median of a log-uniform number is the geometric mean of its ends.
    assert 0.4 < sum(x < 1e-2 for x in b) / len(b) < 0.6 and min(b) >= 1e-4 and max(b) <= 1
    assert set(c) == {4, 8, 12, 16} and all(isinstance(x, int) for x in c)
    assert c.count(4) < c.count(8)  # the ends have half a step only
    assert set(d) == {0, 1, 2}


def test_a_grid_has_w_and_b_s_points() -> None:
    assert dimension(values=["b", "a"]).grid() == ["b", "a"]
    assert dimension(min=2, max=4).grid() == [2, 3, 4]
    # As W&B has it, a quantised range leaves its upper end out.
    assert dimension(distribution="q_uniform", min=4, max=16, q=4).grid() == [4, 8, 12]
    assert dimension(distribution="q_uniform", min=0.0, max=1.1, q=0.5).grid() == [0.0, 0.5, 1.0]
    with pytest.raises(ConfigError, match="a grid has no beta"):
        dimension(distribution="beta").grid()


@pytest.mark.parametrize("kind", [kind for kind in KEYS if kind != "constant"])
def test_every_distribution_has_extremes_and_something_to_draw_from(kind: str) -> None:
    known = {"min": 1, "max": 3, "q": 1, "mu": 0.5, "sigma": 0.5, "a": 2, "b": 3,
             "values": [1, 2], "probabilities": [0.5, 0.5]}  # fmt: skip
    needed, optional = KEYS[kind]
    found = dimension(distribution=kind, **{key: known[key] for key in (*needed, *optional)})
    low, high = found.extremes()
    assert low < high and found.distribution() is not None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "has no logarithm"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 1}, "int_uniform needs whole numbers"),
        ({"values": [1, 2], "probabilities": [1.0]}, "2 values have 1 probabilities"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "with the sum 1.1"),
        ({"values": [1, 2], "probabilities": [1.5, -0.5]}, "a probability is below 0"),
        ({"values": []}, "values must be"),
        ({"distribution": "normal", "sigma": 0}, "sigma must be"),
        ({"distribution": "normal", "min": 0}, "normal needs nothing, and may have mu, sigma"),
        ({"value": 1, "values": [1]}, "constant needs value"),
        ({"parameters": {"x": {"value": 1}}, "value": 1}, "W&B takes one or other"),
        ({"parameters": {"x": {"vale": 1}}}, "parameters.optim.lr.x: vale is not a key"),
    ],
)
def test_what_means_nothing_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dimension(**keys)
    assert words in str(caught.value), str(caught.value)
    assert str(caught.value).startswith("s.yaml: parameters.optim.lr")


def test_a_name_that_w_and_b_does_not_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rewards\[0\].weight: .* such as rewards.0.weight"):
        read_parameters({"rewards[0].weight": {"value": 1}}, "s.yaml")
