"""The flow policy: draws trees of latents, and scores their stochastic steps by one transition.

A rollout is a table of levels 0..T. Level i holds the distinct states before step i (`types.Tree`);
every state names its parent in level i-1. A state is evaluated once, however many samples descend
from it, in rollout and in training: the log-probs of siblings come from one forward.
Reading order: trajectory.py, `FlowPolicy.rollout`, `FlowPolicy.evaluate`; both compute a
`_velocity` and hand it to the plan's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from flowrl.data.noise import sample_noise, sample_uniform
from flowrl.functional import sde
from flowrl.functional.flow import predict_x0
from flowrl.functional.shapes import at_least_float32
from flowrl.functional.solvers import euler
from flowrl.functional.trees import first_of, sibling_noise
from flowrl.methods.forward_plan import Solver
from flowrl.methods.spec import StepPlan
from flowrl.policies.conditioning import PromptTable
from flowrl.policies.solved import Watch
from flowrl.policies.trajectory import FlowTrajectory, Level
from flowrl.protocols import FlowPipeline, Weights
from flowrl.types import Evaluation, PromptBatch, Rollout, Tree

Conditioning = tuple[dict[str, Tensor], dict[str, Tensor] | None]


class FlowPolicy:
    """A flow pipeline that draws, scores and remembers prompts.

    Args:
        pipeline: what encodes, moves and decodes latents.
        weights: the parameter sets of `pipeline.network`.
        guidance_scale: the same in rollout and evaluation; classifier-free (1 = off), or an input
            of the network, if the pipeline embeds it.
        rollout_batch_size: network rows per forward without gradient.
        decode_batch_size: images per call of the decoder, or of the encoder.
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
        """Draws one image per sample, and the tree of states that training needs.

        Raises:
            ShapeError, ValueError: the plan does not fit the batch.
        """
        sigmas = self.pipeline.sigmas(plan.num_steps)
        keys, kept = plan.table(batch), _kept(batch, plan)
        log_probs = torch.zeros(len(batch), plan.num_steps, dtype=self._state_dtype)
        node = Tree(keys, log_probs).node
        needed = {s + k for s in plan.trained for k in (0, 1)}
        sample = first_of(node[:, 0])
        x = self._draw(batch, plan, keys, sample, column=0).to(self.storage_dtype)
        parent, noisy = torch.full_like(sample, -1), torch.zeros_like(sample, dtype=torch.bool)
        levels = [Level(x if 0 in needed else None, parent, sample, noisy)]
        history: tuple[Tensor, Tensor] | None = None
        evals = 0
        for step in range(plan.num_table_steps):
            velocity = self._velocities(x, sample, batch, sigmas[step], self.guidance_scale)
            evals += len(x)
            before, sample = x, first_of(node[:, step + 1])
            parent, noisy = node[sample, step], keys[sample, step + 1] >= 0
            mean, std = self._moves(plan, before, velocity, sigmas, step, parent, noisy)
            x, log_prob = self._taken(batch, plan, keys, sample, step, mean, std, noisy)
            log_probs[:, step] = _density(log_prob, std, noisy)[node[:, step + 1]]
            is_trained = step in plan.trained
            levels.append(
                Level(
                    x if step + 1 in needed else None,
                    parent,
                    sample,
                    noisy,
                    log_prob if is_trained else None,
                    kept[sample, plan.trained.index(step)] if is_trained else None,
                    mean if is_trained and plan.store_mean else None,
                )
            )
            if plan.tail is not None:
                x0 = predict_x0(at_least_float32(before), velocity, sigmas[step].to(self.device))
                history = (x0[parent.to(self.device)], sigmas[step])
        trajectory = FlowTrajectory(batch, plan, sigmas, tuple(levels), Tree(keys, log_probs))
        place = node[:, plan.num_table_steps]
        if plan.tail is not None:
            x, place, more = self._tail(batch, plan, x, sample, place, sigmas, history)
            evals += more
        x = x[place.to(self.device)]
        return self._rollout(batch, x, evals, self.guidance_scale), trajectory

    def evaluate(self, trajectory: FlowTrajectory, index: Tensor) -> Evaluation:
        """Log-probs, means and stds of the decisions at `index` under the weights in use."""
        rows, row_of, children = trajectory.gather(index)
        x_t = at_least_float32(rows.states)  # of bf16, a log-prob would have 3 digits
        sigma, sigma_next, sigma_max = (
            each.to(self.device) for each in (rows.sigma, rows.sigma_next, trajectory.sigmas[1])
        )
        conditioning = self._conditioning(trajectory.batch, rows.sample)
        velocity = self._velocity(
            self.training_network, x_t, sigma, conditioning, self.guidance_scale
        )
        mean, std = trajectory.plan.kernel(x_t, velocity, sigma, sigma_next, sigma_max)
        row_of = row_of.to(self.device)
        mean, std = mean[row_of], std[row_of]
        return Evaluation(sde.gaussian_log_prob(children, mean, std), mean, std)

    @torch.no_grad()
    def sample(self, batch: PromptBatch, *, num_steps: int, guidance_scale: float) -> Rollout:
        """Images by Euler's method; noise depends on (batch.seed, sample_id) only."""
        x = self._solved(batch, self.pipeline.sigmas(num_steps), euler, guidance_scale)
        return self._rollout(batch, x, len(batch) * num_steps, guidance_scale)

    @torch.no_grad()
    def solve(
        self,
        batch: PromptBatch,
        *,
        num_steps: int,
        solver: Solver,
        start: Tensor | None = None,
        watch: Watch | None = None,
    ) -> tuple[Rollout, Tensor, Tensor]:
        """Images by a solver with the weights in use and the rollout's guidance.

        `start` [N, ...] is the noise to begin with, None = as in `sample`; with `watch`, states are
        rounded to the storage dtype before every step.

        Returns:
            The samples; their clean latents [N, ...] in the storage dtype,
            as decoded; the sampler's sigmas [T+1], on the CPU.
        """
        sigmas = self.pipeline.sigmas(num_steps)
        x0 = self._solved(batch, sigmas, solver, self.guidance_scale, start, watch)
        x0 = x0.to(self.storage_dtype)
        evals = len(batch) * num_steps
        return self._rollout(batch, x0, evals, self.guidance_scale), x0, sigmas

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Clean latents [N, ...] of images [N, 3, H, W] in [0, 1], in the storage dtype."""
        parts = [self.pipeline.encode_images(part) for part in images.split(self.decode_batch_size)]
        return torch.cat(parts).to(self.device, self.storage_dtype)

    def velocity(self, batch: PromptBatch, x_t: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
        """Guided velocity of `training_network`, with gradient.

        Args:
            batch: the samples.
            x_t: [R, ...], points of the path, on the device.
            sigma: [R].
            sample: int64 [R], the sample (index into the batch) that each point belongs to.
        """
        conditioning = self._conditioning(batch, sample)
        network, sigma = self.training_network, sigma.to(self.device)
        return self._velocity(network, x_t, sigma, conditioning, self.guidance_scale)

    def _moves(
        self,
        plan: StepPlan,
        states: Tensor,
        velocity: Tensor,
        sigmas: Tensor,
        step: int,
        parent: Tensor,
        noisy: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean and std of the step that led to every state of the next level."""
        x_t = at_least_float32(states)
        parent, noisy = parent.to(self.device), noisy.to(self.device)
        sigma, sigma_next = (sigmas[i].expand(len(x_t)).to(self.device) for i in (step, step + 1))
        mean, std = (each[parent] for each in sde.ode(x_t, velocity, sigma, sigma_next))
        if noisy.any():
            # Of the parents, not of the children: these are the numbers that `evaluate` computes.
            drift, spread = plan.kernel(x_t, velocity, sigma, sigma_next, sigmas[1].to(self.device))
            chosen = noisy.reshape(-1, *(1,) * (mean.ndim - 1))
            mean = torch.where(chosen, drift[parent], mean)
            std = torch.where(chosen, spread[parent], std)
        return mean, std

    def _taken(
        self,
        batch: PromptBatch,
        plan: StepPlan,
        keys: Tensor,
        sample: Tensor,
        step: int,
        mean: Tensor,
        std: Tensor,
        noisy: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The next level's states, rounded to storage, and their log-probs (nan without noise)."""
        if not noisy.any():
            x = mean.to(self.storage_dtype)
            return x, torch.full((len(x),), torch.nan, dtype=mean.dtype, device=x.device)
        drawn = self._draw(batch, plan, keys, sample[noisy], column=1 + step)
        noise = torch.zeros(mean.shape, dtype=drawn.dtype, device=drawn.device)
        noise[noisy.to(self.device)] = drawn
        x = (mean + std * noise).to(self.storage_dtype)
        return x, sde.gaussian_log_prob(x, mean, std)

    def _draw(
        self, batch: PromptBatch, plan: StepPlan, keys: Tensor, sample: Tensor, *, column: int
    ) -> Tensor:
        """The noise of a column of the plan's keys for the samples at `sample` [n]: [n, ...]."""
        own = self._noise(batch.seed, keys[sample, column], stream=column)
        if plan.mix is None:
            return own
        shared_keys = plan.mix.keys(batch, plan)[sample, column]
        mixed = (shared_keys >= 0).nonzero().flatten()
        if len(mixed):
            # Streams up to T are the samples' own, and T + 1 draws which steps they keep.
            stream = plan.num_steps + 2 + column
            shared = self._noise(batch.seed, shared_keys[mixed], stream=stream)
            where = mixed.to(self.device)
            own[where] = sibling_noise(shared, own[where], plan.mix.scale)
        return own

    def _tail(
        self,
        batch: PromptBatch,
        plan: StepPlan,
        x: Tensor,
        sample: Tensor,
        place: Tensor,
        sigmas: Tensor,
        history: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, int]:
        """The states at the end, from the states x at the end of the table.

        The last step's x0 is the history of the first step here, so that one is of second order (of
        first where the last step began at sigma = 1, or there was none), up to the noise between.

        Returns:
            The states; int64 [N], which of them is a sample's, as `place` is for x; the number of
            network evaluations.
        """
        assert plan.tail is not None
        paths = plan.tail.paths(sigmas, plan.num_table_steps)
        ends: list[Tensor] = []
        end_of, evals = torch.empty_like(place), 0
        for number, points in enumerate(paths):
            mine = batch.member % len(paths) == number
            if not mine.any():  # of a part of a group
                continue
            state, back = torch.unique(place[mine], return_inverse=True)
            end_of[mine] = back + sum(map(len, ends))
            at = state.to(self.device)
            past = None if history is None else (history[0][at], history[1])
            solver, scale = plan.tail.solver, self.guidance_scale
            ends.append(self._walk(batch, x[at], sample[state], points, solver, scale, past))
            evals += len(state) * (len(points) - 1)
        return torch.cat(ends), end_of, evals

    def _solved(
        self,
        batch: PromptBatch,
        sigmas: Tensor,
        solver: Solver,
        guidance_scale: float,
        start: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """The end of every sample's way from `start`, or its own noise."""
        if start is None:
            start = self._noise(batch.seed, batch.sample_id, stream=0)
        x, everyone = start.to(self.device, self._state_dtype), torch.arange(len(batch))
        return self._walk(batch, x, everyone, sigmas, solver, guidance_scale, watch=watch)

    def _walk(
        self,
        batch: PromptBatch,
        x: Tensor,
        sample: Tensor,
        points: Tensor,
        solver: Solver,
        guidance_scale: float,
        history: tuple[Tensor, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """The states x [n, ...] of the samples at `sample` [n], moved along the sigmas `points`.

        `history` is (x0, sigma) of the step before, for solvers of higher order.
        """
        for sigma, sigma_next in pairwise(points):
            x = x if watch is None else x.to(self.storage_dtype)
            velocity = self._velocities(x, sample, batch, sigma, guidance_scale)
            if watch is not None:
                watch(x, velocity)
            old_x0, old_sigma = history if history is not None else (None, None)
            x, x0 = solver(
                at_least_float32(x),
                velocity,
                sigma.to(self.device),
                sigma_next.to(self.device),
                previous_x0=old_x0,
                previous_sigma=None if old_sigma is None else old_sigma.to(self.device),
            )
            history = (x0, sigma)
        return x

    def _velocities(
        self, x: Tensor, sample: Tensor, batch: PromptBatch, sigma: Tensor, guidance_scale: float
    ) -> Tensor:
        """Velocity of all distinct states of a level, in chunks of the network, for a rollout."""
        chunk = max(1, self.rollout_batch_size // guidance_rows(self.pipeline, guidance_scale))
        parts = []
        for start in range(0, len(x), chunk):
            states = at_least_float32(x[start : start + chunk])
            conditioning = self._conditioning(batch, sample[start : start + chunk])
            at = sigma.expand(len(states)).to(self.device)
            network = self.weights.network
            parts.append(self._velocity(network, states, at, conditioning, guidance_scale))
        return torch.cat(parts)

    def _velocity(
        self,
        network: nn.Module,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Tensor:
        """Velocity, float32 at least; with free guidance, both kinds of rows in one forward."""
        rows, empty = conditioning
        if self.pipeline.embeds_guidance:
            guidance = torch.full((len(x_t),), guidance_scale, device=x_t.device)
            rows, guidance_scale = rows | {"guidance": guidance}, 1.0
        if guidance_scale == 1 or empty is None:
            return at_least_float32(self.pipeline.velocity(network, x_t, sigma, rows))
        both = {name: torch.cat([empty[name].expand_as(rows[name]), rows[name]]) for name in rows}
        velocity = self.pipeline.velocity(network, torch.cat([x_t, x_t]), sigma.repeat(2), both)
        unconditional, conditional = at_least_float32(velocity).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _conditioning(self, batch: PromptBatch, samples: Tensor) -> Conditioning:
        assert self._table is not None, "call precompute with all prompts first"
        texts = [batch.prompts[i].text for i in samples.tolist()]
        return self._table.rows(texts, self.device), self._table.rows([""], self.device)

    def _noise(self, seed: int, ids: Tensor, *, stream: int) -> Tensor:
        noise = sample_noise(
            seed, ids, self.pipeline.latent_shape, stream=stream, device=self.device
        )
        return noise.to(self._state_dtype)

    @property
    def _state_dtype(self) -> torch.dtype:
        """In which transitions are computed: the storage dtype, float32 at least."""
        return torch.promote_types(self.storage_dtype, torch.float32)

    def _rollout(
        self, batch: PromptBatch, latents: Tensor, evals: int, guidance_scale: float
    ) -> Rollout:
        """The record of the samples."""
        rows = evals * guidance_rows(self.pipeline, guidance_scale)
        return Rollout(batch, latents, rows, self._decode)

    def _decode(self, latents: Tensor) -> Tensor:
        size = self.decode_batch_size
        parts = [
            self.pipeline.decode(latents[i : i + size].float()).float().cpu()
            for i in range(0, len(latents), size)
        ]
        return torch.cat(parts)


def guidance_rows(pipeline: FlowPipeline | type[FlowPipeline], guidance_scale: float) -> int:
    """Network rows per state: two with classifier-free guidance, which 1 switches off."""
    return 1 if guidance_scale == 1 or pipeline.embeds_guidance else 2


def _density(log_prob: Tensor, std: Tensor, noisy: Tensor) -> Tensor:
    """Log-probs [n] on the CPU; 0 where a step was deterministic or has no density."""
    has_density = noisy & (std.reshape(len(std), -1)[:, 0].cpu() > 0)
    return torch.where(has_density, log_prob.cpu(), 0.0)


def _kept(batch: PromptBatch, plan: StepPlan) -> Tensor:
    """Bool [N, len(trained)]: which trained steps a sample keeps, a draw per sample."""
    num = len(plan.trained)
    if plan.trained_fraction == 1:
        return torch.ones(len(batch), num, dtype=torch.bool)
    draws = sample_uniform(batch.seed, batch.sample_id, (num,), stream=1 + plan.num_steps)
    rank = draws.argsort(dim=1).argsort(dim=1)
    return rank < plan.num_kept
