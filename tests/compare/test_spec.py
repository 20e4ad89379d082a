"""A comparison's file: what it becomes, and how it is refused.

Kills, among others: a budget that the config's own limit undercuts; an entry's override that loses
against the file's; runs whose held-out scores do not compare.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.compare.spec import UNLIMITED_STEPS, load_comparison
from flowrl.config import load_config
from flowrl.errors import ConfigError
from flowrl.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
FILE = """\
name: pair
seeds: [0, 3]
budget: {minutes: 2}
overrides: {eval.every: 10, optim.lr: 1e-3}
runs:
  - {name: flow, config: ../configs/flow.yaml}
  - {name: mix, config: ../configs/flow.yaml, overrides: {optim.lr: 1e-5, data.train: "a: #b"}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    quick = ROOT / "configs/quickstart.yaml"
    (tmp_path / "configs/flow.yaml").write_text(f"base: {quick}\n")
    (tmp_path / "compare").mkdir()
    path = tmp_path / "compare/pair.yaml"
    path.write_text(FILE)
    return path


def refused(file: Path, old: str, new: str) -> str:
    assert old in FILE
    file.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_comparison(file)
    return str(caught.value)


def test_every_entry_runs_with_every_seed_on_the_budget_alone(file: Path) -> None:
    comparison = load_comparison(file)
    assert [plan.title for plan in comparison.plans] == [
        "flow, seed 0", "mix, seed 0", "flow, seed 3", "mix, seed 3"
    ]  # fmt: skip
    last = comparison.plans[3]
    assert last.folder == Path("runs/pair/mix_seed3")
    run = last.config.run
    # The quick start's own limits are 100 steps and 6 minutes.
    assert (run.steps, run.max_minutes, run.max_evaluations) == (UNLIMITED_STEPS, 2, None)
    assert (run.seed, Path(run.output_dir) / run.name) == (3, last.folder)
    assert (last.config.eval.every, last.config.optim.lr) == (10, 1e-5)
    assert comparison.plans[2].config.optim.lr == 1e-3
    assert last.config.data.train == "a: #b"
    assert load_config(last.file, last.overrides) == last.config
    assert comparison.baseline == "flow"


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        ("{steps: 7}", (7, None, None)),
        ("{evaluations: 500}", (UNLIMITED_STEPS, None, 500)),
    ],
)
def test_a_budget_switches_the_other_limits_off(
    file: Path, budget: str, limits: tuple[int, float | None, int | None]
) -> None:
    file.write_text(FILE.replace("{minutes: 2}", budget))
    run = load_comparison(file).plans[0].config.run
    assert (run.steps, run.max_minutes, run.max_evaluations) == limits


def test_seeds_and_folder_may_be_chosen_at_the_call(file: Path, tmp_path: Path) -> None:
    comparison = load_comparison(file, out=tmp_path / "out", seeds=[5])
    assert [plan.folder.relative_to(tmp_path) for plan in comparison.plans] == [
        Path("out/flow_seed5"), Path("out/mix_seed5")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="seeds: 5 is there 2 times"):
        load_comparison(file, seeds=[5, 5])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("budget:", "budgt:", ["budgt is not a key", "did you mean 'budget'?",
                               "budget is missing"]),
        ("{minutes: 2}", "{minute: 2}", ["budget.minute", "did you mean 'minutes'?"]),
        ("{minutes: 2}", "{minutes: 2, steps: 4}", ["exactly one of", "minutes=2.0, steps=4"]),
        ("{minutes: 2}", "{}", ["exactly one of minutes, steps and evaluations, got none"]),
        ("{minutes: 2}", "{minutes: 0}", ["budget.minutes must be float > 0"]),
        ("name: flow,", "nam: flow,", ["runs.0.nam is not a key", "did you mean 'name'?"]),
        ("name: flow,", "name: a/b,", ["runs.0.name"]),
        ("name: flow,", "name: mix,", ["runs: 'mix' is there 2 times"]),
        ("[0, 3]", "[]", ["seeds must be", "it must not be empty"]),
        ("runs:", "baseline: flw\nruns:", ["baseline=flw is not a run", "did you mean 'flow'?"]),
        ("flow, config: ../configs/flow", "flow, config: ../configs/flwo",
         ["run flow: config: ../configs/flwo.yaml: no such file", "did you mean 'flow.yaml'?"]),
        ("eval.every: 10", "eval.evry: 10", ["run flow", "eval.evry", "did you mean 'every'?"]),
        ("eval.every: 10", "run.max_minutes: 9", ["overrides.run.max_minutes", "the budget"]),
        ("optim.lr: 1e-5", "track.log_every: 5", ["run mix: overrides.track.log_every"]),
        ("optim.lr: 1e-5", "eval.max_prompts: 5", ["eval.max_prompts is 5 for mix and None for "
                                                   "flow", "do not compare"]),
        ("optim.lr: 1e-5", "eval.rewards: [{name: brightness}]", ["eval.rewards", "brightness"]),
        ("optim.lr: 1e-5", "optim.schedule: cosine", ["optim.schedule=cosine", "steps: ..."]),
    ],
)  # fmt: skip
def test_what_is_not_understood_or_does_not_compare_is_refused(
    file: Path, old: str, new: str, words: list[str]
) -> None:
    message = refused(file, old, new)
    assert all(each in message for each in words), message
    assert str(file) in message
    assert "the override" not in message


def test_a_method_may_be_evaluated_with_its_own_sampler(file: Path) -> None:
    file.write_text(FILE.replace("optim.lr: 1e-5", "eval.guidance_scale: 3.0, eval.num_steps: 5"))
    assert load_comparison(file).plans[1].config.eval.num_steps == 5


def test_the_comparison_that_is_shipped_fits_together() -> None:
    comparison = load_comparison(ROOT / "configs/compare/mix_vs_flow.yaml")
    assert len(comparison.plans) == 9 and comparison.baseline == "flow_grpo"
    assert {plan.config.method.name for plan in comparison.plans} == {"flow_grpo", "mix_grpo"}
    assert all(entry.claim for entry in comparison.config.runs)


def test_the_comparison_of_the_family_holds_every_method_that_draws_flows_once() -> None:
    comparison = load_comparison(ROOT / "configs/compare/flow_family.yaml", seeds=[0])
    methods = {name: make() for name, make in METHODS.items()}
    flows = [n for n, m in methods.items() if m.policy != "token" and not m.takes_pairs]
    *named, quick = comparison.plans
    assert quick.entry == "awm_quick"  # the one entry that is not called by its method
    assert sorted(plan.entry for plan in named) == sorted(flows)
    assert all(plan.config.method.name == plan.entry for plan in named)
    assert {plan.config.method.args["num_steps"] for plan in named} == {8}
    assert {plan.config.run.max_minutes for plan in comparison.plans} == {3}
