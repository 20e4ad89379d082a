"""Two rewards that oppose each other, trained with one clipped loss each, through the real trainer.

Kills, among others: a negative share that is not split, sliced or gathered like the advantage; one
that lands on another decision; samples whose rewards cancel left out, or groups of them counted as
equal; a sample that one reward could not score taken for 0; a combination in which the option does
nothing.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flowrl.errors import ConfigError
from flowrl.toys import SymbolReward, TargetReward
from flowrl.train.collect import reward_metrics
from flowrl.train.lessons import Judged, Part
from flowrl.train.scoring import RewardSet
from flowrl.train.track import read_metrics
from flowrl.types import Scores
from tests.policies.toy_flow import perturb
from tests.training.toy_run import FLOW, TOKEN, toy_trainer, train_on_two, write_config

REWARDS = "{name: target}, {name: away, weight: 0.7}, {name: halfway, weight: 0}"
OPPOSED = (
    FLOW.replace("flow_grpo", "dance_grpo")
    .replace("advantage_std: group", "noise_level: 0.7")
    .replace("{name: target}", REWARDS)
)
SEPARATE = "method.args.reward_losses=separate"
LOOSE = ["scoring.max_invalid=1", "method.args.clip_range=0.005"]
SHORT = ["run.steps=3", "optim.updates_per_rollout=2", *LOOSE, SEPARATE]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "runs/toy/metrics.jsonl")
    return [row for row in rows if "train/advantage_abs_mean" in row]


def trained(folder: Path, *overrides: str, text: str = OPPOSED) -> dict[str, torch.Tensor]:
    assert toy_trainer(write_config(folder, text), *overrides).run() == "finished"
    return load_file(next((folder / "runs/toy/final").rglob("*.safetensors")))


def largest_difference(one: dict, two: dict) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run in one piece."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, trained(folder, *SHORT)


def test_the_losses_of_opposed_rewards_are_not_those_of_their_sum(alone, tmp_path) -> None:
    folder, separate = alone
    summed = trained(tmp_path, *SHORT[:-1])
    assert largest_difference(separate, summed) > 1e-3
    steps = steps_of(folder)
    assert all(0 < row["train/invalid_frac"] < 0.2 for row in steps)  # the test sees NaN at work
    assert all(row["reward/away/invalid_frac"] == row["train/invalid_frac"] for row in steps)
    assert all(row["train/clip_frac_low"] > 0 and row["train/clip_frac_high"] > 0 for row in steps)


@pytest.mark.parametrize(
    "how", [["compute.micro_batch_size=7", "compute.rollout_batch_size=5"], ["scoring.parts=2"]]
)
def test_neither_chunks_nor_parts_change_the_result(how: list[str], alone, tmp_path) -> None:
    assert largest_difference(alone[1], trained(tmp_path, *SHORT, *how)) < 1e-4


@pytest.mark.parametrize("how", [[], ["scoring.parts=2"]], ids=["whole", "parts"])
def test_one_and_two_processes_train_the_same_weights(how: list[str], alone, tmp_path) -> None:
    train_on_two(write_config(tmp_path, OPPOSED), *SHORT, *how)
    pair = load_file(next((tmp_path / "runs/toy/final").rglob("*.safetensors")))
    assert largest_difference(alone[1], pair) < 1e-4
    for row, other in zip(steps_of(alone[0]), steps_of(tmp_path), strict=True):
        for key in ("loss", "clip_frac_low", "clip_frac_high", "advantage_abs_mean"):
            value = other[f"train/{key}"]
            assert row[f"train/{key}"] == pytest.approx(value, rel=1e-3, abs=1e-5), key


class Sparing(SymbolReward):
    """The opponent of the symbol: minus the root of its share."""

    range = (-1.0, 0.0)

    def score(self, **inputs: Any) -> Tensor:
        return -super().score(**inputs).sqrt()


def test_tokens_are_trained_with_it_in_whichever_chunks(tmp_path: Path) -> None:
    two = TOKEN.replace("{name: symbol}", "{name: symbol}, {name: sparing, weight: 0.7}")
    options = ["run.steps=3", "optim.epochs=2", "method.args.clip_low=0.005"]
    found = {}
    for how, more in {
        "whole": [SEPARATE],
        "cut": [SEPARATE, "compute.micro_batch_size=7"],
        "summed": ["method.args.reward_losses=summed"],
    }.items():
        trainer = toy_trainer(write_config(tmp_path / how, two), *options, *more)
        both = [("symbol", SymbolReward(), 1.0), ("sparing", Sparing(), 0.7)]
        trainer.rewards = RewardSet(both)
        assert trainer.run() == "finished"
        final = next((tmp_path / how / "runs/toy/final").rglob("*.safetensors"))
        found[how] = load_file(final)
    whole, cut, summed = found.values()
    assert largest_difference(whole, cut) < 1e-4 < 1e-3 < largest_difference(whole, summed)


def test_opposed_rewards_hold_a_decision_nearer_to_where_it_was_and_still_learn(
    tmp_path: Path,
) -> None:
    moved, gained = {}, {}
    for losses in ("summed", "separate"):
        folder = tmp_path / losses
        trained(
            folder, "run.steps=20", "optim.epochs=4", "optim.lr=0.01", "scoring.max_invalid=1",
            "method.args.clip_range=0.05", f"method.args.reward_losses={losses}",
        )  # fmt: skip
        steps = steps_of(folder)
        moved[losses] = sum(row["train/approx_kl"] for row in steps) / len(steps)
        rows = read_metrics(folder / "runs/toy/metrics.jsonl")
        before, after = (row["eval/score"] for row in rows if "eval/score" in row)
        gained[losses] = after - before
    # Measured: 0.30 times as far; a gain of 0.48, summed 0.69.
    assert moved["separate"] < 0.6 * moved["summed"]
    assert gained["separate"] > 0.2


def test_rewards_that_cancel_teach_once_the_ratio_has_left_the_bounds(tmp_path: Path) -> None:
    trainer = toy_trainer(
        write_config(tmp_path, OPPOSED), "optim.epochs=2", SEPARATE, "optim.lr=0.001"
    )
    batch = trainer.sampler(0)
    _, trajectory = trainer.policy.rollout(batch, trainer.method.plan(0))
    network, data = trainer.policy.weights.network, trajectory.decisions
    perturb(network, 0.1, seed=0)
    with torch.no_grad():
        new = trainer.policy.evaluate(trajectory, torch.arange(len(data.row))).log_prob
    ratio = torch.exp(new - data.old_log_prob)[data.mask]
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    trainer.learner.epochs = 1
    ones = torch.ones(len(batch))
    cancels = Judged(0 * ones, ones.bool(), -ones)
    result = trainer.learner.learn([Part(batch, trajectory)], lambda _: cancels)
    # min(r, 1.2) + min(-r, -.8): at most 0, and 0 within the bounds
    expected = -(ratio.clamp(max=1.2) - ratio.clamp(min=0.8)).mean()
    assert result.metrics["loss"] == pytest.approx(float(expected), rel=1e-4) and expected > 0
    assert result.metrics["grad_norm"] > 0
    without = Judged(0 * ones, ones.bool())
    assert trainer.learner.learn([Part(batch, trajectory)], lambda _: without).num_rows == 0


def test_a_group_without_an_advantage_has_one_of_neither_sign() -> None:
    # Groups: P = 2, M = -1; P = 1, M = -1; P = 0, M = -1; nothing.
    scores = Scores({"a": torch.zeros(4)}, {"a": 1.0}, torch.ones(4).bool())
    total, negative = torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([-1.0, -1.0, -1.0, 0.0])
    told = reward_metrics(scores, total, torch.arange(4), negative)
    assert told["train/zero_std_frac"] == 0.25 and told["train/advantage_abs_mean"] == 0.5
    assert reward_metrics(scores, total, torch.arange(4))["train/zero_std_frac"] == 0.5


@pytest.mark.parametrize("losses", ["summed", "separate"])
def test_a_group_whose_rewards_cancel_is_not_counted_as_equal(losses: str, tmp_path: Path) -> None:
    trainer = toy_trainer(
        write_config(tmp_path, OPPOSED), "run.steps=1", "optim.epochs=2",
        f"method.args.reward_losses={losses}",
    )  # fmt: skip
    trainer.rewards = RewardSet([("a", TargetReward(), 1.0), ("b", TargetReward(), -1.0)])
    trainer.run()
    (row,) = steps_of(tmp_path)
    assert row["train/advantage_abs_mean"] == 0
    assert row["train/zero_std_frac"] == (1 if losses == "summed" else 0)
    assert (row["perf/train_rows_per_image"] > 0) is (losses == "separate")


@pytest.mark.parametrize(
    ("rewards", "overrides", "message"),
    [
        ("{name: target}", ["optim.epochs=2"], "but target is the only reward with a weight"),
        (
            "{name: target}, {name: away, weight: 0}",
            ["optim.epochs=2"],
            "but target is the only reward with a weight other than 0; leave reward_losses out",
        ),
        (REWARDS, [], "with one update per rollout all ratios are 1 and nothing is clipped"),
        (REWARDS, ["method.args.reward_losses=seperate"], "seperate"),
        (
            REWARDS,
            ["method.name=flow_gdpo", "optim.epochs=2"],
            "reward_losses is not an argument of flow_gdpo",
        ),
    ],
)
def test_a_combination_in_which_it_means_nothing_is_refused(
    rewards: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    path = write_config(tmp_path, OPPOSED.replace(REWARDS, rewards))
    with pytest.raises(ConfigError, match=message):
        toy_trainer(path, SEPARATE, *overrides)
