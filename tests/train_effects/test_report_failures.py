"""What rewards lost is kept with its reasons, survives a resume, and is told by the report.

Kills, among others: a reason that only the terminal saw; the failure that ended a run, which no
metric has; rows of an abandoned continuation; a share over the logged steps alone; a page that says
"no sample lost" of a run that lost some.
"""

from __future__ import annotations

import json

import pytest
import torch

from flowrl.errors import RewardError
from flowrl.toys import TargetReward
from flowrl.train import failures
from flowrl.train.attempts import Patience
from flowrl.train.collect import lost
from flowrl.train.report import make_report
from flowrl.train.runfiles import read_run
from flowrl.train.scoring import RewardSet
from flowrl.train.track import FAILURES
from flowrl.types import Failures
from tests.train_effects.test_report import Balance, words
from tests.training.toy_run import FLOW, toy_trainer, write_config

NAN = float("nan")


def text_of(run):
    page = make_report(run).read_text(encoding="utf-8")
    Balance(page)
    return words(page)


def write_rows(run, *rows):
    base = {"where": "training", "reward": "clip", "lost": 0, "of": 20, "unanswered": 0, "calls": 0,
            "reason": ""}  # fmt: skip
    lines = [json.dumps(base | row) + "\n" for row in rows]
    (run / FAILURES).write_text("".join(lines))


def test_every_loss_has_a_row_with_its_counts_and_the_last_reason() -> None:
    rewards = {
        "clip": torch.tensor([1.0, NAN, NAN, NAN]),
        "cured": torch.ones(4),
        "fine": torch.zeros(4),
        "says_nan": torch.tensor([NAN, 1, 1, 1]),
    }
    ranks = [
        {"clip": Failures(2, 1, "first rank"), "cured": Failures(1, 0, "once")},
        {"clip": Failures(3, 1, "second rank")},
        {},
    ]
    row = {"of": 4, "unanswered": 0, "calls": 0, "reason": ""}
    assert lost(rewards, ranks) == [
        row | {"reward": "clip", "lost": 3, "unanswered": 2, "calls": 5, "reason": "second rank"},
        row | {"reward": "cured", "lost": 0, "calls": 1, "reason": "once"},
        row | {"reward": "says_nan", "lost": 1},
    ]


# --------------------------------------------------------------------------- a run


class Failing(TargetReward):
    """Raises in training when a step, counted by its calls, is among `steps`."""

    def __init__(self, *steps):
        self.steps, self.calls = steps, 0

    def score(self, **inputs):
        values = super().score(**inputs)
        if len(values) == 64:  # neither the probe nor a half
            self.calls += 1
            if self.calls in self.steps:
                raise OSError(f"disk of call {self.calls} is gone")
        values[:2] = NAN
        return values


def trainer_of(tmp_path, reward, *overrides, retries=0):
    trainer = toy_trainer(write_config(tmp_path, FLOW), *overrides)
    patience = Patience(retries=retries, backoff_s=0)
    trainer.rewards = RewardSet([("target", reward, 1.0)], patience=patience)
    return trainer


def rows_of(tmp_path):
    lines = (tmp_path / "runs/toy" / FAILURES).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_keeps_its_failures_with_the_steps_that_are_not_logged(tmp_path):
    trainer = trainer_of(
        tmp_path, Failing(2), "run.steps=3", "track.log_every=3", "scoring.max_invalid=0.5"
    )
    trainer.run()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["lost"] for row in rows] == [2, 4, 2] and {row["of"] for row in rows} == {64}
    assert [row["calls"] for row in rows] == [0, 1, 0]
    assert [row["reason"] for row in rows] == ["", "OSError: disk of call 2 is gone", ""]
    text = text_of(tmp_path / "runs/toy")
    # Two of each half of the second step; 8 of 192.
    assert "target training 8 of 192 4.2 % 1 it returned NaN or infinity (step 3)" in text


def test_the_failure_that_ends_a_run_is_kept(tmp_path):
    class Gone(TargetReward):
        def score(self, **inputs):
            if len(inputs["images"]) == 64:
                raise ConnectionError("nobody there")
            return super().score(**inputs)

    trainer = trainer_of(tmp_path, Gone(), "scoring.max_invalid=0.01")
    with pytest.raises(RewardError, match="nobody there"):
        trainer.run()
    (row,) = rows_of(tmp_path)
    assert (row["step"], row["lost"], row["unanswered"], row["calls"]) == (1, 64, 64, 1)
    text = text_of(tmp_path / "runs/toy")
    assert "64 of 64 100.0 % 1 ConnectionError: nobody there (step 1)" in text


