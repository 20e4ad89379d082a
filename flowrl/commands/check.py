"""`flowrl check CONFIG`: builds everything, prints what would run and what it costs, and stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.config import load_config

if TYPE_CHECKING:
    from flowrl.build import Parts
    from flowrl.methods.forward_plan import ForwardPlan, NeighborPlan
    from flowrl.methods.spec import StepPlan

_FROZEN = ("old", "reference")


def run(config: Path, overrides: Sequence[str]) -> None:
    """Prints the composed method, batch arithmetic, rewards and estimated cost."""
    loaded = load_config(config, overrides)  # before torch is loaded: a typo answers at once
    from rich.console import Console

    from flowrl.build import build_parts

    parts = build_parts(loaded, where=config.name)
    if parts.accelerator.is_main_process:
        print_parts(parts)
        Console().print(f"{config}: everything fits together", highlight=False)


def print_parts(parts: Parts) -> None:
    """Tables: method, batch, rewards, cost."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in (
        ("Method", parts.method.describe()),
        ("Batch", parts.sampler.describe()),
        ("Rewards", reward_rows(parts)),
        ("Cost of a training step", estimate(parts)),
    ):
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(name, text)
        console.print(table)


def reward_rows(parts: Parts) -> list[tuple[str, str]]:
    """Rows (reward, role): trained on or a monitor, measured where, and which one guards."""
    monitor, measured = parts.config.monitor, parts.eval_rewards.names
    own = dict(parts.rewards.describe())
    rows = dict(parts.eval_rewards.describe()) | own
    said = []
    for name, text in rows.items():
        role, _, takes = text.partition("; ")
        role = f"trained on, {role}" if name in parts.rewards.weights else "monitor"
        places = [("rollouts", name in own), ("held-out prompts", name in measured)]
        role += f", on {' and '.join(place for place, is_there in places if is_there)}"
        if name == monitor.reward:
            role += ", guards the run: its best weights are kept"
            if monitor.early_stop is not None:
                role += f", {monitor.early_stop} evaluations without a new best end the run"
        said.append((name, f"{role}; {takes}"))
    return said


def estimate(parts: Parts) -> list[tuple[str, str]]:
    """Rows (what, how much) of the first training step, in closed form, over all ranks."""
    import torch

    from flowrl.build import build_distance
    from flowrl.methods.spec import TokenPlan

    config, plan = parts.config, parts.method.plan(0)
    samples = config.data.num_groups * config.data.group_size
    rows: list[tuple[str, str]] = []
    if not isinstance(plan, TokenPlan):
        forwards, trained = network_evals(plan, config.data.num_groups, config.data.group_size)
        forwards, trained = forwards * parts.guidance_rows, trained * parts.guidance_rows
        frozen = [(s, trained * (s in parts.method.objective.needs.sets)) for s in _FROZEN]
        rows += [
            ("rollout", f"{forwards} network evaluations, {forwards / samples:.2f} per image"),
            ("training", f"at most {trained} forward-backward, {trained / samples:.2f} per image"),
            *((name, f"at most {rows} network evaluations") for name, rows in frozen if rows),
            ("stored states", f"{_stored_mb(parts, plan, samples):.1f} MB"),
        ]
    else:
        policy: Any = parts.policy
        drawn, scored = policy.rows_per_draw + policy.rows_per_score, policy.rows_per_score
        rows += [
            ("rollout", f"{drawn * samples} network evaluations, {drawn} per image"),
            ("training", f"{scored * samples} forward-backward, {scored} per image"),
        ]
    weights = parts.policy.weights
    network = sum(p.numel() * p.element_size() for p in weights.network.parameters())
    trainable = sum(p.numel() for p in weights.trainable())
    rows += [
        ("network", f"{network / 1e6:.1f} MB, {trainable / 1e6:.2f} M parameters trained"),
        ("gradient and AdamW", f"{12 * trainable / 1e6:.1f} MB"),
    ]
    if (distance := build_distance(parts)) is not None:
        first, further = distance.network_evals
        text = f"{further} network evaluations per held-out evaluation, {first} in the first one"
        rows.append(("distance from base", f"{text}; beside those that the run counts"))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        rows.append(("GPU memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return rows


def network_evals(
    plan: StepPlan | ForwardPlan | NeighborPlan, num_groups: int, group_size: int
) -> tuple[int, int]:
    """(rows of the rollout, rows with gradient of training), without guidance.

    Those of a tree are counted on the tree of one group, which the plan gives without a rollout.
    """
    import torch

    from flowrl.methods.forward_plan import ForwardPlan, NeighborPlan
    from flowrl.types import Prompt, PromptBatch, Tree

    if isinstance(plan, ForwardPlan):
        samples = num_groups * group_size
        return plan.num_steps * samples, plan.num_draws * samples
    if isinstance(plan, NeighborPlan):
        rows = num_groups * plan.num_anchors * len(plan.trained)
        return plan.num_steps * num_groups * group_size, rows
    keys = plan.table(PromptBatch.one_group([Prompt("")] * group_size))
    node = Tree(keys, torch.zeros(group_size, plan.num_steps)).node
    sizes = [len(level.unique()) for level in node.unbind(1)]
    forwards = sum(sizes[: plan.num_table_steps])
    forwards += plan.num_tail_steps * sizes[plan.num_table_steps]
    trained = sum(len(node[keys[:, 1 + i] >= 0, i].unique()) for i in plan.trained)
    return forwards * num_groups, trained * num_groups


def _stored_mb(parts: Parts, plan: StepPlan | ForwardPlan | NeighborPlan, samples: int) -> float:
    from flowrl.methods.forward_plan import ForwardPlan

    levels = 1
    if not isinstance(plan, ForwardPlan):
        levels = len({step + k for step in plan.trained for k in (0, 1)})
    elements = math.prod(parts.policy.pipeline.latent_shape)
    return levels * samples * elements * 4 / 1e6
