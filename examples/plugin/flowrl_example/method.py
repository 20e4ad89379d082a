"""A method: Flow-GRPO whose advantage is a sample's rank in its group."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowrl.methods import METHODS, Method
from flowrl.types import Scores, Tree


def ranked(scores: Scores, group_id: Tensor, tree: Tree | None = None) -> Tensor:
    """Advantage [N]: a sample's rank in its group, from -1 (worst) to 1 (best); 0 where invalid.

    Equal rewards have equal ranks, so that a group without differences teaches nothing.
    """
    total = sum(weight * scores.rewards[name] for name, weight in scores.weights.items())
    assert isinstance(total, Tensor)
    advantage = torch.zeros_like(total)
    for group in group_id.unique():
        mine = (group_id == group) & scores.valid
        values = total[mine]
        better = (values[:, None] > values).sum(1) - (values[:, None] < values).sum(1)
        advantage[mine] = better / max(len(values) - 1, 1)
    return advantage


def ranked_flow_grpo(*, num_steps: int = 10, clip_range: float = 1e-4) -> Method:
    """Flow-GRPO on ranks: whatever the scale of the reward, the best of a group counts 1."""
    method = METHODS["flow_grpo"](num_steps=num_steps, clip_range=clip_range)
    return replace(method, name="ranked_flow_grpo", paper="none, an example", advantage=ranked)
