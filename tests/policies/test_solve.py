"""The flow policy as the forward policy's sampler: it solves, and looks with the trained network.

Kills, among others: another solver or other noise than said; latents kept that were not decoded;
evaluations that guidance doubles and nobody counts; a velocity without guidance, of another prompt,
or of the network beside the wrapper that a distributed run trains.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowrl.commands.check import network_evals
from flowrl.data.noise import sample_noise
from flowrl.functional.solvers import dpmpp_2m, euler
from flowrl.methods.forward import diffusion_nft
from flowrl.methods.forward_plan import Solver
from flowrl.policies.flow import FlowPolicy
from flowrl.policies.forward import ForwardPolicy
from flowrl.policies.weights import FullWeights
from flowrl.toys import ToyFlowPipeline, flow_prompts
from tests.policies.toy_flow import GROUPS, SIZE, counted, make_batch, make_policy, perturb
from tests.policies.toy_forward import make_forward_policy

N = GROUPS * SIZE


def forward_policy(dtype: torch.dtype = torch.float64, **changes: Any) -> ForwardPolicy:
    """The same weights as `make_forward_policy`, behind the real flow policy."""
    pipeline = ToyFlowPipeline(width=16)
    pipeline.network.to(dtype)
    perturb(pipeline.network, 0.15, seed=1)
    weights = FullWeights(pipeline.network, with_reference=True, with_old=True)
    settings = {"rollout_batch_size": 5, "storage_dtype": dtype, **changes}
    policy = ForwardPolicy(FlowPolicy(pipeline, weights, **settings))
    policy.precompute([prompt.text for prompt in flow_prompts()], None)
    return policy


@pytest.mark.parametrize("solver", ["ode", "dpmpp_2m"])
def test_rollout_and_evaluation_equal_the_naive_sampler(solver: str) -> None:
    plan = diffusion_nft(num_steps=5, solver=solver, num_draws=3).plan(0)
    batch, index = make_batch(), torch.tensor([4, 20, 35])
    real = forward_policy()
    rollout, trajectory = real.rollout(batch, plan)
    x = sample_noise(batch.seed, batch.sample_id, (2,), stream=0, dtype=torch.float64)
    previous: dict[str, Any] = {}
    naive = make_forward_policy().sampler
    for sigma, sigma_next in zip(trajectory.sigmas[:-1], trajectory.sigmas[1:], strict=True):
        level = sigma.double().expand(N)
        velocity = naive.velocity(batch, x, level, torch.arange(N))
        if solver == "ode":
            x = x + (sigma_next - sigma) * velocity
        else:
            x, x0 = dpmpp_2m(x, velocity, sigma, sigma_next, **previous)
            previous = {"previous_x0": x0, "previous_sigma": sigma}
    torch.testing.assert_close(trajectory.x0, x.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rollout.images, real.pipeline.decode(trajectory.x0.float()))
    seen = real.evaluate(trajectory, index)
    sample = trajectory.decisions.sample[index]
    expected = naive.velocity(batch, seen.x_t, seen.sigma, sample)
    torch.testing.assert_close(seen.velocity, expected, check_dtype=False, rtol=1e-6, atol=1e-6)


def test_solvers_differ_and_euler_is_the_sampler_of_the_evaluation() -> None:
    policy, batch = forward_policy(), make_batch()

    def end(solver: Solver) -> torch.Tensor:
        return policy.sampler.solve(batch, num_steps=4, solver=solver)[0].images

    assert torch.equal(end(euler), policy.sample(batch, num_steps=4, guidance_scale=1.0).images)
    assert not torch.allclose(end(euler), end(dpmpp_2m), atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_evaluations_of_a_forward_rollout_are_the_closed_form(guidance_scale: float) -> None:
    policy = forward_policy(guidance_scale=guidance_scale)
    plan = diffusion_nft(num_steps=5).plan(0)
    per_row = 1 if guidance_scale == 1 else 2
    forwards, trained = network_evals(plan, GROUPS, SIZE)
    assert (forwards, trained) == (5 * N, 4 * N)
    with counted(policy.weights.network) as count:
        rollout, trajectory = policy.rollout(make_batch(), plan)
    assert count.rows == rollout.network_evals == forwards * per_row
    assert trajectory.num_rows == trained
    with counted(policy.weights.network) as count:
        policy.evaluate(trajectory, torch.arange(trained))
    assert (count.rows, count.calls) == (trained * per_row, 1)


def test_training_goes_through_the_wrapper_and_is_guided() -> None:
    policy = forward_policy(guidance_scale=3.0)
    _, trajectory = policy.rollout(make_batch(), diffusion_nft(num_steps=4).plan(0))
    index = torch.arange(5)
    guided = policy.evaluate(trajectory, index).velocity.detach()
    network = policy.weights.network
    policy.training_network = torch.nn.Sequential()  # what a wrapper would be: another module
    assert policy.sampler.training_network is policy.training_network is not network
    policy.training_network = network
    policy.sampler.guidance_scale = 1.0  # type: ignore[attr-defined]
    conditional = policy.evaluate(trajectory, index).velocity.detach()
    assert (guided - conditional).abs().max() > 0.05


def test_old_draws_where_the_plan_says_so_and_is_put_back() -> None:
    policy, batch = forward_policy(), make_batch()
    plan = diffusion_nft(num_steps=4).plan(0)
    before = policy.rollout(batch, plan)[1].x0
    perturb(policy.weights.network, 0.2, seed=3)
    assert torch.equal(policy.rollout(batch, plan)[1].x0, before)
    policy.weights.update_old(0.0)
    assert not torch.equal(policy.rollout(batch, plan)[1].x0, before)


def test_latents_are_kept_as_they_are_decoded() -> None:
    policy = forward_policy(torch.float32, storage_dtype=torch.bfloat16)
    rollout, trajectory = policy.rollout(make_batch(), diffusion_nft(num_steps=4).plan(0))
    assert trajectory.x0.dtype == torch.bfloat16
    assert torch.equal(rollout.images, policy.pipeline.decode(trajectory.x0.float()))


def test_a_step_policy_keeps_its_units_whole_too() -> None:
    from flowrl.methods.flow import mix_grpo

    plan = mix_grpo(num_steps=8, window=2).plan(0)
    trajectory = make_policy().rollout(make_batch(), plan)[1]
    assert torch.equal(trajectory.unit, trajectory.decisions.row)
