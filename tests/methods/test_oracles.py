"""Every method equals its naive single-file oracle: states, advantages, loss and gradient, float64.

On the first pass and after the weights have moved, when ratios differ from 1 and some are clipped.
Kills, among others: a sibling scored from another's parent; log-probs and states that belong to
different steps; a mask off by one step; a mean over samples instead of decisions; a gradient
through old log-probs, stored states or the reference; the reference taken for the old policy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowrl.data.noise import sample_noise
from flowrl.data.sampler import GroupSampler
from flowrl.functional.aggregate import aggregate
from flowrl.methods import METHODS, Method
from flowrl.methods.spec import shared_start
from flowrl.policies.flow import FlowPolicy, FlowTrajectory
from flowrl.policies.token import Sampling, TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.toys import ToyTokenPipeline, token_prompts
from flowrl.types import Chunk, PromptBatch, Scores
from tests.methods import guarded_oracles, oracles
from tests.policies.toy_flow import make_batch, make_policy, perturb

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
WEIGHTS = (1.0, 0.5)


@dataclass(frozen=True)
class Case:
    """A method with its arguments, the same for the oracle, at one training step."""

    name: str
    args: dict[str, Any]
    kernel: str
    step: int = 0
    guidance_scale: float = 1.0

    @property
    def method(self) -> Method:
        return METHODS[self.name](**self.args)

    @property
    def noise_level(self) -> float:
        return self.args.get("noise_level", NOISE_LEVEL.get(self.name, 0.7))


CASES = {
    "flow_grpo": Case("flow_grpo", {"num_steps": 5}, "flow_sde"),
    "flow_grpo, paper KL": Case("flow_grpo", {"num_steps": 5, "kl_coef": 0.3}, "flow_sde"),
    "flow_grpo, code KL": Case(
        "flow_grpo", {"num_steps": 5, "kl_coef": 0.3, "kl": "code"}, "flow_sde"
    ),
    "flow_grpo, cps with KL": Case(
        "flow_grpo", {"num_steps": 4, "kernel": "cps", "kl_coef": 0.3}, "cps"
    ),
    "flow_grpo, std of the group, guided": Case(
        "flow_grpo", {"num_steps": 4, "advantage_std": "group"}, "flow_sde", guidance_scale=3.0
    ),
    "dance_grpo": Case("dance_grpo", {"num_steps": 6}, "dance_sde"),
    "dance_grpo, best of N": Case("dance_grpo", {"num_steps": 6, "num_extremes": 1}, "dance_sde"),
    "flow_grpo_fast": Case(
        "flow_grpo_fast", {"num_steps": 8, "window": 2, "clip_range": 1e-4}, "cps", step=2
    ),
    "flow_grpo_fast from one start": Case(
        "flow_grpo_fast",
        {"num_steps": 8, "window": 2, "clip_range": 1e-4, "shared_noise": True},
        "cps",
        step=2,
    ),
    "mix_grpo at 0": Case("mix_grpo", {"num_steps": 8, "window": 3, "interval": 1}, "flow_sde"),
    "mix_grpo at 3 with KL": Case(
        "mix_grpo",
        {"num_steps": 8, "window": 2, "interval": 1, "kl_coef": 0.3},
        "flow_sde",
        step=3,
    ),
    "pref_grpo": Case("pref_grpo", {"num_steps": 6}, "flow_sde"),
    "flow_gdpo": Case("flow_gdpo", {"num_steps": 5, "kl_coef": 0.3}, "flow_sde"),
}
NOISE_LEVEL = {"flow_grpo_fast": 0.8, "dance_grpo": 0.3, "flow_dppo": 1.2}  # else 0.7


def float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def two_rewards(count: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return (drawn * torch.tensor([[1.0], [9.0]])).tolist()


def scores(rewards: list[list[float]]) -> Scores:
    named = {name: float64(r) for name, r in zip("ab", rewards, strict=True)}
    return Scores(named, dict(zip("ab", WEIGHTS, strict=True)), torch.ones(len(rewards[0])).bool())


def framework_loss(
    policy: Any, trajectory: Any, method: Method, advantages: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of all decisions in one chunk, in the trainer's order, and its metrics where trained."""
    data = trajectory.decisions
    if method.prune is not None:
        kept = method.prune(advantages, trajectory.batch.group_id, None)
        data = replace(data, mask=data.mask & kept[data.sample])
    index = torch.arange(len(data.row))
    advantage = advantages[data.sample]
    advantage = advantage.reshape(advantage.shape + (1,) * (data.mask.ndim - 1))
    new, reference = policy.evaluate(trajectory, index), None
    if "reference" in method.objective.needs.sets:
        with torch.no_grad(), policy.weights.use("reference"):
            reference = policy.evaluate(trajectory, index)
    loss = method.objective(new, None, reference, Chunk(data, advantage.expand(data.mask.shape)))
    metrics = {name: values[data.mask] for name, values in loss.metrics.items()}
    return aggregate(loss.values, data.mask, float(data.mask.sum())), metrics


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    parts = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    pairs = zip(parts, network.parameters(), strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
    )


