"""`flowrl eval MODEL`: the trainer's held-out evaluation, of any model, on any prompts.

A run's folder is evaluated on what the run was, so the result is that of its last evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from flowrl.commands.models import Model, find_model, make_folder, open_policy
from flowrl.schema import EvalConfig, RewardConfig, ScoringConfig
from flowrl.sources import build_rewards, load_named_prompts
from flowrl.train.evaluate import Evaluation, Evaluator


def run(
    *,
    model: str,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    rewards: Sequence[str],
    out: Path | None,
) -> None:
    """Scores a model, prints the table, and writes scores and images into `out`.

    Args:
        model: MODEL as typed.
        options: fields of `Model`, None where not given.
        settings: fields of `EvalConfig`, None where not given.
        rewards: names; empty = the run's, or shapes_strict.
        out: the folder, or None.
    """
    spec = find_model(model, options, command="flowrl eval")
    plan = _settings(spec, settings, rewards)
    assert plan.rewards is not None
    prompts = load_named_prompts(plan.data, where="--data")[: plan.max_prompts]
    scoring = ScoringConfig() if spec.config is None else spec.config.scoring
    reward_set = build_rewards(plan.rewards, scoring, where="--reward")
    folder = None if out is None else make_folder(out)
    accelerator = Accelerator(mixed_precision=spec.mixed_precision)
    policy = open_policy(spec, [prompt.text for prompt in prompts], accelerator)
    evaluator = Evaluator(
        prompts=prompts,
        rewards=reward_set,
        weights="current",
        num_steps=spec.num_steps,
        guidance_scale=spec.guidance_scale,
        samples_per_prompt=plan.samples_per_prompt,
        seed=plan.seed,
        num_shown=len(prompts) * plan.samples_per_prompt if folder else 1,
    )
    result = evaluator(policy, accelerator, step=spec.step, folder=folder)
    if accelerator.is_main_process:
        console = Console(highlight=False, soft_wrap=True, markup=False)
        console.print(spec.describe())
        samples = len(prompts) * plan.samples_per_prompt
        console.print(table(result, title=f"{samples} samples of {plan.data}, seed {plan.seed}"))
        if folder is not None:
            console.print(str(_write_model(spec, folder)))


def table(result: Evaluation, *, title: str) -> Table:
    """Score, skills, rewards and diversity, a row each."""
    rows = Table("", "mean", title=title, title_justify="left", title_style="bold")
    names = {"eval/score": "score", "eval/diversity": "diversity"}
    for key, value in sorted(result.metrics.items(), key=lambda item: _rank(item[0])):
        name = key.removeprefix("eval/").removesuffix("/mean")
        rows.add_row(names.get(key, name.replace("skill/", "skill ")), f"{value:.3f}")
    return rows


def _rank(key: str) -> int:
    """Where a metric stands in the table."""
    if key == "eval/score":
        return 0
    return 1 if key.startswith("eval/skill/") else 3 if key == "eval/diversity" else 2


def _settings(spec: Model, given: Mapping[str, Any], rewards: Sequence[str]) -> EvalConfig:
    """What is measured: the run's own settings where there is a run, under what was given."""
    base = EvalConfig(num_steps=spec.num_steps) if spec.config is None else spec.config.eval
    chosen = tuple(RewardConfig(name=name) for name in rewards) or base.rewards
    if chosen is None:
        default = (RewardConfig(name="shapes_strict"),)
        chosen = default if spec.config is None else spec.config.rewards
    update = {key: value for key, value in given.items() if value is not None}
    return base.model_copy(update=update | {"rewards": chosen})


def _write_model(spec: Model, folder: Path) -> Path:
    """Writes what was evaluated beside the scores; returns the file of the scores."""
    described = {k: v for k, v in asdict(spec).items() if k not in ("config", "where")}
    text = json.dumps(described, indent=1, default=str)
    (folder / "model.json").write_text(text, encoding="utf-8")
    return folder / f"step_{spec.step:06d}.json"
