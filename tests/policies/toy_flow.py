"""The 2-D flow toy as a policy whose network matters: every parameter is drawn, none is zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowrl.data.sampler import GroupSampler
from flowrl.policies.flow import FlowPolicy
from flowrl.policies.weights import FullWeights
from flowrl.toys import ToyFlowPipeline, flow_prompts
from flowrl.types import PromptBatch

GROUPS, SIZE = 3, 4


def make_policy(
    *,
    dtype: torch.dtype = torch.float64,
    guidance_scale: float = 1.0,
    rollout_batch_size: int = 64,
    decode_batch_size: int = 64,
    storage_dtype: torch.dtype | None = None,
    with_reference: bool = False,
) -> FlowPolicy:
    """The same network for every caller; float64 unless said, so that rounding hides nothing."""
    pipeline = ToyFlowPipeline(width=16)
    perturb(pipeline.network, 0.15, seed=1)  # larger, and guided points leave the canvas
    pipeline.network.to(dtype)
    policy = FlowPolicy(
        pipeline,
        FullWeights(pipeline.network, with_reference=with_reference),
        guidance_scale=guidance_scale,
        rollout_batch_size=rollout_batch_size,
        decode_batch_size=decode_batch_size,
        storage_dtype=storage_dtype or dtype,
    )
    policy.precompute([prompt.text for prompt in flow_prompts()], None)
    return policy


def make_batch(
    *, groups: int = GROUPS, size: int = SIZE, rank: int = 0, world_size: int = 1
) -> PromptBatch:
    """A rank's samples of training step 5."""
    sampler = GroupSampler(
        flow_prompts(),
        num_groups=groups,
        group_size=size,
        updates_per_rollout=1,
        seed=0,
        shuffle=True,
        rank=rank,
        world_size=world_size,
    )
    return sampler(5)


@torch.no_grad()
def perturb(network: nn.Module, size: float, *, seed: int) -> None:
    """Adds size * N(0, 1) to every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_((size * noise).to(parameter.dtype))


@dataclass
class Count:
    """Rows that went through the network, and calls of it."""

    rows: int = 0
    calls: int = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Count]:
    """Inside the `with`, every forward of the network is counted."""
    count = Count()

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        count.rows += len(args[0])
        count.calls += 1

    handle = network.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()
