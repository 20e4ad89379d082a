"""`flowrl rewards serve FILE`: a strict file, real processes, real signals, and a run that scores.

Kills, among others: a server open to the network without a token; a process left behind; a stop
that drops the request inside; a run through a server that differs in one bit; a server that comes
back as another reward.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rewards
from flowrl.errors import ConfigError
from flowrl.schema import RewardConfig
from flowrl.serve import ServedConfig, fingerprint, load_server
from flowrl.sources import build_rewards
from flowrl.train.track import read_metrics
from rewards.serving.client import RemoteReward
from rewards.shapes.verify import renders
from tests.artefacts.tiny_run import train
from tests.reward_server.kit import PATIENT_S, flat, served, serving, wait_until

ROOT = Path(__file__).resolve().parents[2]
GATED = """
import pathlib, time

def score(images):
    here = pathlib.Path(__file__).parent
    (here / "entered").touch()
    while not (here / "go").exists():
        time.sleep(0.01)
    return images.mean(dim=(1, 2, 3))
"""


class Command:
    """`flowrl rewards serve` in a process; `url` is what it prints."""

    def __init__(self, file: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flowrl", "rewards", "serve", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            # A shell's background job, such as a whole run of the tests, ignores it otherwise.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        if not self.line:
            raise AssertionError(self.process.communicate()[1])
        self.url = self.line.split(" on ")[1].split()[0]

    def end(self, number: int) -> tuple[int, str]:
        """The exit code and standard error after a signal."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENT_S)
        return self.process.returncode, errors


