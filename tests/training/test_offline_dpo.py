"""Flow-DPO on pairs of a data set: the loss of its oracle, behind the real trainer, without a draw.

Kills, among others: a network evaluation in the rollout; chosen and rejected exchanged; the image
of another pair; noise of its own for each of a pair; old taken for the reference; a reward, a
guidance or a file that cannot teach and is found out late.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import read_image
from torchvision.utils import save_image

from flowrl.build import build_parts
from flowrl.commands.check import network_evals
from flowrl.config import load_config
from flowrl.data.noise import sample_noise
from flowrl.data.pairs import load_pairs
from flowrl.data.sampler import GroupSampler
from flowrl.errors import ConfigError
from flowrl.functional.aggregate import aggregate
from flowrl.methods.forward import flow_dpo
from flowrl.policies.forward import ForwardPolicy
from flowrl.train.loop import Trainer
from flowrl.train.report import make_report
from flowrl.train.track import read_metrics
from flowrl.types import Chunk, Scores
from tests.methods import forward_oracles as oracles
from tests.policies.toy_flow import counted, make_policy, perturb
from tests.training.toy_pairs import write_pairs
from tests.training.toy_run import learn_from, toy_trainer, train_on_two, write_config

CONFIG = """
run: {{name: toy, steps: 6}}
model: {{pipeline: toy, id: toy}}
method: {{name: flow_dpo, args: {{num_draws: 4, scale: 10.0}}}}
data: {{train: {pairs}, num_groups: 12, group_size: 2}}
optim: {{lr: 0.01}}
compute: {{micro_batch_size: 48, rollout_batch_size: 64, decode_batch_size: 7}}
eval: {{data: toy, num_steps: 6, samples_per_prompt: 8, rewards: [{{name: target}}]}}
checkpoint: {{every: 1, keep: 2}}
"""


def config_in(folder: Path) -> Path:
    return write_config(folder, CONFIG.format(pairs=write_pairs(folder)))


def trainer_in(folder: Path, *overrides: str) -> Trainer:
    return toy_trainer(config_in(folder), *overrides)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "runs/toy/metrics.jsonl")
    return [row for row in rows if "train/loss" in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "runs/toy/final").rglob("*.safetensors")))


def test_loss_and_gradient_are_those_of_the_oracle(tmp_path: Path) -> None:
    method = flow_dpo(num_draws=2, scale=30.0)
    sampler = GroupSampler(
        load_pairs(write_pairs(tmp_path), where="toy"), num_groups=3, group_size=2,
        updates_per_rollout=1, seed=0, shuffle=True, rank=0, world_size=1,
    )  # fmt: skip
    batch = sampler(5)
    policy = ForwardPolicy(make_policy(with_reference=True))
    reference = copy.deepcopy(policy.weights.network)
    perturb(policy.weights.network, 0.05, seed=3)
    _, trajectory = policy.rollout(batch, method.plan(5))
    data = trajectory.decisions
    nobody = Scores({}, {}, torch.ones(6, dtype=torch.bool))
    sign = method.advantage(nobody, batch.group_id, None)
    index = torch.arange(12)
    with torch.no_grad(), policy.weights.use("reference"):
        frozen = policy.evaluate(trajectory, index)
    new = policy.evaluate(trajectory, index)
    values = method.objective(new, None, frozen, Chunk(data, sign[data.sample])).values
    loss = aggregate(values, data.mask, 12.0)

    def field(network: Any) -> oracles.Velocity:
        def velocity(x: torch.Tensor, sigma: float, sample: int) -> torch.Tensor:
            rows = policy.pipeline.encode([batch.prompts[sample].text])
            level = torch.tensor([sigma], dtype=torch.float64)
            return policy.pipeline.velocity(network, x[None], level, rows)[0]

        return velocity

    def draws(n: int) -> list[tuple[float, torch.Tensor]]:
        ids = batch.group_id[n : n + 1]  # a pair's noise is one
        noises = [
            sample_noise(batch.seed, ids, (2,), stream=1 + k, dtype=torch.float64)[0]
            for k in range(2)
        ]
        return list(zip(data.sigma[data.sample == n].tolist(), noises, strict=True))

    files = [batch.prompts[n].metadata[("chosen", "rejected")[n % 2]] for n in range(6)]
    points = [policy.pipeline.encode_images(read_image(str(tmp_path / f))[None] / 255)
              for f in files]  # fmt: skip
    expected = oracles.dpo_loss(
        field(policy.weights.network), field(reference), [p[0].double() for p in points],
        [draws(n) for n in range(6)], [(0, 1), (2, 3), (4, 5)], beta=30.0,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    network = list(policy.weights.network.parameters())
    ours, wanted = (torch.autograd.grad(each, network) for each in (loss, expected))
    assert max(float(g.abs().max()) for g in wanted) > 1e-3
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def test_the_rollout_is_the_data_and_takes_no_evaluation(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    batch, plan = trainer.sampler(3), trainer.method.plan(3)
    with counted(trainer.policy.weights.network) as count:
        rollout, trajectory = trainer.policy.rollout(batch, plan)
    assert (count.rows, rollout.network_evals) == (0, 0)
    assert network_evals(plan, 12, 2) == (0, 4 * 24)
    for n in range(24):
        name = batch.prompts[n].metadata["chosen" if n % 2 == 0 else "rejected"]
        assert torch.equal(rollout.images[n], read_image(str(tmp_path / name)) / 255)
    assert torch.equal(trajectory.x0, trainer.policy.pipeline.encode_images(rollout.images))
    sign = torch.tensor([1.0, -1.0]).repeat(12)
    with counted(trainer.policy.weights.network) as count:
        result = learn_from(trainer, trajectory, batch, sign, sign != 0)
    assert (result.num_rows, result.num_frozen_rows, count.rows) == (96, 96, 192)


@pytest.mark.parametrize("seed", [0, 1])
def test_flow_dpo_learns_the_toy_and_reports_without_a_reward(seed: int, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, "run.steps=25", f"run.seed={seed}", "checkpoint.every=0")
    assert trainer.run() == "finished"
    rows = read_metrics(tmp_path / "runs/toy/metrics.jsonl")
    before, after = (row["eval/score"] for row in rows if "eval/score" in row)
    assert (after - before) / (0.0 - before) > 0.3, (before, after)
    first, *_, last = steps_of(tmp_path)
    assert first["train/margin"] == 0 and last["train/margin"] > 0
    assert last["train/ranked_right"] > 0.7 and "train/reward_mean" not in last
    assert last["perf/nfe_per_image"] == 0 and last["perf/network_evals"] == 25 * 24 * 8
    assert make_report(tmp_path / "runs/toy").is_file()
    card = next((tmp_path / "runs/toy/final").glob("*.md")).read_text()
    assert "taught by its choices" in card


def test_resume_is_bitwise_and_chunks_change_nothing(tmp_path: Path) -> None:
    options = ["optim.updates_per_rollout=2", "optim.ema_decay=0.9"]
    whole, broken, cut = (tmp_path / name for name in ("whole", "broken", "cut"))
    trainer_in(whole, *options, "run.steps=4").run()
    trainer_in(broken, *options, "run.steps=2").run()
    trainer_in(broken, *options, "run.steps=4", "run.resume=latest").run()
    trainer_in(cut, *options, "run.steps=4", "compute.micro_batch_size=6").run()
    one, two, three = (weights_of(folder) for folder in (whole, broken, cut))
    assert all(one[name].equal(two[name]) for name in one)
    assert max(float((one[name] - three[name]).abs().max()) for name in one) < 1e-4


def test_one_and_two_processes_train_the_same_weights(tmp_path: Path) -> None:
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    settings = ["run.steps=3", "checkpoint.every=0", "optim.eps=1e-4"]  # as test_forward_training
    trainer_in(alone, *settings).run()
    train_on_two(config_in(pair), *settings)
    one, two = weights_of(alone), weights_of(pair)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    for row, other in zip(steps_of(alone), steps_of(pair), strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards=[{name: target}]", r"from no reward; move target from rewards to eval\.rewards"),
        ("model.guidance_scale=2.0", r"model\.guidance_scale=2 does not fit; set it to 1"),
        ("data.train=shapes/train", r"data\.train=shapes/train holds prompts alone"),
        ("data.group_size=3", r"data\.group_size=3; set data\.group_size=2"),
        ("compute.micro_batch_size=1", "compares 2 samples in one forward"),
        ("method={name: online_dpo}", "online_dpo has nothing to train on: rewards names no"),
    ],
)
def test_what_cannot_teach_is_refused_when_it_is_built(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_in(tmp_path, override)


def test_images_of_another_size_than_the_models_are_refused(tmp_path: Path) -> None:
    path = config_in(tmp_path)
    for file in (tmp_path / "dots").iterdir():
        save_image(torch.zeros(3, 8, 16), file)
    with pytest.raises(ConfigError, match=r"data\.train: .*\[B, 3, 16, 16\], got \[1, 3, 8, 16\]"):
        toy_trainer(path)


def test_the_real_build_refuses_before_a_model_is_loaded(tmp_path: Path) -> None:
    """`build_parts` asks the same questions, of a model that does not exist."""
    path = config_in(tmp_path)
    given = ["model.pipeline=sd3", "model.id=nowhere", "eval.data=shapes/heldout"]
    for override, message in (
        ("eval.rewards=null", r"no reward measures the run; name one in eval\.rewards"),
        ("rewards=[{name: shapes_strict}]", "and from no reward"),
        ("model.guidance_scale=4.5", "without guidance"),
        ("data.train=shapes/train", "holds prompts alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_parts(load_config(path, [*given, override]), "toy.yaml")
