"""The distance from the base against closed forms, its cost, and what it says about a KL.

Kills, among others: a mean in place of the root of a mean square; the wrong weights as the base;
points that move between two calls; points or chunks that weigh differently; guidance left out.
"""

from __future__ import annotations

import pytest
import torch

from flowrl.data.sampler import eval_batch
from flowrl.functional.regularizers import gaussian_kl
from flowrl.methods.spec import StepPlan, flow_sde_kernel, transition_scales
from flowrl.policies.distance import TokenDistance, VelocityDistance
from flowrl.policies.flow import FlowPolicy
from flowrl.policies.token import TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.toys import ToyFlowPipeline, ToyTokenPipeline, flow_prompts, token_prompts
from flowrl.types import PromptBatch

STEPS, SHIFT = 5, (0.3, -0.4)


def batch_of(prompts) -> PromptBatch:
    return eval_batch(prompts, samples_per_prompt=2, seed=7, rank=0, world_size=1)


def flow(*, chunk: int = 64, guidance_scale: float = 1.0) -> FlowPolicy:
    pipeline = ToyFlowPipeline(width=8)
    weights = FullWeights(pipeline.network, with_reference=True, ema_decay=0.9)
    policy = FlowPolicy(
        pipeline, weights, rollout_batch_size=chunk, guidance_scale=guidance_scale
    )  # fmt: skip
    policy.precompute([prompt.text for prompt in flow_prompts()], None)
    return policy


def moved(policy: FlowPolicy) -> FlowPolicy:
    """With the same velocity added to that of the base at every point."""
    policy.weights.network.leave.bias.data += torch.tensor(SHIFT)
    return policy


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("chunk", [3, 64])
def test_a_shift_of_the_velocity_is_its_root_mean_square(chunk, guidance_scale) -> None:
    policy = flow(chunk=chunk, guidance_scale=guidance_scale)
    distance = VelocityDistance(policy, batch_of(flow_prompts()), num_steps=STEPS)
    assert distance("current") == distance("ema") == 0.0
    moved(policy)
    # (0.3^2 + 0.4^2) / 2 = 0.125; guidance of equal shifts is that shift.
    assert distance("current") == pytest.approx(0.125**0.5, rel=1e-5)
    assert distance("ema") == 0.0
    assert distance("reference") == 0.0


def test_the_points_are_the_bases_own_even_when_first_asked_for_late() -> None:
    early, late = flow(), flow()
    ours, theirs = (
        VelocityDistance(p, batch_of(flow_prompts()), num_steps=STEPS) for p in (early, late)
    )
    ours("current")
    for policy in (early, late):  # so that the change differs from point to point
        torch.nn.init.normal_(
            policy.weights.network.leave.weight, generator=torch.Generator().manual_seed(1)
        )
    before = [p.clone() for p in late.weights.trainable()]
    assert ours("current") == theirs("current") > 0.1
    assert all(a.equal(b) for a, b in zip(before, late.weights.trainable(), strict=True))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_it_costs_what_it_says(guidance_scale) -> None:
    policy = flow(chunk=10, guidance_scale=guidance_scale)
    distance = VelocityDistance(policy, batch_of(flow_prompts()), num_steps=STEPS)
    rows = []
    policy.weights.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    counted = []
    for _ in range(2):
        distance("current")
        counted.append(sum(rows))
        rows.clear()
    assert tuple(counted) == distance.network_evals
    guided = 1 if guidance_scale == 1 else 2
    # 8 samples at 4 levels: twice, and 5 steps to each; then once.
    assert tuple(counted) == ((32 + 32 + 8 * STEPS) * guided, 32 * guided)


def test_the_kl_of_a_step_is_its_square_times_the_kernels_factor() -> None:
    policy = flow()
    distance = VelocityDistance(policy, batch_of(flow_prompts()), num_steps=STEPS)
    distance("current")
    moved(policy)
    squared = distance("current") ** 2
    kernel = flow_sde_kernel(0.7)
    plan = StepPlan(num_steps=8, kernel=kernel, stochastic=tuple(range(8)), trained=())
    sigmas = policy.pipeline.sigmas(8)
    slopes, stds = transition_scales(plan, sigmas)
    x_t, base = torch.randn(2, 1, 2, generator=torch.Generator().manual_seed(0))
    for step in range(1, 8):
        levels = (sigmas[step], sigmas[step + 1], sigmas[1])
        mean, std = kernel(x_t, base + torch.tensor(SHIFT), *levels)
        kl = gaussian_kl(mean, kernel(x_t, base, *levels)[0], std)
        factor = slopes[step] ** 2 / (2 * stds[step] ** 2)
        torch.testing.assert_close(kl[0], factor * squared, rtol=1e-4, atol=0)


def test_tokens_are_compared_where_the_base_drew_them() -> None:
    pipeline = ToyTokenPipeline(width=8)
    policy = TokenPolicy(
        pipeline, FullWeights(pipeline.network, with_reference=True), rollout_batch_size=3,
        decode_batch_size=8, device="cpu",
    )  # fmt: skip
    batch = batch_of(token_prompts()[:4])
    distance = TokenDistance(policy, batch)
    rows = []
    pipeline.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    assert distance("current") == 0.0
    first = sum(rows)
    tokens = distance._drawn.tokens
    pipeline.network.head.bias.data[5] += 1.0
    rows.clear()
    found = distance("current")
    assert (first, sum(rows)) == distance.network_evals == (8 * (16 + 2), 8)
    # One of 16 equal logits raised by 1: log-probs fall by log((15 + e) / 16), its own by 1 less.
    fall = -torch.log((15 + torch.tensor(1.0).exp()) / 16)
    change = torch.where(tokens == 5, fall + 1, fall)
    assert found == pytest.approx(float(change.square().mean().sqrt()), rel=1e-5)
    assert 0 < int((tokens == 5).sum()) < tokens.numel()
