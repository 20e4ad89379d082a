"""Does my policy do what flowrl relies on? The rules are those of `check_policy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.testing.words import check_images, require, require_same
from flowrl.types import Decisions, PromptBatch, Rollout


def check_policy(
    policy: Any,
    batch: PromptBatch,
    plan: Any,
    *,
    ratio_tolerance: float = 1e-5,
    tolerance: float = 1e-4,
) -> None:
    """Raises unless `policy` is a Policy that can be trained on `batch` with `plan`.

    A rollout has an image per sample, in [0, 1] on the CPU; its log-probs are float32, detached and
    finite; rows ascend, and rows and samples exist. The same batch gives the same rollout, bit by
    bit, without touching torch's global random state. On the first pass the ratio is 1, and the
    log-probs of `evaluate` carry a gradient to the trainable parameters. Neither the samples that
    are drawn together nor the decisions that are scored together change a result.

    Args:
        policy: with its prompts encoded.
        batch: of two samples or more; groups stand together.
        plan: as its method makes it.
        ratio_tolerance: how far from 0 a log-ratio may be on the first pass.
        tolerance: absolute, for what may differ by rounding.
    """
    state = torch.get_rng_state()
    rollout, trajectory = policy.rollout(batch, plan)
    require(
        torch.equal(torch.get_rng_state(), state), "rollout()", "without torch's global random "
        "state (use flowrl.data.noise, seeded by the batch)", "another state",
    )  # fmt: skip
    decisions = trajectory.decisions
    _check_rollout(rollout, decisions, trajectory.num_rows, len(batch))
    again, repeated = policy.rollout(batch, plan)
    twice = "for the same batch again"
    require_same(rollout.images, again.images, 0.0, "rollout().images", twice)
    old = decisions.old_log_prob
    require_same(old, repeated.decisions.old_log_prob, 0.0, "old_log_prob", twice)
    _check_ratio(policy, trajectory, ratio_tolerance, tolerance)
    start, part = _last_group(batch)
    few, shorter = policy.rollout(part, plan)
    fewer = "drawn with fewer neighbours"
    require_same(rollout.images[start:], few.images, tolerance, "the image of a sample", fewer)
    mine, alone = _by_sample(decisions, start), _by_sample(shorter.decisions, 0)
    require_same(mine, alone, tolerance, "old_log_prob of a sample", fewer)


def _check_rollout(rollout: Rollout, decisions: Decisions, num_rows: int, num: int) -> None:
    check_images(rollout.images, num, "rollout().images")
    require(rollout.images.device.type == "cpu", "images", "on the CPU", rollout.images.device)
    old, what = decisions.old_log_prob, "decisions.old_log_prob"
    require(len(old) > 0, "the plan", "one that trains a decision at least", "none")
    require(old.dtype == torch.float32, what, "float32", old.dtype)
    require(not old.requires_grad, what, "detached", "a tensor with gradient")
    is_finite = old[decisions.mask].isfinite().all()
    require(is_finite, what, "finite where the mask is True", "NaN or infinity")
    for name, limit in (("row", num_rows), ("sample", num)):
        values: Tensor = getattr(decisions, name)
        is_inside = ((values >= 0) & (values < limit)).all()
        require(is_inside, f"decisions.{name}", f"in [0, {limit})", values.tolist())
    is_ascending = (decisions.row.diff() >= 0).all()
    require(is_ascending, "decisions.row", "ascending", decisions.row.tolist())


def _check_ratio(policy: Any, trajectory: Any, ratio_tolerance: float, tolerance: float) -> None:
    old, mask = trajectory.decisions.old_log_prob, trajectory.decisions.mask
    everyone = torch.arange(len(old))
    new, what = policy.evaluate(trajectory, everyone).log_prob, "evaluate().log_prob"
    require(new.shape == old.shape, what, f"as old_log_prob, {tuple(old.shape)}", tuple(new.shape))
    require(new.dtype == torch.float32, what, "float32", new.dtype)
    require(new.requires_grad, what, "with a gradient", "a detached tensor")
    log_ratio = float((new.detach().cpu() - old)[mask].abs().max())
    require(
        log_ratio <= ratio_tolerance, "the ratio on the first pass", "1, so rollout and evaluate "
        "must call the same transition", f"|log_ratio| up to {log_ratio:.2e}",
    )  # fmt: skip
    trainable = list(policy.weights.trainable())
    total = new[mask.to(new.device)].sum()
    gradients = torch.autograd.grad(total, trainable, allow_unused=True)
    has_any = any(g is not None and bool(g.abs().max() > 0) for g in gradients)
    require(has_any, f"the gradient of {what}", "in weights.trainable()", "none there")
    with torch.no_grad():
        cuts = [everyone[i : i + 3] for i in range(0, len(everyone), 3)]
        parts = [policy.evaluate(trajectory, index).log_prob for index in cuts]
    require_same(new, torch.cat(parts), tolerance, what, "scored in parts of 3")


def _by_sample(decisions: Decisions, start: int) -> Tensor:
    """old_log_prob of the samples from `start` on, ordered by sample, then as stored."""
    order = decisions.sample.argsort(stable=True)
    return decisions.old_log_prob[order[decisions.sample[order] >= start]]


def _last_group(batch: PromptBatch) -> tuple[int, PromptBatch]:
    """(its first sample, the last group), or the last half where there is only one group."""
    start = int((batch.group_id != batch.group_id[-1]).sum()) or len(batch) // 2
    require(start > 0, "the batch", "two samples or more", len(batch))
    return start, batch.select(torch.arange(start, len(batch)))