def field(policy: FlowPolicy, network: nn.Module, batch: PromptBatch) -> oracles.Velocity:
    """The guided velocity of one sample at one state, by separate forwards."""

    def velocity(x: Tensor, sigma: float, sample: int) -> Tensor:
        def at(prompt: str) -> Tensor:
            rows = policy.pipeline.encode([prompt])
            return policy.pipeline.velocity(network, x[None], float64([sigma]), rows)[0]

        scale = policy.guidance_scale
        conditional = at(batch.prompts[sample].text)
        return conditional if scale == 1 else at("") + scale * (conditional - at(""))

    return velocity


def extreme(advantages: Sequence[float], groups: Sequence[int]) -> set[int]:
    """The best and the worst sample of every group."""
    kept = set()
    for group in set(groups):
        members = [index for index, its in enumerate(groups) if its == group]
        members.sort(key=lambda index: advantages[index])
        kept |= {members[0], members[-1]}
    return kept


def kept_steps(trajectory: FlowTrajectory) -> list[list[int]]:
    """The trained steps of each sample."""
    data, sigmas = trajectory.decisions, trajectory.sigmas.tolist()
    kept: list[list[int]] = [[] for _ in range(len(trajectory.batch))]
    for sample, sigma, mask in zip(data.sample, data.sigma, data.mask, strict=True):
        if mask:
            kept[int(sample)].append(sigmas.index(float(sigma)))
    return kept


