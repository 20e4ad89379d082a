"""What the README tells a newcomer to type works as it is printed.

Kills: a reward that is given inputs it did not declare; a reward's path that is no metric's name.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowrl.__main__ import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    (found,) = (each for each in blocks if containing in each)
    return str(found)


def test_the_reward_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(block("python", "my_reward.py"))
    typed = shlex.split(block("bash", '[{name: "./my_reward.py:score'))
    assert typed[0] == "flowrl"
    small = [
        "run.steps=1", "data.num_groups=1", "data.group_size=2", "eval.every=0",
        "compute.micro_batch_size=2", "eval.samples_per_prompt=1", "eval.num_steps=2",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*typed[1:], *small])
    assert result.exit_code == 0, result.output
    lines = Path("runs/quickstart/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert any(0 < row.get("reward/my_reward.score/mean", 0) < 1 for row in rows)
