"""How far a parameter set is from the base model: one number, comparable between runs on one base.

The root of the mean square by which it differs from the base in what the network predicts, where
the base itself goes: on points of its own samples, drawn once and the same ever after. So it is 0
for the base, does not depend on the method, its sampler or its noise, and costs a forward a point.
It is the x axis of the curves of over-optimisation, as the KL is in Gao et al., arXiv:2210.10760.
Reading order: `VelocityDistance`; `TokenDistance` is its analogue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.data.noise import sample_noise
from flowrl.functional.flow import interpolate
from flowrl.functional.solvers import euler
from flowrl.policies.flow import FlowPolicy, guidance_rows
from flowrl.policies.token import TokenPolicy, TokenTrajectory
from flowrl.types import PromptBatch

SIGMAS = (0.125, 0.375, 0.625, 0.875)  # midpoints of four equal parts: a mean over sigma
MAX_SAMPLES = 32


class VelocityDistance:
    """Root mean square of velocity - base velocity, over points and latent dims; from 0 up.

    The points are the base's samples of a batch, noised afresh at `SIGMAS`; both velocities are
    guided as in the rollout. Of a kernel, one step's KL divergence from the base per latent dim is
    the square of it (at that sigma) times (d mean / d velocity)^2 / (2 std^2), Flow-GRPO,
    arXiv:2505.05470, section 4.2: dt^2 / (2 std^2) where the mean is Euler's.

    Args:
        policy: its weights must have a reference, which is the base.
        batch: the samples, the same on all ranks; each rank computes all of them, so that no rank
            makes a forward that others do not.
        num_steps: Euler steps to the base's samples.
    """

    def __init__(self, policy: FlowPolicy, batch: PromptBatch, *, num_steps: int) -> None:
        self.policy = policy
        self.batch = batch
        self.num_steps = num_steps
        self._sample = torch.arange(len(batch)).repeat(len(SIGMAS))
        self._sigma = torch.tensor(SIGMAS).repeat_interleave(len(batch))
        self._states: Tensor | None = None
        self._base = torch.empty(0)

    @property
    def network_evals(self) -> tuple[int, int]:
        """(rows of the first call, rows of every further one); guidance counts as two."""
        guided = guidance_rows(self.policy.pipeline, self.policy.guidance_scale)
        rows = len(self._sample) * guided
        return rows + rows + len(self.batch) * self.num_steps * guided, rows

    @torch.no_grad()
    def __call__(self, weights: str) -> float:
        """The distance of the parameter set `weights`.

        Raises:
            ConfigError: the run does not keep it, or no reference.
        """
        if self._states is None:
            with self.policy.weights.use("reference"):
                self._states = self._noised()
                self._base = self._velocities(self._states)
        with self.policy.weights.use(weights):
            return _root_mean_square(self._velocities(self._states) - self._base)

    def _noised(self) -> Tensor:
        """Points x_t of the base's samples, [len(SIGMAS) * N, ...], on the CPU."""
        _, x0, _ = self.policy.solve(self.batch, num_steps=self.num_steps, solver=euler)
        x0 = x0.cpu().float()
        noise = [
            sample_noise(self.batch.seed, self.batch.sample_id, x0.shape[1:], stream=1 + level)
            for level in range(len(SIGMAS))
        ]
        return interpolate(x0[self._sample], torch.cat(noise), self._sigma)

    def _velocities(self, states: Tensor) -> Tensor:
        """Of the weights in use, as `states`."""
        policy = self.policy
        guided = guidance_rows(policy.pipeline, policy.guidance_scale)
        size = max(1, policy.rollout_batch_size // guided)
        points = (states, self._sigma, self._sample)
        parts = zip(*(each.split(size) for each in points), strict=True)
        return torch.cat(
            [policy.velocity(self.batch, x.to(policy.device), s, i).cpu() for x, s, i in parts]
        )


class TokenDistance:
    """Root mean square of log_prob - base log_prob, over tokens that the base drew; from 0 up.

    Half its square estimates the KL divergence of a token (`functional.regularizers.k2`).

    Args:
        policy, batch: as VelocityDistance's.
    """

    def __init__(self, policy: TokenPolicy, batch: PromptBatch) -> None:
        self.policy = policy
        self.batch = batch
        self._drawn: TokenTrajectory | None = None

    @property
    def network_evals(self) -> tuple[int, int]:
        """(rows of the first call, rows of every further one)."""
        policy, num = self.policy, len(self.batch)
        return num * (policy.rows_per_draw + 2 * policy.rows_per_score), num * policy.rows_per_score

    @torch.no_grad()
    def __call__(self, weights: str) -> float:
        """The distance of the parameter set `weights`; raises as VelocityDistance."""
        if self._drawn is None:
            with self.policy.weights.use("reference"):
                _, self._drawn = self.policy.rollout(self.batch, None)
        size = max(1, self.policy.rollout_batch_size // self.policy.rows_per_score)
        parts = torch.arange(len(self.batch)).split(size)
        with self.policy.weights.use(weights):
            new = [self.policy.evaluate(self._drawn, part).log_prob.cpu() for part in parts]
        return _root_mean_square(torch.cat(new) - self._drawn.decisions.old_log_prob)


def _root_mean_square(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())
