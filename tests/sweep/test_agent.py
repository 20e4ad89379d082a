"""The line that `wandb agent` runs, made by wandb's own code, and what a run then reads.

Kills, among others: a value whose type is lost on the way; a section that a nested parameter
replaces; a run of an agent that writes over another's; a local line that is not the agent's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowrl.config import Config, load_config
from flowrl.sweep.command import print_values
from flowrl.sweep.spec import load_sweep

ROOT = Path(__file__).resolve().parents[2]
COMMAND = """\
program: flowrl
method: random
run_cap: 2
parameters:
  optim.lr: {min: 0.001, max: 0.002}
command: [%s, train, rl.yaml, "run.name=${oc.env:WANDB_RUN_ID}", "track.tags=[a, b]", "%s"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rl.yaml").write_text(f"base: {ROOT / 'configs/quickstart.yaml'}\n"
                                      "track: {trackers: [wandb]}\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "nothing")  # the agent sets them; afterwards they are put back
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return tmp_path


def agent_line(
    file: Path, run_id: str, args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The words that wandb's agent starts a process with, and the variables that it sets."""
    wandb_agent = pytest.importorskip("wandb.wandb_agent")
    started: list[tuple[list[str], dict[str, str]]] = []

    class Process:
        def __init__(self, *, command: list[str], env: dict[str, str], **_: Any) -> None:
            started.append((command, env))

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    agent = wandb_agent.Agent(None, None, sweep_id="sweep1")
    agent._sweep_command = yaml.safe_load(file.read_text())["command"]
    # What the server sends: a value per parameter; nested parameters are a mapping.
    command = {"type": "run", "run_id": run_id, "program": "flowrl",
               "args": {name: {"value": value} for name, value in args.items()}}  # fmt: skip
    response = agent._process_command(command)
    assert "exception" not in response, response
    ((line, environment),) = started
    assert environment["WANDB_RUN_ID"] == run_id and environment["WANDB_SWEEP_ID"] == "sweep1"
    return line


def read(line: list[str]) -> Config:
    """What `flowrl train` reads of such a line."""
    at = line.index("train")
    return load_config(line[at + 1], line[at + 2 :])


def test_typed_values_arrive_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "sweep.yaml"
    file.write_text(COMMAND % ("flowrl", "${args_no_hyphens}"))
    args = {
        "optim.lr": 1e-05,
        "optim.betas": [0.9, 0.5],
        "optim.weight_decay": 0,
        "data.shuffle": False,
        "data.group_size": 12,
        "method.args.roll_back": True,
        "method.args.strategy": "progressive",
        "rewards.0.weight": 0.30000000000000004,
        "rewards.1": {"name": "shapes_graded", "weight": 2.0},
    }
    line = agent_line(file, "0e5", args, monkeypatch)
    assert line[:3] == ["flowrl", "train", "rl.yaml"] and "optim.lr=1e-05" in line
    config = read(line)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1e-5, (0.9, 0.5), 0)
    assert (config.data.shuffle, config.data.group_size) == (False, 12)
    assert config.method.args["roll_back"] is True
    assert config.method.args["strategy"] == "progressive" and config.method.args["window"] == 1
    assert config.rewards[0].weight == 0.30000000000000004
    assert (config.rewards[1].name, config.rewards[1].weight) == ("shapes_graded", 2.0)
    assert config.track.tags == ("a", "b")
    assert config.run.name == "0e5"  # a text, though YAML would read a number


def test_nested_and_empty_values_arrive_as_json(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "sweep.yaml"
    file.write_text(COMMAND % ("flowrl", "${args_json}"))
    args = {
        "optim": {"lr": 0.003, "ema_decay": None},
        "model": {"lora": {"rank": 8}},
        "method.args.strategy": "no",
        "data.shuffle": True,
    }
    config = read(agent_line(file, "run2", args, monkeypatch))
    assert (config.optim.lr, config.optim.ema_decay) == (0.003, None)
    assert (config.model.lora.rank, config.model.lora.alpha) == (8, 8.0)  # the file's alpha
    assert config.model.tuning == "lora" and config.data.shuffle is True
    assert config.method.args["strategy"] == "no" and config.method.args["window"] == 1
    assert config.run.name == "run2"


@pytest.mark.parametrize("macro", ["${args_no_hyphens}", "${args_json}"])
def test_two_runs_of_one_agent_write_to_two_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, macro: str
) -> None:
    file = folder / "sweep.yaml"
    file.write_text(COMMAND % ("flowrl", macro))
    names = []
    for run_id in ("one", "two"):
        config = read(agent_line(file, run_id, {"optim.lr": 0.1}, monkeypatch))
        names.append(config.run.name)
    assert names == ["one", "two"]


@pytest.mark.parametrize("macro", ["${args_no_hyphens}", "${args_json}"])
@pytest.mark.parametrize(
    "program", ["flowrl", "'${env}', '${interpreter}', -m, '${program}'", "accelerate, launch, -m, "
                "flowrl"]
)  # fmt: skip
def test_a_local_line_is_the_agents_but_for_where_it_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, macro: str
) -> None:
    file = folder / "sweep.yaml"
    file.write_text(COMMAND % (program, macro))
    sweep = load_sweep(file)
    values = {("optim.lr",): 0.0015, ("method.args.window",): 2}
    theirs = agent_line(
        file, "id", {".".join(path): value for path, value in values.items()}, monkeypatch
    )
    # An agent calls its interpreter "python", this is the one that runs.
    known = [sys.executable if word == "python" else word for word in theirs]
    assert list(sweep.command.line(values)) == known
    local = list(sweep.command.local_line(values, name="trial_0001", folder=folder / "a b"))
    ours, theirs_read = read(local), read(theirs)
    where = {"name": "trial_0001", "output_dir": str(folder / "a b")}
    assert ours.run == theirs_read.run.model_copy(update=where)
    assert ours.model_copy(update={"run": theirs_read.run}) == theirs_read
    start = (
        [sys.executable, "-m", "flowrl"] if program == "flowrl" else known[: known.index("train")]
    )
    assert local[: len(start) + 1] == [*start, "train"]
    for odd in ("a: b", "#a", "12", "a b"):
        words = list(sweep.command.local_line(values, name="t", folder=Path(odd)))
        assert read(words).run.output_dir == odd


def test_values_below_one_parameter_are_printed_as_one_mapping() -> None:
    values = {("a", "b"): 1, ("a", "c", "d"): None, ("e.f",): True}
    assert print_values(values, "${args_json}") == [
        '{"a": {"b": 1, "c": {"d": null}}, "e.f": true}'
    ]
    flat = print_values({("a", "b"): 1, ("e.f",): None}, "${args_no_hyphens}")
    assert flat == ["a={'b': 1}", "e.f=None"]