def naive_chains(
    policy: FlowPolicy, case: Case, batch: PromptBatch, old: oracles.Velocity
) -> oracles.Chains:
    """The rollout again, each sample for itself, from the noise that belongs to it."""
    plan = case.method.plan(case.step)
    keys = batch.group_id if plan.keys is shared_start else batch.sample_id

    def draw(ids: Tensor, stream: int) -> Tensor:
        return sample_noise(batch.seed, ids, (2,), stream=stream, dtype=torch.float64)

    noise = torch.stack([draw(batch.sample_id, 1 + i) for i in range(plan.num_steps)], dim=1)
    return oracles.rollout(
        old,
        case.kernel,
        case.noise_level,
        policy.pipeline.sigmas(plan.num_steps).tolist(),
        plan.stochastic,
        list(draw(keys, 0)),
        [list(rows) for rows in noise],
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_flow_method_equals_its_oracle(case: Case) -> None:
    policy = make_policy(guidance_scale=case.guidance_scale, with_reference=True)
    method, batch = case.method, make_batch()
    network = policy.weights.network
    reference = field(policy, copy.deepcopy(network), batch)
    perturb(network, 0.02, seed=2)  # the behaviour policy is not the reference
    old = field(policy, copy.deepcopy(network), batch)
    rollout, trajectory = policy.rollout(batch, method.plan(case.step))

    chains = naive_chains(policy, case, batch, old)
    for step, level in enumerate(trajectory.levels):
        if level.states is not None and len(level.states) == len(batch):
            expected = torch.stack([chain[step] for chain in chains])
            torch.testing.assert_close(level.states, expected, **CLOSE)
    ends = torch.stack([chain[-1] for chain in chains])
    torch.testing.assert_close(rollout.images, policy.pipeline.decode(ends))

    rewards, groups = two_rewards(len(batch)), batch.group_id.tolist()
    if case.name in ("flow_grpo", "flow_grpo_fast"):
        scope = case.args.get("advantage_std", "global")
        expected_advantages = oracles.summed_advantages(rewards, groups, WEIGHTS, scope)
    elif case.name == "flow_gdpo":
        expected_advantages = guarded_oracles.gdpo_advantages(rewards, groups, WEIGHTS)
    else:
        expected_advantages = oracles.normalized_advantages(rewards, groups, WEIGHTS)
    advantages = method.advantage(scores(rewards), batch.group_id)
    torch.testing.assert_close(advantages, float64(expected_advantages), **CLOSE)

    steps = kept_steps(trajectory)
    if "num_extremes" in case.args:
        trained = extreme(expected_advantages, groups)
        assert len(trained) < len(batch)
        steps = [rows if index in trained else [] for index, rows in enumerate(steps)]
    for moved in (False, True):
        if moved:
            perturb(network, 1e-3, seed=3)
        loss, metrics = framework_loss(policy, trajectory, method, advantages)
        expected_loss = oracles.flow_loss(
            field(policy, network, batch),
            old,
            reference,
            chains,
            steps,
            expected_advantages,
            kernel=case.kernel,
            noise_level=case.noise_level,
            sigmas=trajectory.sigmas.tolist(),
            clip=1e-4,
            kl_coef=method.objective.kl_coef,
            kl=case.args.get("kl", "paper"),
        )
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        expected_gradient = gradient(expected_loss, network)
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient(loss, network), expected_gradient, **CLOSE)
        bound = (metrics["clip_frac_high"] + metrics["clip_frac_low"]).mean()
        assert 0.2 < bound < 0.8 if moved else metrics["ratio_max_dev"].max() < 1e-12
        assert method.objective.kl_coef == 0 or metrics["kl"].min() > 0


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_token_grpo_equals_its_oracle(kl_coef: float) -> None:
    method = METHODS["grpo"](clip_low=0.01, clip_high=0.03, kl_coef=kl_coef)
    pipeline = ToyTokenPipeline(width=8)
    network = pipeline.network.double()
    perturb(network, 0.5, seed=1)
    reference = copy.deepcopy(network)
    policy = TokenPolicy(
        pipeline,
        FullWeights(network, with_reference=True),
        sampling=Sampling(temperature=0.8),
        rollout_batch_size=7,
        decode_batch_size=7,
        device="cpu",
    )
    perturb(network, 0.02, seed=2)
    old = copy.deepcopy(network)
    batch = token_batch()
    _, trajectory = policy.rollout(batch, method.plan(0))
    tokens, prompt = trajectory.tokens, pipeline.encode([p.text for p in batch.prompts])["prompt"]

    rewards, groups = two_rewards(len(batch)), batch.group_id.tolist()
    expected_advantages = oracles.summed_advantages(rewards, groups, WEIGHTS, "group")
    advantages = method.advantage(scores(rewards), batch.group_id)
    torch.testing.assert_close(advantages, float64(expected_advantages), **CLOSE)

    for moved in (False, True):
        if moved:
            perturb(network, 0.01, seed=3)
        loss, metrics = framework_loss(policy, trajectory, method, advantages)
        expected_loss = oracles.token_loss(
            network(tokens, prompt),
            old(tokens, prompt),
            reference(tokens, prompt),
            tokens,
            expected_advantages,
            temperature=0.8,
            clip_low=0.01,
            clip_high=0.03,
            kl_coef=kl_coef,
        )
        torch.testing.assert_close(loss, expected_loss, **CLOSE)
        expected_gradient = gradient(expected_loss, network)
        assert expected_gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient(loss, network), expected_gradient, **CLOSE)
        bound = [metrics[f"clip_frac_{side}"].mean() for side in ("low", "high")]
        assert min(bound) > 0.05 if moved else metrics["ratio_max_dev"].max() < 1e-12


def token_batch() -> PromptBatch:
    sampler = GroupSampler(
        token_prompts(),
        num_groups=3,
        group_size=4,
        updates_per_rollout=1,
        seed=0,
        shuffle=True,
        rank=0,
        world_size=1,
    )
    return sampler(2)
