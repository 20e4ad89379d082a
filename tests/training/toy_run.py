"""The two toys behind the real trainer: `python toy_run.py CONFIG [key=value ...]` is one run.

Also imported by the tests beside it. Everything but the pipeline is built by `flowrl.build`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl import build
from flowrl.commands.train import prepare_folder
from flowrl.config import Config, load_config
from flowrl.data.pairs import load_pairs
from flowrl.policies.flow import FlowPolicy, guidance_rows
from flowrl.policies.forward import ForwardPolicy
from flowrl.policies.neighbors import NeighborPolicy
from flowrl.policies.token import TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.toys import (
    TARGETS,
    SymbolReward,
    TargetReward,
    ToyFlowPipeline,
    ToyTokenPipeline,
    dot_position,
    flow_prompts,
    token_prompts,
)
from flowrl.train.lessons import Judged, Part
from flowrl.train.loop import Trainer
from flowrl.train.machine import end_training
from flowrl.train.scoring import RewardSet
from flowrl.train.step import StepResult
from flowrl.types import PromptBatch
from rewards.pairwise import PointwiseJudge, WinRate

ROOT = Path(__file__).resolve().parents[2]
FLOW = """
run: {name: toy, steps: 6}
model: {pipeline: toy, id: toy}
method: {name: flow_grpo, args: {num_steps: 6, clip_range: 0.2, advantage_std: group}}
data: {train: toy, num_groups: 4, group_size: 16}
rewards: [{name: target}]
optim: {lr: 0.01}
compute: {micro_batch_size: 96, rollout_batch_size: 64, decode_batch_size: 64}
eval: {data: toy, num_steps: 6, samples_per_prompt: 8}
checkpoint: {every: 1, keep: 2}
"""

TREE = """
run: {name: toy, steps: 6}
model: {pipeline: toy, id: toy}
method:
  name: branch_grpo
  args: {num_steps: 6, splits: [0, 2], fusion: path_prob, width_pruning: parent_top1,
         clip_range: 0.2}
data: {train: toy, num_groups: 8, group_size: 4}
rewards: [{name: target}]
optim: {lr: 0.01}
compute: {micro_batch_size: 96, rollout_batch_size: 64, decode_batch_size: 64}
eval: {data: toy, num_steps: 6, samples_per_prompt: 8}
checkpoint: {every: 1, keep: 2}
"""

TOKEN = """
run: {name: toy, steps: 6}
model: {pipeline: toy, id: toy}
method: {name: grpo}
data: {train: toy, num_groups: 4, group_size: 16}
rewards: [{name: symbol}]
optim: {lr: 0.01}
compute: {micro_batch_size: 32, rollout_batch_size: 64, decode_batch_size: 64}
eval: {data: toy, num_steps: 1, samples_per_prompt: 2}
checkpoint: {every: 1, keep: 2}
"""


class Halfway(TargetReward):
    """A gold to the target's proxy: minus how far a dot is from half its way, so it peaks."""

    def score(self, *, images, prompts):
        halves = torch.tensor([TARGETS[text] for text in prompts]) / 2
        return -(dot_position(images) - halves).norm(dim=1)


class Away(TargetReward):
    """The opponent of the target: minus the distance from the point opposite to it.

    It cannot see a dot that is far out.
    """

    def score(self, *, images, prompts):
        dots = dot_position(images)
        opposite = -torch.tensor([TARGETS[text] for text in prompts])
        return torch.where(dots.norm(dim=1) < 1.1, -(dots - opposite).norm(dim=1), torch.nan)


def write_config(folder: Path, text: str) -> Path:
    """A config file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy.yaml"
    path.write_text(text)
    return path


def toy_parts(config: Config) -> build.Parts:
    """Parts of a run on the toy that the method's kind of policy asks for."""
    method = build.build_method(config, "toy.yaml")
    rows = guidance_rows(ToyFlowPipeline, config.model.guidance_scale)
    build.check_teacher(method, config, "toy.yaml", rows)
    accelerator = build.build_accelerator(config)
    is_flow = method.policy != "token"
    pipeline: Any = ToyFlowPipeline(width=32) if is_flow else ToyTokenPipeline(width=24)
    weights = FullWeights(
        pipeline.network,
        with_reference=build.needs_reference(config, method),
        ema_decay=config.optim.ema_decay,
        with_old=method.old_decay is not None,
    )
    shared = {
        "rollout_batch_size": config.compute.rollout_batch_size,
        "decode_batch_size": config.compute.decode_batch_size,
        "device": accelerator.device,
    }
    policy: Any = (
        FlowPolicy(pipeline, weights, guidance_scale=config.model.guidance_scale, **shared)
        if is_flow
        else TokenPolicy(pipeline, weights, **shared)
    )
    if method.policy == "forward":
        policy = ForwardPolicy(policy)
    if method.policy == "neighbor":
        policy = NeighborPolicy(policy)
    prompts = flow_prompts() if is_flow else token_prompts()[:4]
    train = prompts
    if method.takes_pairs:
        train = load_pairs(config.data.train, where="toy.yaml: data.train")
        build.check_size(pipeline, train, "toy.yaml")
    measured = RewardSet(
        [("target", TargetReward(), 1.0) if is_flow else ("symbol", SymbolReward(), 1.0)]
    )
    trained = RewardSet([]) if method.takes_pairs else measured
    if config.monitor.reward == "halfway":
        measured = RewardSet([("target", TargetReward(), 1.0), ("halfway", Halfway(), 0.0)])
    if [reward.name for reward in config.rewards] == ["win_rate"]:
        trained = RewardSet([("win_rate", WinRate(judge=PointwiseJudge(TargetReward())), 1.0)])
    if "away" in [reward.name for reward in config.rewards]:
        toys = {"target": TargetReward(), "away": Away(), "halfway": Halfway()}
        trained = RewardSet([(r.label, toys[r.label], r.weight) for r in config.rewards])
    sampler = build.build_sampler(config, train, accelerator)
    build.check_groups(method, sampler, "toy.yaml")
    build.check_compute(method, config, "toy.yaml", rows)
    return build.Parts(
        config, accelerator, method, policy, trained, measured, train, prompts, sampler
    )


def toy_trainer(path: Path, *overrides: str) -> Trainer:
    """A trainer in the folder of its config."""
    config = load_config(path, [f"run.output_dir={path.parent / 'runs'}", *overrides])
    parts = toy_parts(config)
    folder = build.run_folder(config)
    if parts.accelerator.is_main_process:
        prepare_folder(parts, folder)
    parts.accelerator.wait_for_everyone()
    return build.build_trainer(parts, folder)


def learn_from(
    trainer: Trainer, trajectory: Any, batch: PromptBatch, advantages: Tensor, valid: Tensor
) -> StepResult:
    """The updates of a step whose advantages are given."""
    judged = Judged(advantages, valid)
    return trainer.learner.learn([Part(batch, trajectory)], lambda _: judged)


def train_on_two(config: Path, *overrides: str) -> None:
    """The run of a config on two gloo processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        __file__, str(config), *overrides,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    trainer = toy_trainer(Path(sys.argv[1]), *sys.argv[2:])
    outcome = trainer.run()
    end_training(trainer.accelerator)
    sys.exit(130 if outcome == "interrupted" else 0)
