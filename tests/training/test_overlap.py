"""Rewards are scored while the next samples are drawn, and learnt from while others are pending.

The order in which things happen is forced by events: a reward that waits for what must come first.
Kills, among others: scores that land on another part; an update that waits for all scores; one that
does not; an update over the wrong number of decisions; results that depend on who was faster.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.data.sampler import GroupSampler
from flowrl.errors import ConfigError
from flowrl.fits import check_parts
from flowrl.methods import METHODS
from flowrl.toys import TargetReward
from flowrl.train.attempts import Patience
from flowrl.train.judge import cut
from flowrl.train.loop import Trainer
from flowrl.train.scoring import RewardSet
from flowrl.train.track import read_metrics
from flowrl.types import Prompt, PromptBatch, Scores, Tree
from tests.training.toy_run import FLOW, TREE, toy_trainer, write_config

WHOLE = FLOW.replace("advantage_std: group", "advantage_std: global")


class Slow(TargetReward):
    """Takes its time, another one for every part."""

    def __init__(self, *pauses: float) -> None:
        self.pauses = list(pauses)

    def score(self, **inputs: Any) -> Tensor:
        time.sleep(self.pauses.pop(0) if self.pauses else 0.0)
        return super().score(**inputs)


class Asks(TargetReward):
    """In its n-th call, waits for the event of that number, at most a minute."""

    def __init__(self, events: dict[int, threading.Event]) -> None:
        self.events = events
        self.calls = 0
        self.met: list[bool] = []

    def score(self, **inputs: Any) -> Tensor:
        self.calls += 1
        if self.calls in self.events:
            self.met.append(self.events[self.calls].wait(timeout=60))
        return super().score(**inputs)


def trainer_of(folder: Path, text: str, reward: Any, *overrides: str) -> Trainer:
    trainer = toy_trainer(write_config(folder, text), "run.steps=2", *overrides)
    trainer.rewards = RewardSet([("target", reward, 1.0)], patience=Patience(retries=0))
    return trainer


def weights_of(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.policy.weights.trainable()]


def trained(folder: Path, text: str, reward: Any, *overrides: str) -> list[Tensor]:
    trainer = trainer_of(folder, text, reward, *overrides)
    assert trainer.run() == "finished"
    return weights_of(trainer)


@pytest.mark.parametrize("text", [FLOW, WHOLE, TREE], ids=["group", "rollout", "tree"])
def test_weights_do_not_depend_on_when_scores_arrive(tmp_path: Path, text: str) -> None:
    for updates in (1, 2):
        options = ("scoring.parts=2", f"optim.updates_per_rollout={updates}")
        quick = trained(tmp_path / f"quick{updates}", text, TargetReward(), *options)
        slow = trained(tmp_path / f"slow{updates}", text, Slow(0.3, 0.0, 0.0, 0.3), *options)
        assert all(map(torch.equal, quick, slow))


@pytest.mark.parametrize("text", [FLOW, WHOLE, TREE], ids=["group", "rollout", "tree"])
def test_parts_change_nothing_but_rounding(tmp_path: Path, text: str) -> None:
    one = trained(tmp_path / "one", text, TargetReward())
    four = trained(tmp_path / "four", text, TargetReward(), "scoring.parts=4")
    for have, want in zip(four, one, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_part_is_scored_while_the_next_is_drawn(tmp_path: Path) -> None:
    drawn = threading.Event()
    reward = Asks({1: drawn})
    trainer = trainer_of(tmp_path, FLOW, reward, "scoring.parts=2")
    rollout, count = trainer.policy.rollout, []

    def watched(*args: Any) -> Any:
        count.append(1)
        result = rollout(*args)
        if len(count) == 2:
            drawn.set()
        return result

    trainer.policy.rollout = watched
    trainer_step(trainer)
    assert reward.met == [True]


@pytest.mark.parametrize(("text", "is_early"), [(FLOW, True), (WHOLE, False)])
def test_a_part_is_learnt_from_before_the_next_has_scores_where_groups_are_compared(
    tmp_path: Path, text: str, is_early: bool
) -> None:
    learnt = threading.Event()
    reward = Asks({2: learnt})
    trainer = trainer_of(tmp_path, text, reward, "scoring.parts=2")
    backward = trainer.learner._backward_chunk

    def watched(*args: Any) -> None:
        backward(*args)
        learnt.set()

    trainer.learner._backward_chunk = watched  # type: ignore[method-assign]
    if not is_early:
        reward.events[2] = threading.Event()  # would wait for what comes after it
        threading.Timer(0.2, reward.events[2].set).start()
    trainer_step(trainer)
    assert reward.met == [True] and learnt.is_set()


def trainer_step(trainer: Trainer) -> None:
    """One training step, without what a run does around it."""
    trainer.tracker = trainer.progress = _Nothing()  # type: ignore[assignment]
    trainer._train_step()


class _Nothing:
    """Where metrics go."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Gaps(TargetReward):
    """Cannot score some samples of the second part."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, **inputs: Any) -> Tensor:
        self.calls += 1
        values = super().score(**inputs)
        if self.calls % 2 == 0:
            values[:5] = torch.nan
        return values


def test_the_gradient_is_a_mean_over_what_has_scores_in_whichever_order(tmp_path: Path) -> None:
    loose = ("scoring.max_invalid=1", "scoring.parts=2")
    early = trained(tmp_path / "early", FLOW, Gaps(), *loose)
    trainer = trainer_of(tmp_path / "late", FLOW, Gaps(), *loose)
    object.__setattr__(trainer.method, "compares", "rollout")  # the same advantages, all at once
    trainer.run()
    for have, want in zip(early, weights_of(trainer), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_what_was_not_hidden_is_logged(tmp_path: Path) -> None:
    trained(tmp_path, FLOW, Slow(0.0, 0.4), "scoring.parts=2")  # the first is the probe
    rows = [r for r in read_metrics(tmp_path / "runs/toy/metrics.jsonl") if "train/loss" in r]
    assert all(row["perf/reward_wait_s"] >= 0 for row in rows)
    assert rows[0]["perf/reward_s"] >= 0.4


def test_an_error_of_a_reward_in_the_background_stops_the_run(tmp_path: Path) -> None:
    class Short(TargetReward):
        def score(self, **inputs: Any) -> Tensor:
            values = super().score(**inputs)
            return values if len(values) == 2 else values[:-1]  # passes the probe

    trainer = trainer_of(tmp_path, FLOW, Short(), "scoring.parts=2")
    with pytest.raises(Exception, match="'target' must return a float tensor"):
        trainer.run()


# ----------------------------------------------------------------------------- the cut


def batch(groups: list[int], updates: list[int]) -> PromptBatch:
    number = torch.arange(len(groups))
    prompts = tuple(Prompt("p") for _ in groups)
    return PromptBatch(prompts, torch.tensor(groups), number, number, torch.tensor(updates), 0)


def test_parts_have_whole_groups_of_one_update() -> None:
    many = batch([0, 0, 1, 1, 1, 2, 2, 3, 3, 3], [0] * 5 + [1] * 5)
    assert [part.tolist() for part in cut(many, 1)] == [list(range(10))]
    assert [part.tolist() for part in cut(many, 2)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert len(cut(many, 9)) == 4
    three = batch([4, 4, 5, 5, 6, 6], [0] * 6)
    assert [part.tolist() for part in cut(three, 2)] == [[0, 1, 2, 3], [4, 5]]


def test_parts_that_would_cut_groups_are_refused(tmp_path: Path) -> None:
    config = toy_trainer(write_config(tmp_path, FLOW), "scoring.parts=2").config
    spread, whole = (
        GroupSampler([Prompt("p")], num_groups=groups, group_size=4, updates_per_rollout=1, seed=0,
                     shuffle=False, rank=0, world_size=2)
        for groups in (3, 4)
    )  # fmt: skip
    check_parts(config, whole, "toy.yaml")
    with pytest.raises(ConfigError, match=r"scoring.parts=2 .* groups of 16 span 2 ranks"):
        check_parts(config, spread, "toy.yaml")


@pytest.mark.parametrize("name", [name for name, make in METHODS.items()])
def test_a_method_that_compares_groups_judges_a_group_alike_alone(name: str) -> None:
    method = METHODS[name]()
    generator = torch.Generator().manual_seed(0)
    steps = 3
    size, num = 12, 4
    values = torch.randn(size * num, generator=generator)
    group = torch.arange(num).repeat_interleave(size)
    node = torch.arange(size * num)[:, None].expand(-1, steps + 1).clone()

    def advantages(mine: Tensor) -> Tensor:
        scores = Scores({"a": values[mine]}, {"a": 1.0}, torch.ones(int(mine.sum())).bool())
        tree = Tree(node[mine], torch.zeros(int(mine.sum()), steps))
        return method.advantage(scores, group[mine], tree)

    try:
        everyone = advantages(torch.ones(len(values), dtype=torch.bool))
    except ValueError:
        pytest.skip("its trees have a shape of their own; tests/methods has them")
    parts = torch.cat([advantages(group == each) for each in range(num)])
    if method.compares == "group":
        torch.testing.assert_close(parts, everyone, equal_nan=True)
