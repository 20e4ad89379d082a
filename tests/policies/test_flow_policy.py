"""The flow policy on the 2-D toy: ratio 1, every distinct state once, a sample the same anywhere.

Kills, among others: a state scored before it was rounded to its storage dtype; another guidance or
another network in training than in rollout; a deterministic prefix computed per sample; siblings
that each pay a forward; states kept that nothing needs; noise that depends on the batch, its cut or
the rank; a choice of trained steps shared by a group, or drawn anew; rows matched to the wrong
decisions; sampling that reads the training state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowrl.commands.check import network_evals
from flowrl.errors import DataError
from flowrl.functional import sde
from flowrl.functional.ratios import importance_ratio
from flowrl.methods.flow import dance_grpo, flow_grpo, mix_grpo
from flowrl.methods.spec import StepPlan, shared_start
from flowrl.policies.flow import FlowPolicy, FlowTrajectory
from flowrl.types import PromptBatch
from tests.policies.toy_flow import GROUPS, SIZE, counted, make_batch, make_policy, perturb

N = GROUPS * SIZE
MIX = {"num_steps": 8, "window": 3, "interval": 1}  # at training step l the window starts at l
PLANS: dict[str, Callable[[], StepPlan]] = {
    "flow_grpo": lambda: flow_grpo(num_steps=6).plan(0),
    "flow_grpo, shared noise": lambda: flow_grpo(num_steps=6, shared_noise=True).plan(0),
    "flow_grpo, cps": lambda: flow_grpo(num_steps=6, kernel="cps").plan(0),
    "dance_grpo": lambda: dance_grpo(num_steps=6).plan(0),
    "mix_grpo at 0": lambda: mix_grpo(**MIX).plan(0),
    "mix_grpo at 2": lambda: mix_grpo(**MIX).plan(2),
    "mix_grpo at the end": lambda: mix_grpo(**MIX).plan(99),
    "mix_grpo, own noise": lambda: mix_grpo(**MIX, shared_noise=False).plan(2),
}
ALL_PLANS = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def everything(trajectory: FlowTrajectory) -> Tensor:
    return torch.arange(len(trajectory.decisions.row))


def deviation(policy: FlowPolicy, trajectory: FlowTrajectory, index: Tensor) -> float:
    """Largest |ratio - 1| of the decisions at `index`."""
    new = policy.evaluate(trajectory, index).log_prob.detach()
    data = trajectory.decisions.select(index)
    return float((importance_ratio(new, data.old_log_prob, data.mask) - 1).abs().max())


@ALL_PLANS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_is_one_on_the_first_pass(
    plan: Callable[[], StepPlan], guidance_scale: float, storage: torch.dtype
) -> None:
    policy = make_policy(dtype=torch.float32, guidance_scale=guidance_scale, storage_dtype=storage)
    _, trajectory = policy.rollout(make_batch(), plan())
    assert {level.states.dtype for level in trajectory.levels if level.states is not None} == {
        storage
    }
    assert trajectory.decisions.old_log_prob.dtype == torch.float32
    # A tenth of the clip range; only the rows of a forward, another number of them, may differ.
    assert deviation(policy, trajectory, everything(trajectory)) < 1e-5


@ALL_PLANS
def test_ratio_is_exactly_one_for_the_batch_of_the_rollout(plan: Callable[[], StepPlan]) -> None:
    # Step by step, training sees the very rows of the rollout: not a bit may differ.
    policy = make_policy(dtype=torch.float32, guidance_scale=3.0, rollout_batch_size=2 * N)
    _, trajectory = policy.rollout(make_batch(), plan())
    for index in everything(trajectory).split(N):
        assert deviation(policy, trajectory, index) == 0


def test_what_is_scored_is_what_was_stored() -> None:
    # In bf16, the noise recovered from the stored state is not the noise that was drawn, and the
    # log-prob is that of the former.
    policy = make_policy(dtype=torch.float32, storage_dtype=torch.bfloat16)
    _, trajectory = policy.rollout(make_batch(), flow_grpo(num_steps=3).plan(0))
    with torch.no_grad():
        new = policy.evaluate(trajectory, everything(trajectory))
    stored = torch.cat([level.states for level in trajectory.levels[1:3]]).float()
    assert torch.equal(stored, stored.bfloat16().float())
    z = (stored - new.transition_mean) / new.transition_std
    by_hand = -(z**2).mean(1) / 2 - new.transition_std[:, 0].log() - 0.9189385
    torch.testing.assert_close(trajectory.decisions.old_log_prob, by_hand)


@ALL_PLANS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("size", [1, SIZE])
def test_network_evaluations_are_the_closed_form(
    plan: Callable[[], StepPlan], guidance_scale: float, size: int
) -> None:
    policy = make_policy(guidance_scale=guidance_scale)
    per_row = 1 if guidance_scale == 1 else 2
    with counted(policy.weights.network) as count:
        rollout, trajectory = policy.rollout(make_batch(size=size), plan())
    forwards, trained = network_evals(plan(), GROUPS, size)
    assert count.rows == rollout.network_evals == forwards * per_row
    assert trajectory.num_rows == trained
    with counted(policy.training_network) as count:
        policy.evaluate(trajectory, everything(trajectory))
    assert count.rows == trained * per_row and count.calls == 1


def test_network_evaluations_by_hand() -> None:
    # 3 groups of 4. flow: 5 steps x 12, of which 4 trained. Shared: one root per group, so 3 rows
    # at step 0. mix at 2, 8 steps, window 2 to 4: steps 0 to 2 have 3 states, 3 to 7 have 12.
    for make, rollout_rows, training_rows in (
        (flow_grpo(num_steps=5).plan(0), 60, 48),
        (flow_grpo(num_steps=5, shared_noise=True).plan(0), 51, 39),
        (mix_grpo(**MIX).plan(2), 3 * 3 + 5 * 12, 3 + 2 * 12),
    ):
        rollout, trajectory = make_policy().rollout(make_batch(), make)
        assert (rollout.network_evals, trajectory.num_rows) == (rollout_rows, training_rows)


def test_siblings_log_probs_come_from_one_forward() -> None:
    policy = make_policy()
    _, trajectory = policy.rollout(make_batch(), mix_grpo(**MIX).plan(2))
    first_step = torch.arange(N)  # the decisions of the window's first step, 4 per group's state
    assert trajectory.decisions.row[first_step].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for index, rows in ((first_step, 3), (first_step[:5], 2), (first_step + N, 12)):
        with counted(policy.training_network) as count:
            log_prob = policy.evaluate(trajectory, index).log_prob
        assert (count.rows, count.calls) == (rows, 1)
        torch.testing.assert_close(log_prob.detach(), trajectory.decisions.old_log_prob[index])
    assert len(trajectory.decisions.old_log_prob[:4].unique()) == 4


@ALL_PLANS
def test_only_the_states_that_training_needs_are_stored(plan: Callable[[], StepPlan]) -> None:
    _, trajectory = make_policy().rollout(make_batch(), plan())
    trained = plan().trained
    stored = [i for i, level in enumerate(trajectory.levels) if level.states is not None]
    assert stored == sorted({step + k for step in trained for k in (0, 1)})
    scored = [i for i, level in enumerate(trajectory.levels) if level.log_prob is not None]
    assert scored == [step + 1 for step in trained]
    first = trajectory.levels[trained[0]]
    shared = plan().keys is shared_start and min(plan().stochastic) == trained[0]
    assert len(first.states) == (GROUPS if shared else N)


@ALL_PLANS
def test_samples_do_not_depend_on_how_the_batch_is_cut(plan: Callable[[], StepPlan]) -> None:
    whole, trajectory = make_policy(guidance_scale=3.0).rollout(make_batch(), plan())
    for size in (1, 5):
        policy = make_policy(guidance_scale=3.0, rollout_batch_size=size, decode_batch_size=size)
        cut, again = policy.rollout(make_batch(), plan())
        torch.testing.assert_close(cut.images, whole.images)
        same_log_probs(again, trajectory)


@ALL_PLANS
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_shares_are_the_whole(plan: Callable[[], StepPlan], world_size: int) -> None:
    # 3 groups of 4 on 2 ranks: the second group spans both, and still shares its starting noise.
    whole, trajectory = make_policy().rollout(make_batch(), plan())
    for rank in range(world_size):
        batch = make_batch(rank=rank, world_size=world_size)
        part, mine = make_policy().rollout(batch, plan())
        torch.testing.assert_close(part.images, whole.images[batch.sample_id])
        data, theirs = mine.decisions, trajectory.decisions
        theirs = theirs.select(torch.isin(theirs.sample, batch.sample_id))
        assert torch.equal(data.mask, theirs.mask)
        torch.testing.assert_close(data.old_log_prob, theirs.old_log_prob, rtol=1e-10, atol=1e-12)


@ALL_PLANS
def test_a_sample_does_not_depend_on_its_company(plan: Callable[[], StepPlan]) -> None:
    batch = make_batch()
    whole, _ = make_policy().rollout(batch, plan())
    for chosen in ([7], [0, 3, 4, 11]):
        part, _ = make_policy().rollout(batch.select(torch.tensor(chosen)), plan())
        torch.testing.assert_close(part.images, whole.images[chosen])


def same_log_probs(one: FlowTrajectory, other: FlowTrajectory) -> None:
    torch.testing.assert_close(
        one.decisions.old_log_prob, other.decisions.old_log_prob, rtol=1e-10, atol=1e-12
    )


def test_the_same_batch_is_drawn_bit_by_bit_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, trajectory = make_policy().rollout(make_batch(), PLANS["dance_grpo"]())
    second, again = make_policy().rollout(make_batch(), PLANS["dance_grpo"]())
    assert torch.equal(first.images, second.images)
    assert torch.equal(trajectory.decisions.old_log_prob, again.decisions.old_log_prob)
    assert torch.equal(torch.get_rng_state(), state)
    assert not trajectory.decisions.old_log_prob.requires_grad


def test_a_group_shares_its_starting_noise_or_does_not() -> None:
    for shared, distinct in ((True, GROUPS), (False, N)):
        plan = flow_grpo(num_steps=3, shared_noise=shared).plan(0)
        rollout, trajectory = make_policy().rollout(make_batch(), plan)
        assert len(trajectory.levels[0].states.unique(dim=0)) == distinct
        assert len(trajectory.levels[1].states.unique(dim=0)) == N
        # Were all dots clamped to a corner, the tests that compare images would be idle.
        assert len(rollout.images.flatten(1).unique(dim=0)) == N


def test_an_interrupted_group_still_shares_its_start() -> None:
    # Rows are ordered by state, not by sample, so a batch may hold its samples in any order.
    whole, _ = make_policy().rollout(make_batch(), PLANS["mix_grpo at 2"]())
    chosen = torch.tensor([4, 0, 5])
    part, trajectory = make_policy().rollout(make_batch().select(chosen), PLANS["mix_grpo at 2"]())
    assert part.network_evals == 2 * 3 + 3 * 5  # two groups up to step 2, three samples after it
    torch.testing.assert_close(part.images, whole.images[chosen])
    assert (trajectory.decisions.row.diff() >= 0).all()


def test_dance_trains_its_own_random_steps_of_each_sample() -> None:
    plan = dance_grpo(num_steps=16).plan(0)
    policy, batch = make_policy(), make_batch(groups=12, size=10)
    _, trajectory = policy.rollout(batch, plan)
    kept = trajectory.decisions.mask.reshape(15, 120).T  # decisions go step by step
    assert trajectory.decisions.sample.reshape(15, 120).T.equal(
        torch.arange(120)[:, None].expand(120, 15)
    )
    assert (kept.sum(1) == 9).all()  # int(.6 * 15)
    assert len(kept.unique(dim=0)) > 110  # of 5005 choices, 120 draws coincide in 1.4 on average
    assert len(kept[:10].unique(dim=0)) > 1  # also within a group
    share = kept.double().mean(0)
    assert ((share - 0.6).abs() < 5 * (0.24 / 120) ** 0.5).all()  # no step is favoured
    _, again = policy.rollout(batch, plan)
    assert torch.equal(again.decisions.mask, trajectory.decisions.mask)
    other = replace(batch, seed=batch.seed + 1)
    assert not torch.equal(policy.rollout(other, plan)[1].decisions.mask, again.decisions.mask)


def test_a_step_that_a_sample_does_not_keep_gives_no_gradient() -> None:
    policy = make_policy()
    _, trajectory = policy.rollout(make_batch(), PLANS["dance_grpo"]())
    data = trajectory.decisions
    new = policy.evaluate(trajectory, everything(trajectory))
    ratio = importance_ratio(new.log_prob, data.old_log_prob, data.mask)
    assert (ratio[~data.mask] == 1).all() and (~data.mask).sum() == 2 * N  # 3 of 5 steps are kept
    (by_log_prob,) = torch.autograd.grad(ratio.sum(), new.log_prob)
    assert torch.equal(by_log_prob != 0, data.mask)


def test_guidance_is_the_papers_combination_of_separate_forwards() -> None:
    policy, batch = make_policy(guidance_scale=3.0), make_batch()
    plan = flow_grpo(num_steps=4, noise_level=0.5).plan(0)
    _, trajectory = policy.rollout(batch, plan)
    pipeline, network = policy.pipeline, policy.weights.network
    new = policy.evaluate(trajectory, everything(trajectory))
    texts = [prompt.text for prompt in batch.prompts]
    for step in plan.trained:
        x_t, sigma = trajectory.levels[step].states, trajectory.sigmas[step]
        with torch.no_grad():
            v_u = pipeline.velocity(network, x_t, sigma, pipeline.encode([""] * N))
            v_c = pipeline.velocity(network, x_t, sigma, pipeline.encode(texts))
        assert (v_u - v_c).abs().max() > 0.01
        mean, std = sde.flow_sde(
            x_t,
            v_u + 3 * (v_c - v_u),
            sigma,
            trajectory.sigmas[step + 1],
            noise_level=0.5,
            sigma_max=trajectory.sigmas[1],
        )
        here = slice(step * N, (step + 1) * N)
        torch.testing.assert_close(new.transition_mean[here].detach(), mean)
        log_prob = sde.gaussian_log_prob(trajectory.levels[step + 1].states, mean, std)
        torch.testing.assert_close(trajectory.levels[step + 1].log_prob, log_prob)


@ALL_PLANS
def test_evaluating_a_part_is_a_part_of_evaluating_all(plan: Callable[[], StepPlan]) -> None:
    policy = make_policy(guidance_scale=3.0)
    _, trajectory = policy.rollout(make_batch(), plan())
    perturb(policy.weights.network, 0.1, seed=4)
    index = everything(trajectory)
    full = policy.evaluate(trajectory, index)
    assert deviation(policy, trajectory, index) > 0.01
    for chosen in (index[::3], index[5:9], index[-1:], index[[0, 1, 2, 13, 14, 20]]):
        part = policy.evaluate(trajectory, chosen)
        torch.testing.assert_close(part.log_prob, full.log_prob[chosen])
        torch.testing.assert_close(part.transition_mean, full.transition_mean[chosen])
        torch.testing.assert_close(part.transition_std, full.transition_std[chosen])


@ALL_PLANS
def test_decisions_name_their_row_sample_and_noise_levels(plan: Callable[[], StepPlan]) -> None:
    _, trajectory = make_policy().rollout(make_batch(), plan())
    data, steps = trajectory.decisions, torch.tensor(plan().trained)
    assert torch.equal(data.sample, torch.arange(N).repeat(len(steps)))
    assert torch.equal(data.sigma, trajectory.sigmas[steps].repeat_interleave(N))
    assert torch.equal(data.sigma_next, trajectory.sigmas[steps + 1].repeat_interleave(N))
    assert (data.row.diff() >= 0).all()
    assert data.row.unique().tolist() == list(range(trajectory.num_rows))


def test_evaluate_has_a_gradient_and_rollout_keeps_no_graph() -> None:
    policy = make_policy()
    rollout, trajectory = policy.rollout(make_batch(), PLANS["flow_grpo"]())
    assert not rollout.images.requires_grad
    assert not any(
        s.requires_grad for level in trajectory.levels if (s := level.states) is not None
    )
    policy.evaluate(trajectory, torch.tensor([0, 13])).log_prob.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.weights.trainable())


def test_evaluate_calls_the_training_network_and_rollout_the_plain_one() -> None:
    # A distributed run puts DDP's wrapper there; drawing through it would wait for other ranks.
    policy, plan = make_policy(), PLANS["mix_grpo at 2"]()
    before, trajectory = policy.rollout(make_batch(), plan)
    policy.training_network = make_policy().weights.network
    perturb(policy.training_network, 0.1, seed=4)
    assert deviation(policy, trajectory, everything(trajectory)) > 0.01
    after, _ = policy.rollout(make_batch(), plan)
    assert torch.equal(after.images, before.images)


def test_sample_is_deterministic_and_does_not_depend_on_the_training_state() -> None:
    policy, batch = make_policy(), make_batch()

    def draw(batch: PromptBatch = batch) -> Tensor:
        return policy.sample(batch, num_steps=5, guidance_scale=2.0).images

    state = torch.get_rng_state()
    before = draw()
    _, trajectory = policy.rollout(make_batch(), PLANS["dance_grpo"]())
    policy.evaluate(trajectory, everything(trajectory)).log_prob.sum().backward()
    policy.guidance_scale, policy.training_network = 7.0, torch.nn.Identity()
    torch.manual_seed(1)
    again = draw()
    assert torch.equal(again, before) and not again.requires_grad
    # Of the batch only prompts, sample ids and the seed matter: not the group, not the company.
    regrouped = replace(batch, group_id=batch.group_id.flip(0) + 9, update=batch.update + 1)
    assert torch.equal(draw(regrouped), before)
    torch.testing.assert_close(draw(batch.select(torch.tensor([9, 2]))), before[[9, 2]])
    assert not torch.equal(draw(replace(batch, seed=batch.seed + 1)), before)
    torch.set_rng_state(state)


def test_sample_is_eulers_ode_with_the_guidance_asked_for() -> None:
    policy, batch = make_policy(rollout_batch_size=5), make_batch()
    with counted(policy.weights.network) as count:
        sampled = policy.sample(batch, num_steps=4, guidance_scale=2.0)
    assert sampled.network_evals == count.rows == 4 * N * 2
    with counted(policy.weights.network) as count:
        assert policy.sample(batch, num_steps=4, guidance_scale=1.0).network_evals == 4 * N
    assert count.rows == 4 * N
    x = policy._noise(batch.seed, batch.sample_id, stream=0)
    pipeline, network = policy.pipeline, policy.weights.network
    with torch.no_grad():
        for sigma in (1.0, 0.75, 0.5, 0.25):
            at = torch.tensor(sigma)
            v_u = pipeline.velocity(network, x, at, pipeline.encode([""] * N))
            texts = [prompt.text for prompt in batch.prompts]
            v_c = pipeline.velocity(network, x, at, pipeline.encode(texts))
            x = x - 0.25 * (2 * v_c - v_u)
    torch.testing.assert_close(sampled.images, pipeline.decode(x))


def test_a_rollout_without_a_stochastic_step_is_the_sampler() -> None:
    policy, batch = make_policy(), make_batch()
    plan = StepPlan(5, flow_grpo().plan(0).kernel, (), ())
    rollout, trajectory = policy.rollout(batch, plan)
    sampled = policy.sample(batch, num_steps=5, guidance_scale=1.0)
    assert torch.equal(rollout.images, sampled.images)
    assert all(level.states is None for level in trajectory.levels)


def test_images_lie_in_0_1_on_the_cpu_in_float32() -> None:
    rollout, _ = make_policy().rollout(make_batch(), PLANS["flow_grpo"]())
    assert rollout.images.shape == (N, 3, 16, 16) and rollout.images.dtype == torch.float32
    assert rollout.images.min() >= 0 and rollout.images.max() <= 1


def test_a_prompt_that_was_not_precomputed_is_named() -> None:
    policy = make_policy()
    policy.precompute(["right"], None)
    with pytest.raises(DataError, match="precompute"):
        policy.rollout(make_batch(), PLANS["flow_grpo"]())
