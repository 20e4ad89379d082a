"""What must not change a run: chunks, micro-batches, the number of processes, evaluation, tracking.

Kills: a mean over a chunk instead of the global denominator; DDP's average not undone; noise by
rank; a shared generator that evaluation advances; a KL or an advantage per rank.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.errors import ConfigError
from flowrl.train.track import read_metrics
from tests.training.toy_run import FLOW, TOKEN, TREE, toy_trainer, train_on_two, write_config

SHORT = ["run.steps=3", "optim.updates_per_rollout=2"]
WITH_KL = "method.args.kl_coef=0.05"
PAIRS = (  # a reward of the whole group: each sample judged against every other
    FLOW.replace("flow_grpo", "pref_grpo")
    .replace(", advantage_std: group", ", shared_noise: false")
    .replace("{name: target}", "{name: win_rate, args: {judge: target}}")
)
KINDS = {"flow": FLOW, "token": TOKEN, "tree": TREE, "pairs": PAIRS}
EVERY = pytest.mark.parametrize("text", KINDS.values(), ids=KINDS)


def short(text: str) -> list[str]:
    return [*SHORT, WITH_KL] if text in (FLOW, TOKEN) else SHORT


def trained(folder: Path, text: str, *overrides: str) -> dict[str, torch.Tensor]:
    toy_trainer(write_config(folder, text), *short(text), *overrides).run()
    return load_file(next((folder / "runs/toy/final").rglob("*.safetensors")))


def largest_difference(one: dict, two: dict) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


# Adam divides by the gradient's size, so a rounding of 1e-7 in a tiny gradient moves a weight by a
# visible part of lr = 0.01 per update; plain rounding stays far below 1 % of one update.
ROUNDING = 1e-4


@EVERY
def test_result_does_not_depend_on_chunks(text, tmp_path):
    whole = trained(tmp_path / "whole", text)
    small = ["compute.micro_batch_size=7", "compute.rollout_batch_size=5"]
    cut = trained(tmp_path / "cut", text, *small, "compute.decode_batch_size=3")
    assert largest_difference(whole, trained(tmp_path / "seed", text, "run.seed=1")) > 0
    assert largest_difference(whole, cut) < ROUNDING


@EVERY
def test_one_and_two_processes_train_the_same_weights(text, tmp_path):
    alone = trained(tmp_path / "alone", text)
    train_on_two(write_config(tmp_path / "pair", text), *short(text))
    pair = load_file(next((tmp_path / "pair/runs/toy/final").rglob("*.safetensors")))
    assert largest_difference(alone, pair) < ROUNDING
    one, two = (read_metrics(tmp_path / f"{n}/runs/toy/metrics.jsonl") for n in ("alone", "pair"))
    for row, other in zip(one, two, strict=True):
        for key in row.keys() - {"time"}:
            if not key.startswith(("perf/step", "perf/roll", "perf/dec", "perf/rew", "perf/tr",
                                   "perf/max", "perf/images")):  # fmt: skip
                assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("text", [FLOW, TREE], ids=["flow", "tree"])
def test_two_processes_learn_the_same_part_by_part(text, tmp_path):
    alone = trained(tmp_path / "alone", text)
    config = write_config(tmp_path / "pair", text)
    train_on_two(config, *short(text), "scoring.parts=2")
    pair = load_file(next((tmp_path / "pair/runs/toy/final").rglob("*.safetensors")))
    assert largest_difference(alone, pair) < ROUNDING


def test_evaluation_and_images_do_not_change_training(tmp_path):
    quiet = trained(tmp_path / "quiet", FLOW)
    busy = trained(
        tmp_path / "busy", FLOW, "eval.every=1", "eval.seed=7", "track.image_every=1",
        "checkpoint.every=0",
    )  # fmt: skip
    assert largest_difference(quiet, busy) == 0


def test_groups_that_do_not_fit_the_tree_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"takes 4 samples .* set data\.group_size=4"):
        toy_trainer(write_config(tmp_path, TREE), "data.group_size=8")
