"""Every forward objective equals its naive oracle in loss and gradient (float64), and learns a toy.

Kills, among others: old taken for the reference; a gradient through either, or through a weight;
noise of another sample; a group's weight from another draw; a pair's loss counted once instead of
for both; the code's factor 5; a ratio off-policy by default; a penalty without its coefficient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flowrl.data.noise import sample_noise
from flowrl.functional.advantages import group_normalized
from flowrl.functional.aggregate import aggregate
from flowrl.functional.matching import Matching
from flowrl.functional.selection import best_and_worst, best_of_group
from flowrl.functional.sigma_draws import logit_normal_sigma, schedule_steps
from flowrl.methods.forward_objectives import (
    NFT_LOSSES,
    WEIGHTINGS,
    GroupPreference,
    MatchedRatio,
    NegativeAware,
    PairPreference,
    WeightedMatching,
    old_decay,
)
from flowrl.methods.forward_plan import ForwardPlan
from flowrl.methods.spec import Loss, Objective
from flowrl.policies import forward
from flowrl.policies.forward import ForwardPolicy, ForwardTrajectory
from flowrl.toys import TargetReward
from flowrl.types import Chunk
from tests.methods import forward_oracles as oracles
from tests.policies.toy_flow import GROUPS, SIZE, make_batch, perturb
from tests.policies.toy_forward import make_forward_policy

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@dataclass(frozen=True)
class World:
    """A rollout, and three parameter sets: current (moved), old and reference."""

    policy: ForwardPolicy
    trajectory: ForwardTrajectory
    old: nn.Module
    reference: nn.Module

    def seen(self, network: nn.Module, index: Tensor) -> Matching:
        field = self.policy.sampler.field(network)  # type: ignore[attr-defined]
        return forward.evaluate(self.trajectory, index, partial(field, self.trajectory.batch))

    def loss(
        self,
        objective: Objective,
        advantages: Tensor,
        index: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Loss]:
        """The mean over all decisions (of the samples to keep), of those at `index` alone."""
        data = self.trajectory.decisions
        index = torch.arange(len(data.row)) if index is None else index
        kept = data.mask if keep is None else keep[data.sample]
        chunk = Chunk(data.select(index), advantages[data.sample[index]])
        new = self.policy.evaluate(self.trajectory, index)
        with torch.no_grad():
            old, reference = self.seen(self.old, index), self.seen(self.reference, index)
        loss = objective(new, old, reference, chunk)
        return aggregate(loss.values, kept[index], float(kept.sum())), loss

    def field(self, network: nn.Module) -> oracles.Velocity:
        """The velocity of one sample at one point, by a forward of its own."""
        many = self.policy.sampler.field(network)  # type: ignore[attr-defined]

        def velocity(x: Tensor, sigma: float, sample: int) -> Tensor:
            level = torch.tensor([sigma], dtype=torch.float64)
            return many(self.trajectory.batch, x[None], level, torch.tensor([sample]))[0]

        return velocity

    @property
    def network(self) -> nn.Module:
        return self.policy.weights.network

    def draws(self) -> oracles.Draws:
        """The (sigma, noise) of every sample and draw, the noise drawn one by one."""
        trajectory = self.trajectory
        batch, data, count = trajectory.batch, trajectory.decisions, trajectory.plan.num_draws
        keys = batch.group_id if trajectory.plan.shares_draws else batch.sample_id
        result = []
        for n in range(len(batch)):
            sigmas = data.sigma[data.sample == n].tolist()
            noises = [
                sample_noise(batch.seed, keys[n : n + 1], (2,), stream=1 + k, dtype=torch.float64)
                for k in range(count)
            ]
            result.append([(s, noise[0]) for s, noise in zip(sigmas, noises, strict=True)])
        return result


def make_world(*, shares_draws: bool = False, moved: float = 0.05) -> World:
    policy = make_forward_policy()
    reference = copy.deepcopy(policy.weights.network)
    perturb(policy.weights.network, 0.05, seed=2)
    old = copy.deepcopy(policy.weights.network)
    plan = ForwardPlan(3, 2, logit_normal_sigma, shares_draws=shares_draws)
    trajectory = policy.rollout(make_batch(), plan)[1]
    perturb(policy.weights.network, moved, seed=3)
    return World(policy, trajectory, old, reference)


def drawn_advantages(scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return scale * torch.randn(GROUPS * SIZE, dtype=torch.float64, generator=generator)


def gradient(loss: Tensor, network: nn.Module) -> Tensor:
    parts = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    pairs = zip(parts, network.parameters(), strict=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
    )


def assert_equal(world: World, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, **CLOSE)
    wanted = gradient(expected, world.network)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient(loss, world.network), wanted, **CLOSE)


def sets(world: World) -> tuple[oracles.Velocity, oracles.Velocity, oracles.Velocity]:
    return tuple(world.field(n) for n in (world.network, world.old, world.reference))  # type: ignore[return-value]


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_nft_equals_its_oracle(form: str, mix: float, kl_coef: float) -> None:
    world, advantages = make_world(), drawn_advantages()
    scale = 5.0 if form == "code" else 1.0
    objective = NegativeAware(NFT_LOSSES[form], mix=mix, scale=scale, kl_coef=kl_coef)
    loss, _ = world.loss(objective, advantages)
    expected = oracles.nft_loss(
        *sets(world),
        list(world.trajectory.x0),
        world.draws(),
        advantages.tolist(),
        form=form,
        beta=mix,
        kl_coef=kl_coef,
    )
    assert_equal(world, loss, expected)


@pytest.mark.parametrize("is_off_policy", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_awm_equals_its_oracle(weighting: str, is_off_policy: bool) -> None:
    world, advantages = make_world(), drawn_advantages()
    objective = MatchedRatio(WEIGHTINGS[weighting], 0.02, 0.02, is_off_policy, 0.3, 0.2)
    loss, record = world.loss(objective, advantages)
    expected = oracles.awm_loss(
        *sets(world),
        list(world.trajectory.x0),
        world.draws(),
        advantages.tolist(),
        weighting=weighting,
        clip=0.02,
        off_policy=is_off_policy,
        kl_coef=0.3,
        old_kl_coef=0.2,
    )
    assert_equal(world, loss, expected)
    bound = record.metrics["clip_frac"].mean()
    assert 0.1 < bound < 0.8 if is_off_policy else (record.metrics["ratio_mean"] == 1).all()


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_rwr_equals_its_oracle(kl_coef: float) -> None:
    world, weights = make_world(), drawn_advantages().abs()
    loss, _ = world.loss(WeightedMatching(kl_coef), weights)
    expected = oracles.rwr_loss(
        world.field(world.network),
        world.field(world.reference),
        list(world.trajectory.x0),
        world.draws(),
        weights.tolist(),
        kl_coef=kl_coef,
    )
    assert_equal(world, loss, expected)


@pytest.mark.parametrize("has_old", [False, True])
def test_dgpo_equals_its_oracle(has_old: bool) -> None:
    world, advantages = make_world(shares_draws=True), drawn_advantages()
    name = "old" if has_old else "reference"
    objective = GroupPreference(SIZE, scale=30.0, kl_coef=0.3, anchor=name)
    loss, record = world.loss(objective, advantages)
    anchor = world.old if has_old else world.reference
    expected = oracles.dgpo_loss(
        world.field(world.network),
        world.field(anchor),
        world.field(world.reference),
        list(world.trajectory.x0),
        world.draws(),
        advantages.tolist(),
        torch.arange(GROUPS * SIZE).reshape(GROUPS, SIZE).tolist(),
        beta=30.0,
        kl_coef=0.3,
    )
    assert_equal(world, loss, expected)
    assert record.metrics["weight"].std() > 0.05


def pairs_of(advantages: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The sign of every sample, and the (winner, loser) pairs."""
    sign = best_and_worst(advantages, make_batch().group_id)
    rows = sign.reshape(GROUPS, SIZE)
    starts = torch.arange(GROUPS) * SIZE
    winners, losers = (starts + rows.argmax(1)).tolist(), (starts + rows.argmin(1)).tolist()
    return sign, list(zip(winners, losers, strict=True))


