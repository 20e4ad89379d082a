"""What stops a run, and what must not: broken numbers, failed rewards, a fickle model.

Kills: a NaN reward taken for 0; an update after a non-finite loss; the first-pass check left out;
an invalid sample in the denominator or the statistics.
"""

import json

import pytest
import torch

from flowrl.errors import FlowrlError, RatioError
from flowrl.toys import TargetReward
from flowrl.train.scoring import RewardSet
from flowrl.train.track import read_metrics
from tests.training.toy_run import FLOW, learn_from, toy_trainer, write_config


class Flaky(TargetReward):
    """Cannot score a third of the samples."""

    def score(self, **inputs):
        values = super().score(**inputs)
        values[::3] = float("nan")
        return values


def test_samples_without_a_reward_are_masked_counted_and_never_zero(tmp_path):
    trainer = toy_trainer(write_config(tmp_path, FLOW), "run.steps=2")
    trainer.rewards = RewardSet([("target", Flaky(), 1.0)])
    trainer.run()
    rows = read_metrics(tmp_path / "runs/toy/metrics.jsonl")
    steps = [row for row in rows if "train/loss" in row]
    samples, trained_steps = 64, 5
    for row in steps:
        invalid = round(row["train/invalid_frac"] * samples)
        assert invalid == 22
        assert row["train/num_decisions"] == (samples - invalid) * trained_steps
        assert row["train/reward_mean"] < -0.5  # a zero would be the best score of this reward


def test_a_sample_without_a_reward_gets_no_gradient(tmp_path):
    trainer = toy_trainer(write_config(tmp_path, FLOW))
    batch, plan = trainer.sampler(0), trainer.method.plan(0)
    _, trajectory = trainer.policy.rollout(batch, plan)
    valid = torch.zeros(len(batch), dtype=torch.bool)
    before = [p.clone() for p in trainer.policy.weights.trainable()]
    result = learn_from(trainer, trajectory, batch, torch.ones(len(batch)), valid)
    assert result.num_decisions == 0
    after = list(trainer.policy.weights.trainable())
    assert all(one.equal(two) for one, two in zip(before, after, strict=True))


def test_exploding_run_stops_with_one_error_and_keeps_its_checkpoint(tmp_path):
    trainer = toy_trainer(write_config(tmp_path, FLOW), "run.steps=5", "optim.lr=1.0e+30")
    with pytest.raises(FlowrlError):
        trainer.run()
    folder = tmp_path / "runs/toy"
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and status["reason"]
    assert list((folder / "checkpoints").glob("step_*"))


def test_nonfinite_loss_stops_before_the_update(tmp_path):
    trainer = toy_trainer(write_config(tmp_path, FLOW))
    batch, plan = trainer.sampler(0), trainer.method.plan(0)
    _, trajectory = trainer.policy.rollout(batch, plan)
    advantages = torch.ones(len(batch))
    advantages[5] = float("inf")
    before = [p.clone() for p in trainer.policy.weights.trainable()]
    with pytest.raises(FlowrlError, match="advantage"):
        learn_from(trainer, trajectory, batch, advantages, torch.ones(len(batch), dtype=torch.bool))
    after = list(trainer.policy.weights.trainable())
    assert all(one.equal(two) for one, two in zip(before, after, strict=True))


def test_a_network_that_answers_differently_twice_is_refused(tmp_path):
    trainer = toy_trainer(write_config(tmp_path, FLOW))
    network = trainer.policy.weights.network
    torch.nn.init.normal_(network.leave.weight, generator=torch.Generator().manual_seed(0))
    network.leave = torch.nn.Sequential(network.leave, torch.nn.Dropout(0.1)).train()
    with pytest.raises(RatioError, match="recompute_old_log_prob"):
        trainer.run()
    assert not list((tmp_path / "runs/toy/checkpoints").glob("step_*"))


def test_time_limit_stops_evaluates_and_exports(tmp_path):
    trainer = toy_trainer(write_config(tmp_path, FLOW), "run.steps=500", "run.max_minutes=0.001")
    assert trainer.run() == "stopped"
    folder = tmp_path / "runs/toy"
    status = json.loads((folder / "status.json").read_text())
    assert 0 < status["step"] < 500 and "max_minutes" in status["reason"]
    rows = read_metrics(folder / "metrics.jsonl")
    assert rows[-1]["step"] == status["step"] and "eval/score" in rows[-1]
    assert any((folder / "final").rglob("*.safetensors"))
