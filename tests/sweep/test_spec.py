"""A sweep's file: what it becomes, and how it is refused before the first run.

Kills, among others: a mistyped parameter that only a run would notice; a number that W&B's YAML
reads as a text; an agent's run that writes over another's; a metric that no run logs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.commands.sweep import check
from flowrl.errors import ConfigError
from flowrl.sweep.spec import Sweep, load_sweep

ROOT = Path(__file__).resolve().parents[2]
FILE = """\
program: flowrl
method: grid
metric: {name: eval/score, goal: maximize}
parameters:
  optim.lr: {values: [1.0e-3, 2.0e-3]}
  method.args.window: {min: 1, max: 3}
  run.seed: {value: 7}
command: [flowrl, train, rl.yaml, "run.name=${oc.env:WANDB_RUN_ID}", eval.every=10,
          "${args_no_hyphens}"]
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rl.yaml").write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\n")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sweep.yaml"
    path.write_text(FILE)
    return path


def loaded(file: Path) -> Sweep:
    """All that `flowrl sweep FILE` checks."""
    sweep = load_sweep(file)
    for config in sweep.configs():
        check(sweep, config)
    return sweep


def refused(file: Path, *changes: tuple[str, str]) -> str:
    text = FILE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        loaded(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_a_grid_is_every_combination_with_the_constants(file: Path) -> None:
    sweep = loaded(file)
    assert sweep.name == "sweep"
    runs = [(v[("method.args.window",)], v[("optim.lr",)]) for v in sweep.grid]
    assert runs == [(w, lr) for w in (1, 2, 3) for lr in (1e-3, 2e-3)]
    config = sweep.config_of(sweep.grid[3], name="trial", folder=Path("out/a b"))
    assert (config.method.args["window"], config.optim.lr, config.run.seed) == (2, 2e-3, 7)
    assert (config.run.output_dir, config.run.name, config.eval.every) == ("out/a b", "trial", 10)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("optim.lr:", "optim.lrr:", ["optim.lrr is not a key", "did you mean 'lr'?"]),
        ("args.window:", "args.windw:", ["windw is not an argument of mix_grpo",
                                         "did you mean 'window'?"]),
        ("optim.lr:", "method.name:", ["method.name must be str"]),
        ("{values: [1.0e-3, 2.0e-3]}", "{values: [1.0e-3, fast]}", ["optim.lr must be", "'fast'"]),
        ("{values: [1.0e-3, 2.0e-3]}", "{values: [1.0e-3, -2.0]}", ["optim.lr must be float > 0"]),
        ("{min: 1, max: 3}", "{min: 1, max: 30}", ["method.args", "window"]),
        ("{min: 1, max: 3}", "{min: 3, max: 1}", ["parameters.method.args.window: min 3 is not "
                                                  "below max 1"]),
        ("{min: 1, max: 3}", "{min: 1, mx: 3}", ["parameters.method.args.window: mx is not a key",
                                                 "did you mean 'max'?"]),
        ("{min: 1, max: 3}", "{min: 1}", ["give value, values, min and max, or a distribution"]),
        ("{min: 1, max: 3}", "[1, 2]", ["parameters.method.args.window is [1, 2] (list)"]),
        ("{min: 1, max: 3}", "{min: 1.0, max: 3}", ["a grid has no uniform"]),
        ("{min: 1, max: 3}", "{distribution: nrmal}", ["distribution must be", "'normal'?"]),
        ("{min: 1, max: 3}", "{distribution: categorical, min: 1, max: 3}",
         ["categorical needs values; max, min is given"]),
        ("method: grid", "methd: grid", ["methd is not a key", "did you mean 'method'?"]),
        ("program: flowrl\n", "", ["program is missing"]),
        ("method: grid", "method: random\nearly_terminate: {type: hyperband}",
         ["early_terminate needs min_iter, or max_iter and s"]),
        ("method: grid", "method: grid\nearly_terminate: {type: hyperband, max_iter: 2, s: 1}",
         ["max_iter=2 divided by eta=3 is below 1"]),
        ("method: grid", "method: grid\nearly_terminate: {type: hyperband, min_iter: 21}",
         ["the first band is at 21 values of eval/score, but a run logs 21 (run.steps=200"]),
        ("eval/score", "eval/scor", ["metric.name=eval/scor", "did you mean 'eval/score'?"]),
        ("eval/score", "eval/strict/mean", ["strict is not a reward that is measured",
                                            "did you mean 'shapes_strict'?"]),
        ("eval/score", "reward/shapes_gold/mean", ["not a reward that is trained on"]),
        ("eval/score", "eval/skill/colours", ["not a skill", "did you mean 'colors'?"]),
        ("eval/score", "eval/distance", ["monitor.reward"]),
        ("eval/score", "samples/eval", ["these are images"]),
        ("flowrl, train,", "python, train.py,", ["is not flowrl train"]),
        ("train, rl.yaml", "train, lr.yaml", ["lr.yaml: no such file", "did you mean 'rl.yaml'?"]),
        ("${args_no_hyphens}", "${args}", ["${args} is not of use here", "${args_no_hyphens}"]),
        ('          "${args_no_hyphens}"', "", ["0 of ${args_no_hyphens} and ${args_json}"]),
        ("${oc.env:WANDB_RUN_ID}", "one", ["all runs of an agent would write to one folder"]),
        ("run.seed:", "run.name:", ["parameters.run.name is set by the sweep itself"]),
        ("eval.every=10", "optim.lr=1", ["optim.lr was already set"]),
    ],
)  # fmt: skip
def test_what_would_fail_in_a_run_is_refused_before_it(
    file: Path, old: str, new: str, words: list[str]
) -> None:
    message = refused(file, (old, new))
    assert all(each in message for each in words), message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # PyYAML, which W&B reads the file with, wants a point in a float, and knows on and off.
        ("1.0e-3", "1e-3", ["parameters.optim.lr.values.0", "'1e-3' (str)", "write 1.0e-4"]),
        ("{value: 7}", "{value: no}", ["parameters.run.seed.value", "false (bool)", "in quotes"]),
        ("{value: 7}", "{value: 1:30}", ["parameters.run.seed.value", "90 (int)"]),
    ],
)
def test_what_w_and_b_reads_otherwise_is_refused(
    file: Path, old: str, new: str, words: list[str]
) -> None:
    message = refused(file, (old, new))
    assert all(each in message for each in words), message