@contextmanager
def command(file: Path, **environment: str) -> Iterator[Command]:
    running = Command(file, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def write(folder: Path, text: str) -> Path:
    file = folder / "server.yaml"
    file.write_text(text)
    return file


def test_a_server_that_is_killed_and_comes_back_costs_no_sample(tmp_path: Path) -> None:
    images = torch.stack([torch.from_numpy(each.image) for each in renders(24, 3)])
    rows = [each.request.metadata for each in renders(24, 3)]
    rows = rows[12:] + rows[:12]  # half of what is asked for is not what is shown
    expected = rewards.load("shapes_graded").score(images=images, metadata=rows)
    file = write(tmp_path, "{port: 0, rewards: [{name: shapes_graded, label: shapes}]}")
    with command(file) as first:
        assert "serving shapes on http://127.0.0.1:" in first.line
        port = first.url.rsplit(":", 1)[1]
        file.write_text(f"{{port: {port}, rewards: [{{name: shapes_graded, label: shapes}}]}}")
        client = RemoteReward(url=first.url, reward="shapes", images_per_request=2, parallel=2,
                              retries=1000, total_s=PATIENT_S, backoff_s=0.05)  # fmt: skip
        assert client.score(images=images, metadata=rows).equal(expected)
        stop = threading.Event()

        def score_until_told() -> list[torch.Tensor]:
            found = []
            while not stop.is_set():
                found.append(client.score(images=images, metadata=rows))
            return found

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(score_until_told)
            try:
                assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
                with command(file) as second:
                    assert second.url == first.url
                    scores = client.score(images=images, metadata=rows)
                    stop.set()
                    results = running.result(PATIENT_S)
            finally:
                stop.set()
    assert expected.std() > 0 and results
    assert all(each.equal(expected) for each in [scores, *results])


def test_processes_a_token_and_a_stop_that_answers_the_request_inside(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(GATED)
    file = write(
        tmp_path,
        f"""
        port: 0
        token_env: OUR_TOKEN
        rewards:
          - {{name: "{tmp_path}/gated.py:score", label: gated, process: true}}
          - {{name: brightness}}
        """,
    )
    with command(file, OUR_TOKEN="s3cret") as running:
        assert "serving gated, brightness on http://127.0.0.1:" in running.line
        with pytest.raises(ValueError, match="status 401"):
            RemoteReward(url=running.url, reward="gated").score(images=flat([0.5]))
        os.environ["OUR_TOKEN"] = "s3cret"
        try:
            client = RemoteReward(url=running.url, reward="gated", token_env="OUR_TOKEN")
        finally:
            del os.environ["OUR_TOKEN"]
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(client.score, images=flat([0.25, 0.5]))
            wait_until((tmp_path / "entered").exists)
            running.process.send_signal(signal.SIGINT)
            assert not asked.done()
            (tmp_path / "go").touch()
            assert asked.result(PATIENT_S).tolist() == [0.25, 0.5]
        _, errors = running.process.communicate(timeout=PATIENT_S)
    assert running.process.returncode == 130
    assert errors == "Stopped: interrupted\n"


RUN = """\
run: {{name: served, steps: 2, output_dir: "{folder}", seed: 3}}
model: {{id: shapes, max_sequence_length: 16}}
method: {{name: mix_grpo, args: {{num_steps: 4, window: 2, interval: 1}}}}
data: {{train: shapes/train, num_groups: 3, group_size: 4}}
rewards: [{reward}]
optim: {{lr: 1e-4}}
compute: {{micro_batch_size: 12, rollout_batch_size: 12, decode_batch_size: 12}}
eval: {{num_steps: 4, max_prompts: 2, num_samples_shown: 2}}
checkpoint: {{every: 0}}
"""


def test_training_through_a_server_is_training_in_process_bit_by_bit(tmp_path: Path) -> None:
    strict = rewards.load("shapes_strict")
    with serving(served("strict", strict)) as server:
        remote = f"{{name: remote, args: {{url: '{server.url}', reward: strict}}}}"
        finals, curves = [], []
        for name, reward in (("here", "{name: shapes_strict}"), ("there", remote)):
            folder = tmp_path / name
            folder.mkdir()
            file = write(folder, RUN.format(folder=folder, reward=reward))
            train(file)
            [weights] = folder.glob("served/final/pipeline/transformer/*.safetensors")
            finals.append(load_file(weights))
            rows = read_metrics(folder / "served/metrics.jsonl")
            curves.append([row["train/reward_mean"] for row in rows if "train/reward_mean" in row])
    here, there = finals
    assert curves[0] == curves[1] and len(curves[0]) == 2
    assert here.keys() == there.keys()
    assert all(here[key].equal(there[key]) for key in here)
    base = load_file(next(ROOT.glob("pipelines/weights/shapes_sd3/transformer/*.safetensors")))
    assert any(not here[key].equal(base[key]) for key in here)  # it has learnt something


# --------------------------------------------------------------------------- the file

BRIGHT = "rewards: [{name: brightness}]"


def test_defaults_are_closed_and_every_key_is_read(tmp_path: Path) -> None:
    config = load_server(write(tmp_path, BRIGHT))
    assert (config.host, config.port, config.token_env) == ("127.0.0.1", 8700, None)
    file = write(
        tmp_path,
        "{host: 0.0.0.0, port: 1, token_env: T, max_body_mb: 2, max_batch: 3, max_wait_ms: 0,\n"
        " rewards: [{name: a, label: b, args: {c: 1}, process: true, python: p, timeout_s: 5}]}",
    )
    config = load_server(file)
    assert (config.host, config.max_body_mb, config.max_batch) == ("0.0.0.0", 2.0, 3)
    [reward] = config.rewards
    assert (reward.served_as, reward.args, reward.python) == ("b", {"c": 1}, "p")
    assert ServedConfig(name="./a/mine.py:score").served_as == "mine.score"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{" + BRIGHT + ", prot: 1}", "prot is not a key of a config; did you mean 'port'"),
        ("{" + BRIGHT + ", port: 70000}", "port must be int >= 0 and <= 65535, got 70000"),
        ("port: 1", "rewards is missing"),
        ("rewards: []", "rewards must be list of section"),
        ("rewards: [{name: a}, {name: a}]", "'a' is served 2 times; give each a label"),
        ("rewards: [{name: a, python: p}]", "needs a process of its own; set process: true"),
        ("{" + BRIGHT + ", host: 0.0.0.0}", "anybody there could use this server; set token_env"),
        ("{" + BRIGHT + ", host: '::'}", "token_env is not set"),
        ("{" + BRIGHT + ", host: gpu-17}", "token_env is not set"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_server(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_the_file_in_the_documentation_can_be_served(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reward_server.md").read_text()
    config = load_server(write(tmp_path, text.split("```yaml\n")[1].split("```")[0]))
    assert [each.served_as for each in config.rewards] == ["shapes_strict", "pick"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_needs_no_token(tmp_path: Path, host: str) -> None:
    assert load_server(write(tmp_path, f"{{host: '{host}', {BRIGHT}}}")).host == host


def test_what_differs_has_another_fingerprint() -> None:
    one = ServedConfig(name="brightness", label="a")
    assert fingerprint(one) == fingerprint(ServedConfig(name="brightness", process=True))
    others = [ServedConfig(name="brightness", args={"a": 1}), ServedConfig(name="pickscore")]
    assert len({fingerprint(each) for each in [one, *others]}) == 3


def test_a_run_whose_server_is_not_there_is_refused_when_it_is_built(tmp_path: Path) -> None:
    args = {"url": "http://127.0.0.1:9", "reward": "bright", "retries": 0}
    with pytest.raises(ConfigError, match=r"rl.yaml: remote: http://127.0.0.1:9: .* after 1 try"):
        build_rewards([RewardConfig(name="remote", args=args)], where="rl.yaml")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{port: 0, rewards: [{name: brigthness}]}", "did you mean 'brightness'"),
        ("{port: 0, token_env: FLOWRL_NO_SUCH, " + BRIGHT + "}", "token_env=FLOWRL_NO_SUCH"),
        ("{port: PORT, " + BRIGHT + "}", "cannot listen on 127.0.0.1 port PORT: Address already"),
    ],
)
def test_what_cannot_be_served_exits_with_2_and_one_message(
    tmp_path: Path, text: str, reason: str
) -> None:
    with serving(served("bright", rewards.load("brightness"))) as taken:
        port = str(taken.port)
        file = write(tmp_path, text.replace("PORT", port))
        done = subprocess.run(
            [sys.executable, "-m", "flowrl", "rewards", "serve", str(file)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=PATIENT_S,
        )
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: {file}: ") and done.stderr.count("\n") == 1
    assert reason.replace("PORT", port) in done.stderr
