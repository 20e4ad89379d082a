"""The flow policy: draws trees of latents, and scores their stochastic steps by one transition.

A rollout is a table of levels 0..T. Level i holds the distinct states before step i; every state
names its parent in level i-1. A state is evaluated once, however many samples descend from it: a
group that shares its starting noise has ONE state per level until the first stochastic step, and
the G log-probs of that step come from one forward in training too. Reading order: `Level`,
`FlowTrajectory`, `FlowPolicy.rollout`, `FlowPolicy.evaluate`; both call `FlowPolicy._transition`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from flowrl.data.noise import sample_noise, sample_uniform
from flowrl.functional import sde
from flowrl.functional.shapes import at_least_float32
from flowrl.methods.spec import StepPlan
from flowrl.policies.conditioning import PromptTable
from flowrl.protocols import FlowPipeline, Weights
from flowrl.types import Decisions, Evaluation, PromptBatch, Rollout


@dataclass(frozen=True)
class Level:
    """The distinct states before one sampler step.

    Attributes:
        states: [n, ...latent] in the storage dtype; None where training does not need them.
        parent: int64 [n], index into the level before; -1 at level 0.
        sample: int64 [n], the first sample that descends from the state.
        log_prob: float32 [n] of the stochastic step that led here, under the behaviour policy;
            None where that step was deterministic or is not trained.
        mask: bool [n], True = the step that led here is trained; None with log_prob.
    """

    states: Tensor | None
    parent: Tensor
    sample: Tensor
    log_prob: Tensor | None = None
    mask: Tensor | None = None


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
    """A rollout's tree: T + 1 levels with the states that training needs.

    Attributes:
        batch: the samples.
        plan: how they were drawn.
        sigmas: [T+1], on the CPU.
        levels: T + 1 of them.
    """

    batch: PromptBatch
    plan: StepPlan
    sigmas: Tensor
    levels: tuple[Level, ...]

    @cached_property
    def decisions(self) -> Decisions:
        """Trained steps of all samples; the row of a decision is its parent state."""
        parts = []
        first_row = 0
        for step in self.plan.trained:
            child = self.levels[step + 1]
            assert child.log_prob is not None and child.mask is not None
            num = len(child.parent)
            parts.append(
                Decisions(
                    row=first_row + child.parent,
                    sample=child.sample,
                    old_log_prob=child.log_prob.cpu(),
                    mask=child.mask,
                    sigma=self.sigmas[step].expand(num),
                    sigma_next=self.sigmas[step + 1].expand(num),
                )
            )
            first_row += len(self.levels[step].parent)
        fields = ("row", "sample", "old_log_prob", "mask", "sigma", "sigma_next")
        return Decisions(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    @property
    def num_rows(self) -> int:
        """States whose outgoing step is trained."""
        return sum(len(self.levels[step].parent) for step in self.plan.trained)

    @cached_property
    def _rows(self) -> Rows:
        """All rows, in order."""
        steps = self.plan.trained
        levels = [self.levels[step] for step in steps]
        sizes = torch.tensor([len(level.parent) for level in levels])
        return Rows(
            states=torch.cat([level.states for level in levels if level.states is not None]),
            sample=torch.cat([level.sample for level in levels]),
            sigma=self.sigmas[list(steps)].repeat_interleave(sizes),
            sigma_next=self.sigmas[[step + 1 for step in steps]].repeat_interleave(sizes),
        )

    @cached_property
    def _children(self) -> Tensor:
        """The stored next state of every decision [E, ...]."""
        return torch.cat([self.levels[step + 1].states for step in self.plan.trained])  # type: ignore[misc]

    def gather(self, index: Tensor) -> tuple[Rows, Tensor, Tensor]:
        """What scoring the decisions at `index` int64 [K] takes.

        Returns:
            The distinct rows, the row of each decision [K] (an index into them), and the stored
            next states [K, ...].
        """
        rows, row_of = torch.unique(self.decisions.row[index], return_inverse=True)
        return self._rows.select(rows), row_of, self._children[index.to(self._children.device)]


class FlowPolicy:
    """A flow pipeline that draws, scores and remembers prompts.

    Args:
        pipeline: what encodes, moves and decodes latents.
        weights: the parameter sets of `pipeline.network`.
        guidance_scale: classifier-free guidance, the same in rollout and evaluation; 1 = off.
        rollout_batch_size: network rows per forward without gradient.
        decode_batch_size: images per call of the decoder.
        device: where the network is.
        storage_dtype: in which states are kept; they are rounded to it BEFORE they are scored.
            Transitions are computed in it, but in float32 at least.
    """

    def __init__(
        self,
        pipeline: FlowPipeline,
        weights: Weights,
        *,
        guidance_scale: float = 1.0,
        rollout_batch_size: int = 64,
        decode_batch_size: int = 64,
        device: torch.device | str = "cpu",
        storage_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pipeline = pipeline
        self.weights = weights
        self.guidance_scale = guidance_scale
        self.rollout_batch_size = rollout_batch_size
        self.decode_batch_size = decode_batch_size
        self.device = torch.device(device)
        self.storage_dtype = storage_dtype
        self.training_network: nn.Module = weights.network
        self._table: PromptTable | None = None

    def precompute(self, prompts: Sequence[str], folder: Path | None) -> None:
        """Encodes all prompts that will be asked for, then lets the text encoders go."""
        self._table = PromptTable(
            self.pipeline.encode,
            ["", *prompts],
            folder=folder,
            fingerprint=self.pipeline.fingerprint,
        )
        self.pipeline.release_encoders()

    def save(self, folder: Path) -> None:
        """Writes the weights in use as the pipeline's own kind of artefact."""
        self.weights.save(self.pipeline, folder)

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, plan: StepPlan) -> tuple[Rollout, FlowTrajectory]:
        """Draws one image per sample, and the tree of states that training needs."""
        sigmas = self.pipeline.sigmas(plan.num_steps)
        roots, node = _roots(batch, shared=plan.shared_noise)
        keys = batch.group_id if plan.shared_noise else batch.sample_id
        x = self._noise(batch.seed, keys[roots], stream=0).to(self.storage_dtype)
        sample = roots
        parent = torch.full_like(roots, -1)
        keep = _kept(batch, plan)
        needed = {s + k for s in plan.trained for k in (0, 1)}
        levels = [Level(x if 0 in needed else None, parent, sample)]
        evals = 0
        for step in range(plan.num_steps):
            stochastic = step in plan.stochastic
            mean, std = self._step(x, sample, batch, plan, sigmas, step, stochastic)
            evals += len(x)
            parent, log_prob, mask = torch.arange(len(x)), None, None
            if stochastic:
                parent, node, sample = node, torch.arange(len(batch)), torch.arange(len(batch))
                index = parent.to(self.device)
                mean, std = mean[index], std[index]
                noise = self._noise(batch.seed, batch.sample_id, stream=1 + step)
                x = (mean + std * noise).to(self.storage_dtype)
                if step in plan.trained:
                    log_prob = sde.gaussian_log_prob(x, mean, std)
                    mask = keep[:, plan.trained.index(step)]
            else:
                x = mean.to(self.storage_dtype)
            levels.append(Level(x if step + 1 in needed else None, parent, sample, log_prob, mask))
        trajectory = FlowTrajectory(batch, plan, sigmas, tuple(levels))
        return self._rollout(batch, x[node.to(self.device)], evals, self.guidance_scale), trajectory

    def evaluate(self, trajectory: FlowTrajectory, index: Tensor) -> Evaluation:
        """Log-probs, means and stds of the decisions at `index` under the weights in use."""
        rows, row_of, children = trajectory.gather(index)
        mean, std = self._transition(
            self.training_network,
            rows.states,
            self._conditioning(trajectory.batch, rows.sample),
            rows.sigma.to(self.device),
            rows.sigma_next.to(self.device),
            trajectory.sigmas[1].to(self.device),
            trajectory.plan,
            self.guidance_scale,
        )
        row_of = row_of.to(self.device)
        mean, std = mean[row_of], std[row_of]
        return Evaluation(sde.gaussian_log_prob(children, mean, std), mean, std)

    @torch.no_grad()
    def sample(self, batch: PromptBatch, *, num_steps: int, guidance_scale: float) -> Rollout:
        """Images by the deterministic sampler; noise depends on (batch.seed, sample_id) only."""
        sigmas = self.pipeline.sigmas(num_steps)
        x = self._noise(batch.seed, batch.sample_id, stream=0)
        everyone = torch.arange(len(batch))
        plan = StepPlan(num_steps, _no_kernel, (), ())
        for step in range(num_steps):
            x, _ = self._step(x, everyone, batch, plan, sigmas, step, False, guidance_scale)
        return self._rollout(batch, x, len(batch) * num_steps, guidance_scale)

    def _step(
        self,
        x: Tensor,
        sample: Tensor,
        batch: PromptBatch,
        plan: StepPlan,
        sigmas: Tensor,
        step: int,
        stochastic: bool,
        guidance_scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Transition of all distinct states of a level, in chunks of the network."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        chunk = max(1, self.rollout_batch_size // (1 if scale == 1 else 2))
        parts = []
        for start in range(0, len(x), chunk):
            states = x[start : start + chunk]
            sigma, sigma_next = (
                sigmas[i].expand(len(states)).to(self.device) for i in (step, step + 1)
            )
            parts.append(
                self._transition(
                    self.weights.network,
                    states,
                    self._conditioning(batch, sample[start : start + chunk]),
                    sigma,
                    sigma_next,
                    sigmas[1].to(self.device),
                    plan if stochastic else None,
                    scale,
                )
            )
        means, stds = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(stds)

    def _transition(
        self,
        network: nn.Module,
        states: Tensor,
        conditioning: tuple[dict[str, Tensor], dict[str, Tensor] | None],
        sigma: Tensor,
        sigma_next: Tensor,
        sigma_max: Tensor,
        plan: StepPlan | None,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of one step from each state; `plan` None = deterministic."""
        x_t = at_least_float32(states)  # of bf16, a log-prob would have 3 digits
        velocity = self._velocity(network, x_t, sigma, conditioning, guidance_scale)
        if plan is None:
            return sde.ode(x_t, velocity, sigma, sigma_next)
        return plan.kernel(x_t, velocity, sigma, sigma_next, sigma_max)

    def _velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: tuple[dict[str, Tensor], dict[str, Tensor] | None],
        guidance_scale: float,
    ) -> Tensor:
        """Velocity, float32 at least; with guidance, both kinds of rows in one forward."""
        rows, empty = conditioning
        if guidance_scale == 1 or empty is None:
            return at_least_float32(self.pipeline.velocity(network, x_t, sigma, rows))
        both = {name: torch.cat([empty[name].expand_as(rows[name]), rows[name]]) for name in rows}
        velocity = self.pipeline.velocity(network, torch.cat([x_t, x_t]), sigma.repeat(2), both)
        unconditional, conditional = at_least_float32(velocity).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _conditioning(
        self, batch: PromptBatch, samples: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        assert self._table is not None, "call precompute with all prompts first"
        texts = [batch.prompts[i].text for i in samples.tolist()]
        return self._table.rows(texts, self.device), self._table.rows([""], self.device)

    def _noise(self, seed: int, ids: Tensor, *, stream: int) -> Tensor:
        noise = sample_noise(
            seed, ids, self.pipeline.latent_shape, stream=stream, device=self.device
        )
        return noise.to(torch.promote_types(self.storage_dtype, torch.float32))

    def _rollout(
        self, batch: PromptBatch, latents: Tensor, evals: int, guidance_scale: float
    ) -> Rollout:
        """The record of decoded samples."""
        start = time.perf_counter()
        images = self._decode(latents)
        rows = evals * (1 if guidance_scale == 1 else 2)
        return Rollout(batch, images, rows, time.perf_counter() - start)

    def _decode(self, latents: Tensor) -> Tensor:
        size = self.decode_batch_size
        parts = [
            self.pipeline.decode(latents[i : i + size].float()).float().cpu()
            for i in range(0, len(latents), size)
        ]
        return torch.cat(parts)


def _roots(batch: PromptBatch, *, shared: bool) -> tuple[Tensor, Tensor]:
    """(first sample of every starting state [n], starting state of every sample [N])."""
    if not shared:
        everyone = torch.arange(len(batch))
        return everyone, everyone
    groups, node = torch.unique(batch.group_id, return_inverse=True)
    first = torch.full((len(groups),), len(batch)).scatter_reduce(
        0, node, torch.arange(len(batch)), "amin"
    )
    if not bool((node[1:] >= node[:-1]).all()):
        raise ValueError("a batch must hold its groups in ascending, contiguous order")
    return first, node


def _kept(batch: PromptBatch, plan: StepPlan) -> Tensor:
    """Bool [N, len(trained)]: which trained steps a sample keeps, a draw per sample."""
    num = len(plan.trained)
    if plan.trained_fraction == 1:
        return torch.ones(len(batch), num, dtype=torch.bool)
    draws = sample_uniform(batch.seed, batch.sample_id, (num,), stream=1 + plan.num_steps)
    rank = draws.argsort(dim=1).argsort(dim=1)
    return rank < plan.num_kept


def _no_kernel(*_: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("the deterministic sampler has no stochastic step")
