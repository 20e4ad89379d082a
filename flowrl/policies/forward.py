"""The forward-process policy: trains on clean samples, drawn or of a data set, noised afresh.

What is kept of a rollout is the clean latents alone. The levels sigma and the noises at which they
are trained are functions of (batch.seed, sample_id or group_id, draw), made again whenever they are
asked for, so every parameter set sees the same points and neither the chunk nor the world size can
change one. Reading order: methods/forward_plan.py, `ForwardTrajectory`, `evaluate`,
`ForwardPolicy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowrl.data.noise import sample_noise, sample_uniform
from flowrl.data.pairs import load_images
from flowrl.functional.flow import interpolate
from flowrl.functional.matching import Matching
from flowrl.functional.shapes import at_least_float32
from flowrl.functional.sigma_draws import stratified
from flowrl.methods.forward_plan import ForwardPlan
from flowrl.policies.solved import SolvedPolicy
from flowrl.types import Decisions, PromptBatch, Rollout

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t [R, ...], sigma [R], sample int64 [R], an index into the batch) -> velocity [R, ...]."""


@dataclass(frozen=True)
class ForwardTrajectory:
    """Clean samples, and the points at which they are trained: N * num_draws decisions.

    A decision is a (sample, draw); each is a row of its own. The decisions of a unit (a sample's
    draw, or a group's where draws are shared) are neighbours.

    Attributes:
        batch: the samples.
        plan: how they were drawn.
        sigmas: [T+1] of the sampler, on the CPU.
        x0: [N, ...], clean latents as decoded, or encoded from a data set.
    """

    batch: PromptBatch
    plan: ForwardPlan
    sigmas: Tensor
    x0: Tensor

    @cached_property
    def decisions(self) -> Decisions:
        """A decision per sample and draw; without density, so old_log_prob is 0 throughout."""
        num = len(self.batch) * self.plan.num_draws
        return Decisions(
            row=torch.arange(num),
            sample=self._order // self.plan.num_draws,
            step=torch.zeros(num, dtype=torch.int64),
            old_log_prob=torch.zeros(num),
            mask=torch.ones(num, dtype=torch.bool),
            sigma=self._sigma_of_unit[self.unit],
            sigma_next=torch.full((num,), torch.nan),
        )

    @property
    def num_rows(self) -> int:
        """One per decision."""
        return len(self.batch) * self.plan.num_draws

    @property
    def tree(self) -> None:
        """No tree: every sample has its own start."""
        return None

    @cached_property
    def unit(self) -> Tensor:
        """Int64 [E], ascending; decisions that share one (sigma, noise) share one."""
        return self._unit_of(self._order)

    def points(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x0 [K, ...], x1 [K, ...], sigma [K]) of the decisions at int64 `index` [K]."""
        x0 = self.x0[self.decisions.sample[index].to(self.x0.device)]
        return at_least_float32(x0), self._noise(self.unit[index]), self._sigma(index)

    @cached_property
    def _keys(self) -> tuple[Tensor, Tensor]:
        """(ids that draws belong to [n], the key of every sample [N], an index into them)."""
        ids = self.batch.group_id if self.plan.shares_draws else self.batch.sample_id
        keys, key_of = torch.unique(ids, return_inverse=True)
        return keys, key_of

    def _unit_of(self, number: Tensor) -> Tensor:
        """The unit of the (sample, draw) pairs with number sample * num_draws + draw."""
        count = self.plan.num_draws
        return self._keys[1][number // count] * count + number % count

    @cached_property
    def _order(self) -> Tensor:
        """The (sample, draw) pairs by unit, so that a unit's decisions are neighbours."""
        numbers = torch.arange(self.num_rows)
        return torch.argsort(self._unit_of(numbers), stable=True)

    @cached_property
    def _sigma_of_unit(self) -> Tensor:
        """[n * num_draws], on the CPU."""
        plan, (keys, _) = self.plan, self._keys
        stream = 1 + plan.num_draws  # the noises are streams 1 to num_draws, x_T is 0
        numbers = sample_uniform(self.batch.seed, keys, (plan.num_draws,), stream=stream)
        if plan.is_stratified:
            numbers = stratified(numbers)
        return plan.sigma_draw(numbers, self.sigmas).flatten()

    def _sigma(self, index: Tensor) -> Tensor:
        return self.decisions.sigma[index].to(self.x0.device)

    def _noise(self, unit: Tensor) -> Tensor:
        """The noise of every unit [K, ...]; a unit's is drawn once."""
        units, place = torch.unique(unit, return_inverse=True)
        ids, draw = self._keys[0][units // self.plan.num_draws], units % self.plan.num_draws
        shape = self.x0.shape[1:]
        noise = torch.empty(len(units), *shape)
        for each in draw.unique().tolist():
            mine = draw == each
            noise[mine] = sample_noise(self.batch.seed, ids[mine], shape, stream=1 + each)
        dtype = torch.promote_types(self.x0.dtype, torch.float32)
        return noise.to(device=self.x0.device, dtype=dtype)[place.to(self.x0.device)]


def evaluate(trajectory: ForwardTrajectory, index: Tensor, velocity: Velocity) -> Matching:
    """The velocity at the decisions `index` int64 [K], and the points at which it was asked for.

    Args:
        trajectory: what the rollout stored.
        index: into `trajectory.decisions`.
        velocity: of the parameter set in use, guided as in the rollout.
    """
    x0, x1, sigma = trajectory.points(index)
    x_t = interpolate(x0, x1, sigma)
    found = velocity(x_t, sigma, trajectory.decisions.sample[index])
    unit = trajectory.unit[index].to(x0.device)
    return Matching(at_least_float32(found), x0, x1, sigma, unit)


class ForwardPolicy(SolvedPolicy):
    """A flow policy that is trained on its clean samples; `evaluate` returns a `Matching`."""

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, plan: ForwardPlan) -> tuple[Rollout, ForwardTrajectory]:
        """One image per sample with its clean latent, which is kept.

        The plan's parameter set draws it; without a solver it is the image of the data set that
        the sample's prompt has for it.
        """
        if plan.solver is None:
            numbered = zip(batch.prompts, batch.member.tolist(), strict=True)
            images = load_images([prompt.images[member] for prompt, member in numbered])
            x0 = self.sampler.encode_images(images)
            return Rollout(batch, x0, 0, lambda _: images), ForwardTrajectory(
                batch, plan, torch.zeros(1), x0
            )
        with self.weights.use(plan.rollout_with):
            rollout, x0, sigmas = self.sampler.solve(
                batch, num_steps=plan.num_steps, solver=plan.solver
            )
        return rollout, ForwardTrajectory(batch, plan, sigmas, x0)

    def evaluate(self, trajectory: ForwardTrajectory, index: Tensor) -> Matching:
        """The points of the decisions at `index` and the velocity there, of the weights in use."""

        def velocity(x_t: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
            return self.sampler.velocity(trajectory.batch, x_t, sigma, sample)

        return evaluate(trajectory, index, velocity)
