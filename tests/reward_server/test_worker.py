"""A reward in a process of its own scores as it would here, with another environment's packages.

Kills, among others: prints that mix with messages; a process that is left behind; a judge called as
a reward; arguments lost on the way; our environment's packages in the other one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards.pairwise import WinRate
from rewards.serving.calls import RewardFailed
from rewards.serving.worker import start_worker
from rewards.simple import Brightness
from tests.reward_server.kit import flat, wait_until

FRAGILE = Path(__file__).with_name("fragile.py")
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@contextmanager
def worker(name: str, args: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    made = start_worker(name if name[0] != ":" else f"{FRAGILE}{name}", args or {}, **options)
    try:
        yield made
    finally:
        made.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_scores_are_the_same_bit_by_bit_whatever_the_reward_prints(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with worker(":Talkative") as reward:
        for count in (5, 1):
            scores = reward.score(images=IMAGES[:count])
            assert scores.equal(Brightness().score(images=IMAGES[:count]))
        assert (reward.inputs, reward.scope, reward.range) == (("images",), "sample", (0.0, 1.0))
        assert reward.num_restarts == 0
    assert "a line on standard output" in capfd.readouterr().out  # it is the server's


def test_components_come_back_beside_the_scores() -> None:
    with worker(":Detailed") as reward:
        values = reward.score(images=IMAGES)
        assert values["score"].equal(Brightness().score(images=IMAGES))
        assert values["squared"].equal(values["score"].square()) and len(values) == 2


def test_the_process_is_another_one_and_ends_with_its_reward() -> None:
    with worker(":pid") as reward:
        [number] = reward.score(images=IMAGES[:1]).tolist()
        assert number == reward.pid != os.getpid()
        assert is_alive(reward.pid)
    assert not is_alive(reward.pid)


def test_the_process_ends_when_its_server_is_killed() -> None:
    code = (
        "from rewards.serving.worker import start_worker\n"
        f"worker = start_worker({f'{FRAGILE}:pid'!r}, {{}})\n"
        "print(worker.pid, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert is_alive(pid)
        server.kill()
    wait_until(lambda: not is_alive(pid))


def test_texts_arguments_and_errors_pass_and_the_process_goes_on() -> None:
    with worker(":Reads", {"power": 2.0}) as reward:
        given = {"prompts": ["ab", "cde"], "metadata": [{"factor": 1.0}, {"factor": 2.0}]}
        assert reward.score(**given).tolist() == [4.0, 36.0]
        assert (reward.scope, reward.range) == ("group", (0.0, float("inf")))
        with pytest.raises(RewardFailed, match="raised ValueError: a prompt says boom"):
            reward.score(prompts=["boom"], metadata=[{"factor": 1.0}])
        assert reward.score(**given).tolist() == [4.0, 36.0]
        assert reward.num_restarts == 0


def test_a_judge_of_pairs_can_live_there_too() -> None:
    with worker(":Brighter") as judge:
        rates = WinRate(judge=judge).score(images=flat([0.1, 0.5, 0.9]), prompts=["p"] * 3)
        assert rates.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "args", "options", "reason"),
    [
        ("brigthness", {}, {}, "did you mean 'brightness'.*in a process of "),
        (":Reads", {"pwer": 1}, {}, "'pwer' is not an argument"),
        (":Reads", {"power": 1}, {"python": "/no/such/python"}, "/no/such/python cannot be run"),
        (":pid", {}, {"python": "/bin/false"}, r"ended before it was ready \(exit code 1\)"),
    ],
)
def test_what_cannot_be_started_is_refused_with_the_reason(
    name: str, args: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason), worker(name, args, **options):
        pass


def test_it_runs_in_an_environment_with_packages_that_are_only_there(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=300
    )
    [packages] = environment.glob("lib/python*/site-packages")
    # Stands for the torch that would be installed there.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "ours.pth").write_text("\n".join(ours))
    (packages / "only_there.py").write_text(
        "import sys\n"
        "def score(images):\n"
        "    assert 'venv' in sys.prefix\n"
        "    try:\n"
        "        import flowrl\n"
        "    except ImportError:\n"
        "        return images.mean(dim=(1, 2, 3)) / 2\n"
        "    raise RuntimeError(f'flowrl was found: {flowrl.__file__}')\n"
    )
    old = os.environ.pop("PYTHONPATH", None)
    folder = Path.cwd()
    os.chdir(tmp_path)
    try:
        with pytest.raises(ValueError, match="no module 'only_there'"), worker("only_there:score"):
            pass
        python = str(environment / "bin" / "python")
        with worker("only_there:score", python=python) as reward:
            assert reward.score(images=IMAGES).equal(Brightness().score(images=IMAGES) / 2)
    finally:
        os.chdir(folder)
        if old is not None:
            os.environ["PYTHONPATH"] = old
