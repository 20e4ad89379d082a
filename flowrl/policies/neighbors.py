"""The neighbour policy: deterministic samples from neighbouring noises, each a candidate.

Paper: Neighbor GRPO, arXiv:2511.16955. A decision is a (step, anchor, candidate): how likely the
anchor, an own member of the group, is to leap to the candidate's next state, by the distance of its
one-step prediction from there. All candidates of a (step, anchor) are scored by one network row.
Reading order: `NeighborTrajectory`, `NeighborPolicy.rollout`, `NeighborPolicy.evaluate`; both
predict by `NeighborTrajectory.predict` and score by `NeighborTrajectory.log_prob`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flowrl.data.noise import sample_noise, sample_uniform
from flowrl.functional import sde
from flowrl.functional.neighbors import neighbor_log_prob, neighbor_noise
from flowrl.functional.shapes import at_least_float32
from flowrl.methods.forward_plan import NeighborPlan
from flowrl.policies.solved import SolvedPolicy
from flowrl.types import Decisions, Evaluation, PromptBatch, Rollout

# Streams of the noise: own starts are 0, as everywhere.
_SHARED, _ANCHORS = 1, 2


@dataclass(frozen=True)
class NeighborTrajectory:
    """The states around the trained steps of all samples; row = step number * anchors + anchor.

    Attributes:
        batch: the samples.
        plan: how they were drawn.
        sigmas: [T+1], on the CPU.
        states: level -> [N, ...] in the storage dtype, before and after every trained step.
        anchors: int64 [A], ascending; the samples that are trained.
        old_log_prob: [E] under the behaviour policy, on the CPU; zeros until it is known.
    """

    batch: PromptBatch
    plan: NeighborPlan
    sigmas: Tensor
    states: dict[int, Tensor]
    anchors: Tensor
    old_log_prob: Tensor

    @cached_property
    def decisions(self) -> Decisions:
        """A decision per trained step, anchor and member of the anchor's group."""
        anchor, candidate = self._pairs
        trained = torch.tensor(self.plan.trained)
        count = len(trained)
        number = torch.arange(count).repeat_interleave(len(anchor))
        step = trained[number]
        return Decisions(
            row=number * len(self.anchors) + anchor.repeat(count),
            sample=candidate.repeat(count),
            step=step,
            old_log_prob=self.old_log_prob,
            mask=torch.ones(len(step), dtype=torch.bool),
            sigma=self.sigmas[step],
            sigma_next=self.sigmas[step + 1],
        )

    @property
    def num_rows(self) -> int:
        """One per trained step and anchor."""
        return len(self.plan.trained) * len(self.anchors)

    @property
    def unit(self) -> Tensor:
        """Int64 [E]: the row, so that candidates are scored by one forward."""
        return self.decisions.row

    @property
    def tree(self) -> None:
        """No tree: every sample has its own start."""
        return None

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """(index into anchors, candidate), int64 each, ascending."""
        group = self.batch.group_id
        anchor, candidate = (group[self.anchors, None] == group).nonzero().unbind(1)
        return anchor, candidate

    def before(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(states [R, ...], their samples, the steps to take), int64 [R] each, of int64 rows."""
        step = torch.tensor(self.plan.trained)[row // len(self.anchors)]
        sample = self.anchors[row % len(self.anchors)]
        pairs = zip(step.tolist(), sample.tolist(), strict=True)
        states = torch.stack([self.states[level][each] for level, each in pairs])
        return at_least_float32(states), sample, step

    def predict(self, x_t: Tensor, velocity: Tensor, step: Tensor) -> Tensor:
        """The next state [R, ...] by one step of DDIM, which for a flow is Euler's."""
        sigma, sigma_next = (self.sigmas[i].to(x_t.device) for i in (step, step + 1))
        return sde.ode(x_t, velocity, sigma, sigma_next)[0]

    def log_prob(self, prediction: Tensor, row: Tensor) -> Tensor:
        """Log-probs of all decisions of the rows, in order; a mean over dims is the distance."""
        anchor, candidate = self._pairs
        parts = []
        for each, number in zip(prediction, row.tolist(), strict=True):
            step, mine = divmod(number, len(self.anchors))
            after = self.states[self.plan.trained[step] + 1]
            members = candidate[anchor == mine].to(after.device)
            scale = self.plan.temperature * each.numel()
            parts.append(neighbor_log_prob(after[members][None], each[None], temperature=scale)[0])
        return torch.cat(parts)


class NeighborPolicy(SolvedPolicy):
    """A flow policy that is drawn deterministically and trained on the distances of candidates."""

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, plan: NeighborPlan) -> tuple[Rollout, NeighborTrajectory]:
        """Draws one image per sample; the velocities of the way are the behaviour policy's."""
        states: list[Tensor] = []
        velocities: list[Tensor] = []

        def watch(x: Tensor, velocity: Tensor) -> None:
            level = len(states)
            states.append(x if {level, level - 1} & {*plan.trained} else x[:0])
            velocities.append(velocity if level in plan.trained else velocity[:0])

        rollout, x0, sigmas = self.sampler.solve(
            batch,
            num_steps=plan.num_steps,
            solver=plan.solver,
            start=self._start(batch, plan),
            watch=watch,
        )
        kept = {i: x for i, x in enumerate([*states, x0]) if len(x)}
        anchors = _anchors(batch, plan.num_anchors)
        trajectory = NeighborTrajectory(batch, plan, sigmas, kept, anchors, torch.empty(0))
        row = torch.arange(trajectory.num_rows)
        x_t, sample, step = trajectory.before(row)
        pairs = zip(step.tolist(), sample.tolist(), strict=True)
        velocity = torch.stack([velocities[level][each] for level, each in pairs])
        old = trajectory.log_prob(trajectory.predict(x_t, velocity, step), row)
        return rollout, replace(trajectory, old_log_prob=old.cpu())

    def evaluate(self, trajectory: NeighborTrajectory, index: Tensor) -> Evaluation:
        """Log-probs of the decisions at `index`, ascending, under the weights in use."""
        data = trajectory.decisions
        row = torch.unique(data.row[index])
        x_t, sample, step = trajectory.before(row)
        sigma = trajectory.sigmas[step]
        velocity = self.sampler.velocity(trajectory.batch, x_t, sigma, sample)
        scored = trajectory.log_prob(trajectory.predict(x_t, velocity, step), row)
        among = torch.isin(data.row, row).nonzero().flatten()
        return Evaluation(scored[torch.searchsorted(among, index).to(scored.device)])

    def _start(self, batch: PromptBatch, plan: NeighborPlan) -> Tensor:
        """The starting noise of every sample [N, ...]."""
        shape = self.pipeline.latent_shape
        shared = sample_noise(batch.seed, batch.group_id, shape, stream=_SHARED)
        own = sample_noise(batch.seed, batch.sample_id, shape, stream=0)
        return neighbor_noise(shared, own, plan.spread)


def _anchors(batch: PromptBatch, num: int) -> Tensor:
    """Int64 [A]: `num` samples of every group, or all if there are fewer, drawn at random."""
    draws = sample_uniform(batch.seed, batch.sample_id, (1,), stream=_ANCHORS)[:, 0]
    chosen = []
    for group in torch.unique(batch.group_id):
        members = (batch.group_id == group).nonzero().flatten()
        chosen.append(members[draws[members].argsort()[:num]])
    return torch.cat(chosen).sort().values
