"""Judges behind a real server, `transformers serve`, with the tiny LLaVA that also answers here.

Kills, among others: images, questions or their order that change on the way; an address that only
our own test server knows; fields that a real server refuses.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor
from transformers.utils.import_utils import is_serve_available

import rewards
from rewards.pairwise import WinRate
from tests.reward_models.tiny_llava import write_llava

pytestmark = [
    pytest.mark.slow,  # a server that imports torch and transformers
    pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]"),
]
PROMPTS = ["a red cube", "two dogs", "x", 'braces {prompt} and "quotes"']
START_S = 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def base_url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server process with the model of `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import app; app()"
    args = ["serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
            "--dtype", "float32"]  # fmt: skip
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *args],
            stdout=output,
            stderr=output,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"the server did not answer in {START_S} s: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def small() -> Tensor:
    return torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(4))


def test_a_score_is_the_same_here_and_there(folder: Path, base_url: str, small: Tensor) -> None:
    args = {"mode": "score", "pattern": r"^(\d\d)\d*$", "high": 99.0, "max_tokens": 4}
    here = rewards.load("vlm_judge", model=str(folder), dtype="float32", **args)
    at = {"base_url": base_url, "timeout_s": 300, "retries": 0}
    there = rewards.load("vlm_judge", model=str(folder), endpoint=at, **args)
    given = {"images": small.repeat(2, 1, 1, 1), "prompts": [*PROMPTS, *"abcd"]}
    one, other = here.score(**given), there.score(**given)
    assert len({value for value in one["score"].tolist() if value == value}) > 2
    torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


def test_win_rates_are_the_same_here_and_there(folder: Path, base_url: str, small: Tensor) -> None:
    verdicts = {str(digit): digit / 9 for digit in range(10)}
    args = {"model": str(folder), "pattern": r"^(\d)\d*$", "verdicts": verdicts, "max_tokens": 3}
    at = {"base_url": base_url, "timeout_s": 300, "retries": 0}
    rates = [
        WinRate(judge="vlm_pair_judge", judge_args={**args, **more}).score(
            images=small, prompts=["x"] * 4
        )
        for more in ({"dtype": "float32"}, {"endpoint": at})
    ]
    assert rates[0].std() > 0.01
    torch.testing.assert_close(*rates, rtol=0, atol=0, equal_nan=True)


def test_a_server_without_log_probabilities_says_so(
    folder: Path, base_url: str, small: Tensor
) -> None:
    at = {"base_url": base_url, "timeout_s": 300}
    judge = rewards.load("vlm_judge", model=str(folder), endpoint=at)
    with pytest.raises(ConnectionError, match=r"no log-probabilities.*use mode 'score'"):
        judge.score(images=small[:1], prompts=["x"])


def test_a_model_that_is_not_served_is_refused_at_once(base_url: str, small: Tensor) -> None:
    at = {"base_url": base_url, "timeout_s": 300}
    judge = rewards.load("vlm_judge", model="another", mode="score", endpoint=at)
    with pytest.raises(ConnectionError, match=r"it refused: HTTP 400: .*another"):
        judge.score(images=small[:1], prompts=["x"])
