"""The example plug-in, installed as a user would: flowrl finds its reward and its method by name.

Kills: a group of entry points that nobody reads; a plug-in's arguments that nobody checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages into which the plug-in was installed."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--no-build-isolation", "--target", str(folder), str(ROOT / "examples/plugin"),
        ],
        check=True,
    )  # fmt: skip
    return folder


def python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


CODE = """
import json, torch
from pathlib import Path
import rewards
from flowrl.build import build_method
from flowrl.config import load_config
from flowrl.errors import ConfigError
from flowrl.testing import check_reward
from flowrl.types import Scores

reward = rewards.load("redness", strength=2.0)
check_reward(reward)
red = torch.zeros(1, 3, 2, 2)
red[:, 0] = 1

def method(name, **args):
    given = json.dumps({"name": name, "args": args})
    return build_method(load_config("configs/shapes_flow_grpo.yaml", [f"method={given}"]), "x.yaml")

def refused(name, **args):
    try:
        method(name, **args)
    except ConfigError as error:
        return str(error)

group = torch.tensor([0, 0, 0, 0, 1, 1])
values = torch.tensor([5.0, 1.0, 1.0, float("nan"), 2.0, 2.0])
ranked = method("ranked_flow_grpo", num_steps=4)
print(json.dumps({
    "score": reward.score(images=red)["score"].item(),
    "described": dict(ranked.describe())["method"],
    "steps": ranked.plan(0).num_steps,
    "advantage": ranked.advantage(Scores({"a": values}, {"a": 1.0}, ~values.isnan()), group, None)
    .tolist(),
    "by_path": method("flowrl_example.method:ranked_flow_grpo").name,
    "argument": refused("ranked_flow_grpo", clip_rnage=1),
    "name": refused("ranked_flow_gropo"),
    "no_method": refused("flowrl_example.reward:Redness"),
    "no_module": refused("flowrl_exampel.method:ranked_flow_grpo"),
}))
"""


def test_an_installed_plugin_is_found_by_name_and_its_arguments_are_checked(site: Path) -> None:
    done = python(site, CODE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["score"] == 2.0
    assert (found["described"], found["steps"]) == ("ranked_flow_grpo", 4)
    assert found["advantage"] == [1, -0.5, -0.5, 0, 0, 0]
    assert found["by_path"] == "ranked_flow_grpo"
    assert "method.args.clip_rnage" in found["argument"]
    assert "did you mean 'clip_range'" in found["argument"]
    assert "did you mean 'ranked_flow_grpo'" in found["name"]
    assert "makes Redness; expected a function that returns" in found["no_method"]
    assert "there is no module 'flowrl_exampel'" in found["no_module"]


def test_without_the_plugin_its_names_are_unknown() -> None:
    done = python(ROOT, "import rewards; rewards.load('redness')")
    assert done.returncode and "'redness' is not a reward" in done.stderr