@pytest.mark.parametrize("value", ["null", '"1.0"', '"null"', '"a: b"', "[null]", "[1, [true]]"])
def test_a_value_that_python_prints_as_another_needs_json(file: Path, value: str) -> None:
    plain = ("run.seed: {value: 7}", f"method.args.kernel: {{value: {value}}}")
    message = refused(file, plain)
    is_fine = value == "[1, [true]]"  # Python's True is YAML's, so it arrives
    assert ("keeps types" in message or "mapping" in message) != is_fine, message
    assert "${args_json} in command" in message or is_fine


def test_a_nested_parameter_would_replace_its_section_unless_printed_as_json(file: Path) -> None:
    nested = ("optim.lr: {values: [1.0e-3, 2.0e-3]}",
              "optim: {parameters: {lr: {values: [1.0e-3, 2.0e-3]}}}")  # fmt: skip
    message = refused(file, nested)
    assert "parameters.optim.lr: ${args_no_hyphens} prints nested parameters as one" in message
    assert "write the dotted name optim.lr" in message
    file.write_text(FILE.replace(*nested).replace("no_hyphens", "json"))
    sweep = loaded(file)
    config = sweep.config_of(sweep.grid[-1], name="trial", folder=Path("runs"))
    assert (config.optim.lr, config.method.args["window"]) == (2e-3, 3)
    assert config.optim.ema_decay == 0.9  # the quick start's: the section was not replaced


def test_every_point_of_a_grid_is_tried_not_only_its_corners(file: Path) -> None:
    message = refused(
        file,
        ("optim.lr: {values: [1.0e-3, 2.0e-3]}", "data.num_groups: {values: [24, 12]}"),
        ("method.args.window: {min: 1, max: 3}", "optim.updates_per_rollout: {values: [1, 8]}"),
    )  # each of 12 and 8 goes with the other's first value, but not with each other
    assert "data.num_groups=12 groups do not divide into optim.updates_per_rollout=8" in message


def test_bayes_needs_a_metric_and_knows_its_default_goal(file: Path) -> None:
    line = "metric: {name: eval/score, goal: maximize}\n"
    message = refused(file, (line, ""), ("method: grid", "method: bayes"))
    assert "method: bayes needs metric" in message
    file.write_text(FILE.replace(", goal: maximize", ""))
    metric = load_sweep(file).config.metric
    assert metric is not None and metric.goal == "minimize"


@pytest.mark.parametrize("name", ["shapes_lr_grid", "shapes_random", "shapes_bayes"])
def test_the_sweeps_that_are_shipped_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = loaded(Path(f"configs/sweeps/{name}.yaml"))
    assert sweep.name == name
    assert sweep.config_of(next(iter(sweep.corners())), name="a", folder=Path("b")).run.max_minutes
