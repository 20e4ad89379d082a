"""What a flow rollout stored: the levels of its tree, its decisions, the rows that score them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from flowrl.methods.spec import StepPlan
from flowrl.types import Decisions, PromptBatch, Tree


@dataclass(frozen=True)
class Level:
    """The distinct states before one sampler step.

    Attributes:
        states: [n, ...latent] in the storage dtype; None where training does not need them.
        parent: int64 [n], index into the level before; -1 at level 0.
        sample: int64 [n], the first sample that descends from the state.
        noisy: bool [n], True = the step that led here drew noise.
        log_prob: float32 [n] of the step that led here, under the behaviour policy, where it was
            noisy; None where the step is not trained.
        mask: bool [n], True = the step that led here is trained; None with log_prob.
        mean: [n, ...latent] of the step that led here; None unless the plan stores it.
    """

    states: Tensor | None
    parent: Tensor
    sample: Tensor
    noisy: Tensor
    log_prob: Tensor | None = None
    mask: Tensor | None = None
    mean: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """States whose outgoing step is trained: [R, ...latent], sample int64 [R], sigmas [R]."""

    states: Tensor
    sample: Tensor
    sigma: Tensor
    sigma_next: Tensor

    def select(self, index: Tensor) -> Rows:
        """The rows at int64 `index`."""
        states = self.states[index.to(self.states.device)]
        return Rows(states, self.sample[index], self.sigma[index], self.sigma_next[index])


@dataclass(frozen=True)
class FlowTrajectory:
    """A rollout's tree: T + 1 levels, or fewer before a tail, with the states that training needs.

    Attributes:
        batch: the samples.
        plan: how they were drawn.
        sigmas: [T+1], on the CPU.
        levels: the states before every step, and after the last.
        tree: which samples share which states, and the log-probs of their steps.
    """

    batch: PromptBatch
    plan: StepPlan
    sigmas: Tensor
    levels: tuple[Level, ...]
    tree: Tree

    @cached_property
    def _edges(self) -> list[tuple[int, Tensor]]:
        """(step, its decisions' children int64 [e]) of every trained step."""
        return [(i, self.levels[i + 1].noisy.nonzero().flatten()) for i in self.plan.trained]

    @cached_property
    def decisions(self) -> Decisions:
        """Trained edges of the tree; the row of a decision is its parent state."""
        parts = []
        first_row = 0
        for step, edge in self._edges:
            child = self.levels[step + 1]
            assert child.log_prob is not None and child.mask is not None
            rows, row = torch.unique(child.parent[edge], return_inverse=True)
            parts.append(
                Decisions(
                    row=first_row + row,
                    sample=child.sample[edge],
                    step=torch.full_like(edge, step),
                    old_log_prob=child.log_prob[edge.to(child.log_prob.device)].cpu(),
                    mask=child.mask[edge],
                    sigma=self.sigmas[step].expand(len(edge)),
                    sigma_next=self.sigmas[step + 1].expand(len(edge)),
                    old_mean=None if child.mean is None else child.mean.cpu()[edge],
                )
            )
            first_row += len(rows)
        values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Decisions)}
        return Decisions(**{k: None if v[0] is None else torch.cat(v) for k, v in values.items()})

    @property
    def unit(self) -> Tensor:
        """Int64 [E]: the row, so that siblings are scored by one forward."""
        return self.decisions.row

    @property
    def num_rows(self) -> int:
        """States with a trained outgoing step."""
        return len(self._rows.sample)

    @cached_property
    def _rows(self) -> Rows:
        """All rows, in order."""
        states, samples, sigmas = [], [], []
        for step, edge in self._edges:
            level, parent = self.levels[step], torch.unique(self.levels[step + 1].parent[edge])
            assert level.states is not None
            states.append(level.states[parent.to(level.states.device)])
            samples.append(level.sample[parent])
            sigmas.append(self.sigmas[step : step + 2].expand(len(parent), 2))
        sigma, sigma_next = torch.cat(sigmas).unbind(1)
        return Rows(torch.cat(states), torch.cat(samples), sigma, sigma_next)

    @cached_property
    def _children(self) -> Tensor:
        """The stored next state of every decision [E, ...]."""
        parts = []
        for step, edge in self._edges:
            states = self.levels[step + 1].states
            assert states is not None
            parts.append(states[edge.to(states.device)])
        return torch.cat(parts)

    def gather(self, index: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """What scoring the decisions at `index` int64 [K] takes.

        Returns:
            The distinct rows, the row of each decision [K] (an index into them), and the stored
            next states [K, ...].
        """
        rows, row_of = torch.unique(self.decisions.row[index], return_inverse=True)
        return self._rows.select(rows), row_of, self._children[index.to(self._children.device)]
