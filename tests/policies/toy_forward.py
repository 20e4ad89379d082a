"""The 2-D flow toy behind the forward policy: a solver, a velocity, and two parameter sets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.data.noise import sample_noise
from flowrl.functional.solvers import euler
from flowrl.methods.forward_plan import Solver
from flowrl.policies.forward import ForwardPolicy
from flowrl.toys import ToyFlowPipeline
from flowrl.types import PromptBatch, Rollout
from tests.policies.toy_flow import perturb


class TwoSets:
    """Current and old, a copy of what current was; they change places in one network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.old = copy.deepcopy(network.state_dict())

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        if name != "old":
            assert name == "current"
            yield
            return
        current = copy.deepcopy(self.network.state_dict())
        self.network.load_state_dict(self.old)
        try:
            yield
        finally:
            self.network.load_state_dict(current)

    def update_old(self, decay: float) -> None:
        """Moves old towards current, of which it keeps `decay` of itself."""
        for name, value in self.network.state_dict().items():
            self.old[name].lerp_(value, 1 - decay)

    def trainable(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def update_ema(self, num_updates: int) -> None:
        """No average is kept."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self.network.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state)

    def save(self, pipeline: Any, folder: Path) -> None:
        pipeline.save_full(folder)


class ToySampler:
    """What `ForwardPolicy` asks of a flow policy, naively, unguided and in float64."""

    def __init__(self, pipeline: ToyFlowPipeline) -> None:
        self.pipeline = pipeline
        self.training_network: nn.Module = pipeline.network
        self.weights = TwoSets(pipeline.network)

    def solve(
        self, batch: PromptBatch, *, num_steps: int, solver: Solver
    ) -> tuple[Rollout, Tensor, Tensor]:
        sigmas = self.pipeline.sigmas(num_steps)
        x = sample_noise(batch.seed, batch.sample_id, (2,), stream=0, dtype=torch.float64)
        everyone = torch.arange(len(batch))
        for sigma, sigma_next in pairwise(sigmas):
            level = sigma.double().expand(len(x))
            x, _ = solver(x, self.velocity(batch, x, level, everyone), level, sigma_next)
        return Rollout(batch, x, len(x) * num_steps, self.pipeline.decode), x, sigmas

    def velocity(self, batch: PromptBatch, x_t: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
        return self.field(self.pipeline.network)(batch, x_t, sigma, sample)

    def field(self, network: nn.Module) -> Callable[..., Tensor]:
        """The velocity of another network of the same pipeline."""

        def velocity(batch: PromptBatch, x_t: Tensor, sigma: Tensor, sample: Tensor) -> Tensor:
            rows = self.pipeline.encode([batch.prompts[i].text for i in sample.tolist()])
            return self.pipeline.velocity(network, x_t, sigma, rows)

        return velocity

    def sample(self, batch: PromptBatch, *, num_steps: int, guidance_scale: float) -> Rollout:
        assert guidance_scale == 1
        return self.solve(batch, num_steps=num_steps, solver=euler)[0]

    def precompute(self, prompts: Sequence[str], folder: Path | None) -> None:
        """Nothing: prompts are encoded when they are asked for."""

    def save(self, folder: Path) -> None:
        self.weights.save(self.pipeline, folder)


def make_forward_policy(*, size: float = 0.15) -> ForwardPolicy:
    """The same network for every caller, float64; size 0 leaves the exact base."""
    pipeline = ToyFlowPipeline(width=16)
    pipeline.network.double()
    perturb(pipeline.network, size, seed=1)
    return ForwardPolicy(ToySampler(pipeline))