def test_dpo_equals_its_oracle() -> None:
    world = make_world(shares_draws=True)
    sign, pairs = pairs_of(drawn_advantages())
    loss, record = world.loss(PairPreference(30.0), sign, keep=sign != 0)
    expected = oracles.dpo_loss(
        world.field(world.network),
        world.field(world.reference),
        list(world.trajectory.x0),
        world.draws(),
        pairs,
        beta=30.0,
    )
    assert_equal(world, loss, expected)
    in_pair = sign[world.trajectory.decisions.sample] != 0
    assert (record.values[~in_pair] == 0).all()


@pytest.mark.parametrize("kind", ["dgpo", "dpo"])
def test_chunks_of_whole_units_add_up_and_dpo_refuses_a_torn_pair(kind: str) -> None:
    world = make_world(shares_draws=True)
    sign, _ = pairs_of(drawn_advantages())
    objective: Objective = (
        PairPreference(30.0) if kind == "dpo" else GroupPreference(SIZE, scale=30.0)
    )
    whole, _ = world.loss(objective, sign)
    parts = [world.loss(objective, sign, index)[0] for index in torch.arange(24).split(2 * SIZE)]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)
    if kind == "dpo":
        winner = int((sign > 0).nonzero()[0])
        place = (world.trajectory.decisions.sample == winner).nonzero()[0]
        with pytest.raises(ValueError, match="one winner and one loser"):
            world.loss(objective, sign, place)


def all_objectives() -> dict[str, Objective]:
    return {
        "nft": NegativeAware(NFT_LOSSES["paper"], kl_coef=0.1),
        "nft of the code": NegativeAware(NFT_LOSSES["code"], scale=5.0, kl_coef=0.1),
        "awm": MatchedRatio(WEIGHTINGS["ghuber"], is_off_policy=True, kl_coef=0.1),
        "rwr": WeightedMatching(kl_coef=0.1),
        "dgpo": GroupPreference(SIZE, kl_coef=0.1),
        "dpo": PairPreference(),
    }