def test_a_resume_goes_on_and_drops_the_abandoned_continuation(tmp_path):
    reward = ["scoring.max_invalid=0.5", "checkpoint.every=2", "checkpoint.keep=5"]
    trainer_of(tmp_path, Failing(1, 4), "run.steps=4", *reward).run()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    (tmp_path / "runs/toy/checkpoints/step_000004").rename(tmp_path / "elsewhere")
    trainer_of(tmp_path, Failing(), "run.steps=4", "run.resume=latest", *reward).run()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [bool(row["reason"]) for row in rows] == [True, False, False, False]


def test_what_the_held_out_samples_lose_is_kept(tmp_path):
    class Never(TargetReward):
        def score(self, **inputs):
            raise ConnectionError("not today")

    trainer = toy_trainer(write_config(tmp_path, FLOW), "run.steps=1")
    held_out = RewardSet([("target", Never(), 1.0)], patience=Patience(retries=0))
    object.__setattr__(trainer.evaluator, "rewards", held_out)
    trainer.run()
    rows = rows_of(tmp_path)
    assert [(row["step"], row["where"]) for row in rows] == [(0, "evaluation"), (1, "evaluation")]
    text = text_of(tmp_path / "runs/toy")
    num = rows[0]["of"]
    assert f"target held-out {2 * num} of {2 * num} 100.0 % 2 ConnectionError: not today" in text


# --------------------------------------------------------------------------- the page


def test_a_run_without_failures_has_one_line(run):
    log(run, {step: (0.0, 0) for step in range(1, 7)})
    text = text_of(run)
    assert "No sample lost: every call of a reward was answered" in text
    assert "Rewards that failed" not in text


def test_a_run_that_scored_nothing_says_nothing_of_it(run):
    assert failures.section(read_run(run)) is None
    assert "No sample lost" not in text_of(run)


def log(run, steps):
    """Gives the logged steps an invalid share and failed calls of the reward "clip"."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "train/loss" in row and row["step"] in steps:
            share, calls = steps[row["step"]]
            row |= {"reward/clip/invalid_frac": share, "reward/clip/failed_calls": calls}
            row["train/invalid_frac"] = share
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_failures_are_a_table_and_two_curves(run):
    log(run, {1: (0.0, 0), 2: (0.25, 3), 3: (0.0, 0), 4: (0.0, 0), 5: (0.05, 0), 6: (0.0, 2)})
    write_rows(
        run,
        {"step": 2, "lost": 5, "unanswered": 5, "calls": 3, "reason": "OSError: <disk>"},
        {"step": 5, "lost": 1},
        {"step": 6, "calls": 2, "reason": "TimeoutError: slow"},
    )
    text = text_of(run)
    assert "Rewards that failed A sample without a score is masked and counted" in text
    assert "5.0 % of the samples of the logged steps were not trained on" in text
    assert "clip training 6 of 120 5.0 % 5 TimeoutError: slow (step 6)" in text
    assert "No sample lost" not in text
    found = failures.section(read_run(run))
    assert [panel["title"] for panel in found["panels"]] == [
        "Samples without a score",
        "Failed calls",
    ]
    assert all(panel["svg"] for panel in found["panels"])
    (history,) = failures.histories(read_run(run))
    assert history.shares == {1: 0, 2: 0.25, 3: 0, 4: 0, 5: 0.05, 6: 0}
    assert history.calls == {1: 0, 2: 3, 3: 0, 4: 0, 5: 0, 6: 2}


def test_calls_that_were_cured_lost_nothing(run):
    log(run, {1: (0.0, 2)})
    write_rows(run, {"step": 1, "calls": 2, "reason": "OSError: & once"})
    text = text_of(run)
    assert "No sample lost: the calls that failed were made again, or in halves" in text
    assert "clip training 0 of 120 0.0 % 2 OSError: & once (step 1)" in text


def test_both_kinds_of_loss_are_named(run):
    row = {"step": 1, "lost": 3, "unanswered": 1, "calls": 2, "reason": "OSError: x"}
    write_rows(run, row)
    assert "OSError: x; it returned NaN or infinity (step 1)" in text_of(run)


def test_a_run_of_an_older_version_has_shares_without_reasons(run):
    log(run, {2: (0.3, 1), 4: (0.0, 0)})
    text = text_of(run)
    assert "clip training – 15.0 % 1 not kept: the run is of an older version" in text


def test_a_damaged_line_is_named_and_the_rest_is_shown(run):
    write_rows(run, {"step": 1, "calls": 2, "reason": "OSError: once"})
    with (run / FAILURES).open("a") as stream:
        stream.write('{"step": 2, "whe')
    text = text_of(run)
    assert "OSError: once" in text and "Lines of failures.jsonl that could not be read" in text


def test_a_small_share_is_not_none() -> None:
    assert [failures.percent(x) for x in (0.0, 1e-6, 0.0005, 0.5)] == [
        "0.0 %", "under 0.1 %", "0.1 %", "50.0 %"
    ]  # fmt: skip
