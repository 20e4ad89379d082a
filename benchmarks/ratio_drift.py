"""How far the ratio drifts when a rollout is learnt from more than once: plain against RatioNorm.

`python benchmarks/ratio_drift.py [--quick] [key=value ...]` draws two rollouts of Flow-GRPO with
the quick start's LoRA, makes `UPDATES` updates on the first, and scores the decisions of the
second, as an update scores groups that come later (those learnt from lean to their own noise).

GRPO-Guard (arXiv:2510.22319) says: the mean of the plain ratio falls below 1 and its spread differs
from step to step, so one clip range acts at some steps and on one side; RatioNorm centres it. What
is left is mean((mean - old_mean) * noise): as wide as the transition's mean moved, so proportional
to -dt, which the method's weights 1 / -dt make up for (last column), and to how far the velocity
itself moved, which nothing makes up for. The last line is without that: an equal move everywhere.

A ratio spreads as 1 / sqrt(dims), so both clip ranges are the published ones times sqrt(65,536 / D)
and the plain ratio's bias, in units of its spread, is smaller here by that factor.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowrl.build import build_parts, build_trainer
from flowrl.config import load_config
from flowrl.methods.guarded import inverse_dt_steps
from flowrl.methods.objectives import density_log_ratio, normalized_log_ratio
from flowrl.methods.spec import transition_scales
from flowrl.policies.flow import FlowPolicy
from flowrl.policies.trajectory import FlowTrajectory
from flowrl.train.judge import Judge
from flowrl.train.lessons import Part

UPDATES, ROWS = 4, 48
CLIPS = {"plain": 1e-4, "RatioNorm": 2e-6}  # published, for SD3.5 at 512 px:
PUBLISHED_DIMS = 65_536
CONFIG = Path(__file__).parent.parent / "configs/quickstart.yaml"


def main() -> None:
    """Prints the ratios' statistics per sampler step, before and after the updates."""
    is_quick = "--quick" in sys.argv[1:]
    given = [word for word in sys.argv[1:] if word != "--quick"]
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "method": "{name: flow_grpo, args: {num_steps: 10}}",
            "data.num_groups": UPDATES if is_quick else 24,
            "optim.updates_per_rollout": UPDATES,
            "run.output_dir": folder,
            "eval.max_prompts": 1,
        } | dict(word.split("=", 1) for word in given)
        config = load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])
        parts = build_parts(config, where=CONFIG.name)
        trainer = build_trainer(parts, Path(folder))
    policy, learner = parts.policy, trainer.learner
    if not isinstance(policy, FlowPolicy):
        raise SystemExit("the ratio of log-probs belongs to a flow policy with stochastic steps")
    plan = replace(parts.method.plan(0), store_mean=True)  # for RatioNorm; the rollout is the same

    def drawn(step: int) -> tuple[FlowTrajectory, Part, Judge]:
        batch = parts.sampler(step)
        rollout, trajectory = policy.rollout(batch, plan)
        part = Part(batch, trajectory)
        scores = parts.rewards.score(batch, images=rollout.images)
        judge = Judge(parts.method, trainer.collect, 0, [part], [lambda: scores], by_part=False)
        return trajectory, part, judge

    (_, learnt, judge), (scored, part, judge_next) = drawn(0), drawn(1)
    advantages = judge_next(0).advantages
    print(f"{len(part.batch)} images, {len(scored.decisions.row)} decisions; before the updates "
          f"|ratio - 1| <= {learner.first_ratio_deviation(scored):.1e}")  # fmt: skip
    learner.learn([learnt], judge)
    print(f"after {learner.num_updates} updates on as many others:")
    report(policy, scored, advantages)


def report(policy: FlowPolicy, trajectory: FlowTrajectory, advantages: Tensor) -> None:
    """The table and the three lines below it."""
    data = trajectory.decisions
    ratios = log_ratios(policy, trajectory)
    advantage = advantages[data.sample]
    scale = math.sqrt(PUBLISHED_DIMS / math.prod(policy.pipeline.latent_shape))
    clips = {name: scale * clip for name, clip in CLIPS.items()}
    plan, sigmas = trajectory.plan, trajectory.sigmas
    weight = inverse_dt_steps(plan, sigmas)
    means: dict[str, list[float]] = {name: [] for name in ratios}
    spreads: dict[str, list[float]] = {name: [] for name in (*ratios, "RatioNorm / -dt")}
    print("clipped: share beyond " + ", ".join(f"1 +- {clips[n]:.2g} ({n})" for n in clips)
          + " of advantages > 0, < 0\n")  # fmt: skip
    head = f"{'mean - 1':>11}{'std of log':>11}{'bias/std':>9}{'clipped > 0, < 0':>18}"
    print(f"{'':12}" + "".join(f"{name:>49}" for name in ratios))
    print(f"{'step':4}{'sigma':>8}" + head * 2 + f"{'std / -dt':>11}")
    for step in plan.trained:
        here = (data.step == step) & data.mask
        line = f"{step:4}{float(sigmas[step]):8.3f}"
        for name, values in ratios.items():
            change, clip = values[here], clips[name]
            spread, bias = float(change.std()), float(change.mean())
            excess = float(change.expm1().mean())
            high = (change.expm1() > clip)[advantage[here] > 0].double().mean()
            low = (change.expm1() < -clip)[advantage[here] < 0].double().mean()
            means[name].append(abs(excess))
            spreads[name].append(spread)
            line += f"{excess:11.1e}{spread:11.1e}{bias / spread:9.2f}{high:10.2f}{low:8.2f}"
        spreads["RatioNorm / -dt"].append(spread * float(weight[step]))
        print(line + f"{spreads['RatioNorm / -dt'][-1]:11.1e}")
    print("\nmax |mean - 1|:  " + ", ".join(f"{n} {max(v):.1e}" for n, v in means.items()))
    print("max / min std:   " + ", ".join(f"{n} {max(v) / min(v):.1f}" for n, v in spreads.items()))
    slope, std = (each[list(plan.trained)] for each in transition_scales(plan, sigmas))
    factors = (slope.abs() / std, slope.abs(), slope.abs() * weight[list(plan.trained)])
    alone = [f"{n} {float(v.max() / v.min()):.1f}" for n, v in zip(spreads, factors, strict=True)]
    print("by the kernel:   " + ", ".join(alone))


@torch.no_grad()
def log_ratios(policy: FlowPolicy, trajectory: FlowTrajectory) -> dict[str, Tensor]:
    """Log-ratios [E] of all decisions, in float64, as the two methods compute them."""
    data = trajectory.decisions
    plain, normalized = [], []
    for index in torch.arange(len(data.row)).split(ROWS):
        new, part = policy.evaluate(trajectory, index), data.select(index)
        part = part.to(policy.device)
        plain.append(density_log_ratio(new, part).double().cpu())
        normalized.append(normalized_log_ratio(new, part).double().cpu())
    return {"plain": torch.cat(plain), "RatioNorm": torch.cat(normalized)}


if __name__ == "__main__":
    main()