@pytest.mark.parametrize("name", all_objectives())
def test_metrics_are_per_decision_and_detached_and_missing_sets_are_named(name: str) -> None:
    world, objective = make_world(shares_draws=True), all_objectives()[name]
    sign, _ = pairs_of(drawn_advantages())
    _, loss = world.loss(objective, sign)
    for metric in loss.metrics.values():
        assert metric.shape == loss.values.shape and not metric.requires_grad
    index = torch.arange(8)
    new, data = world.policy.evaluate(world.trajectory, index), world.trajectory.decisions
    chunk = Chunk(data.select(index), sign[data.sample[index]])
    with pytest.raises(ValueError, match=r"evaluation of '(old|reference|kl)' is missing"):
        objective(new, None, None, chunk)


@pytest.mark.parametrize("name", all_objectives())
def test_masked_decisions_teach_nothing(name: str) -> None:
    world, objective = make_world(shares_draws=True), all_objectives()[name]
    nobody = torch.zeros(GROUPS * SIZE, dtype=torch.bool)
    sign, _ = pairs_of(drawn_advantages())
    data, index = world.trajectory.decisions, torch.arange(24)
    chunk = Chunk(data.select(index), sign[data.sample])
    new = world.policy.evaluate(world.trajectory, index)
    loss = objective(new, world.seen(world.old, index), world.seen(world.reference, index), chunk)
    value = aggregate(loss.values, nobody[data.sample], 1.0)
    assert value == 0 and (gradient(value, world.network) == 0).all()


def test_old_decay_follows_the_published_types() -> None:
    assert [old_decay(step) for step in (0, 100, 500, 900)] == [0, 0.1, 0.5, 0.5]
    type_2 = partial(old_decay, start=75, slope=0.0075, most=0.999)
    assert [type_2(step) for step in (0, 75, 175, 900)] == pytest.approx([0, 0, 0.75, 0.999])
    assert old_decay(900, most=0.0) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: NegativeAware(NFT_LOSSES["paper"], mix=0.0),
        lambda: NegativeAware(NFT_LOSSES["paper"], kl_coef=-1.0),
        lambda: MatchedRatio(WEIGHTINGS["t"], clip_low=0.0),
        lambda: MatchedRatio(WEIGHTINGS["t"], old_kl_coef=-1.0),
        lambda: WeightedMatching(-1.0),
        lambda: GroupPreference(0),
        lambda: PairPreference(0.0),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], Objective]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


LEARNS: dict[str, tuple[Objective, Callable[[Tensor, Tensor], Tensor]]] = {
    "nft": (NegativeAware(NFT_LOSSES["paper"], advantage_limit=2.0), group_normalized),
    "nft of the code": (NegativeAware(NFT_LOSSES["code"], scale=5.0), group_normalized),
    "awm": (MatchedRatio(WEIGHTINGS["uniform"], old_kl_coef=1.0), group_normalized),
    "sft": (WeightedMatching(), best_of_group),
    "dgpo": (GroupPreference(12, scale=10.0), group_normalized),
    "dpo": (PairPreference(scale=10.0), best_and_worst),
}


@pytest.mark.parametrize("name", LEARNS)
def test_each_objective_raises_the_toys_reward(name: str) -> None:
    objective, advantage = LEARNS[name]
    policy = make_forward_policy(size=0.02)
    network, weights = policy.weights.network, policy.weights
    reference = copy.deepcopy(network)
    field = policy.sampler.field(reference)  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    draw = partial(schedule_steps, fraction=0.99)
    plan = ForwardPlan(5, 4, draw, shares_draws=True, rollout_with="old")
    batch, rewards = make_batch(groups=8, size=12), []
    for step in range(30):
        batch = replace(batch, seed=step)
        rollout, trajectory = policy.rollout(batch, plan)
        prompts = [prompt.text for prompt in batch.prompts]
        reward = TargetReward().score(images=rollout.images, prompts=prompts)
        rewards.append(reward.mean().item())
        data, everything = trajectory.decisions, torch.arange(trajectory.num_rows)
        chunk = Chunk(data, advantage(reward, batch.group_id)[data.sample])
        for _ in range(2):
            with torch.no_grad():
                with weights.use("old"):
                    old = policy.evaluate(trajectory, everything)
                anchor = forward.evaluate(trajectory, everything, partial(field, batch))
            new = policy.evaluate(trajectory, everything)
            loss = objective(new, old, anchor, chunk)
            optimizer.zero_grad()
            aggregate(loss.values, data.mask, float(len(data.row))).backward()
            optimizer.step()
        weights.update_old(old_decay(step, slope=0.02))  # type: ignore[attr-defined]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:3]) / 3 + 0.3, rewards
