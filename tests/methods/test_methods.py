"""Methods: their defaults are the papers' tables, describe() hides no number, nonsense is refused.

Kills, among others: a default that drifts; a kernel at another noise level than the one printed;
the std of the group for that of the epoch; ddof or eps of another paper; a trained last step; a
plan that remembers; a number in force that describe() does not print; a negative coefficient that
is ignored; a noise level of 0, which has no density.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.methods import METHODS, Method
from flowrl.methods.flow import dance_grpo, flow_grpo, flow_grpo_fast, mix_grpo, mix_grpo_flash
from flowrl.methods.objectives import KLS, ClippedRatio, transition_kl
from flowrl.methods.spec import KERNELS, Needs, StepPlan, TokenPlan, own_noise, shared_start
from flowrl.methods.tails import Tail
from flowrl.methods.token import grpo
from flowrl.methods.trees import branch_grpo, parent_keys, tempflow_grpo
from flowrl.types import Chunk, Decisions, Evaluation, Scores

FLOW = (flow_grpo, dance_grpo, mix_grpo)


def transition(plan: StepPlan, sigma: float, sigma_next: float) -> tuple[float, float]:
    """Mean and std of the plan's kernel from x_t = 1 with velocity .5, sigmas[1] = .9."""
    x_t, velocity, *sigmas = torch.tensor([1.0, 0.5, sigma, sigma_next, 0.9], dtype=torch.float64)
    mean, std = plan.kernel(x_t.reshape(1, 1), velocity.reshape(1, 1), *sigmas)
    return mean.item(), std.item()


def advantages(method: Method, *rewards: list[float]) -> Tensor:
    """Of rewards with weight 1 for two samples of each prompt."""
    scored = {str(i): torch.tensor(values).double() for i, values in enumerate(rewards)}
    number = len(rewards[0])
    valid = torch.ones(number, dtype=torch.bool)
    scores = Scores(scored, dict.fromkeys(scored, 1.0), valid)
    return method.advantage(scores, torch.arange(number) // 2)


def chunk(old_log_prob: Tensor, advantage: Tensor) -> Chunk:
    number = torch.arange(len(old_log_prob))
    mask = torch.ones_like(old_log_prob, dtype=torch.bool)
    half, quarter = torch.full((2, len(number)), 0.5) * torch.tensor([[1.0], [0.5]])
    return Chunk(
        Decisions(number, number, number * 0, old_log_prob, mask, half, quarter), advantage
    )


def test_flow_grpo_has_the_numbers_of_its_paper() -> None:
    method = flow_grpo()
    plan = method.plan(0)
    assert plan.num_steps == 10 and plan.stochastic == tuple(range(10))
    assert plan.trained == tuple(range(9)) and plan.num_kept == 9 and plan.keys is own_noise
    # g = .7 at sigma = .5; drift .5 + .49 / (2 * .5) * 1.25 = 1.1125; std .7 * sqrt(.25).
    assert transition(plan, 0.5, 0.25) == pytest.approx((1 - 0.25 * 1.1125, 0.35), abs=1e-12)
    # At sigma = 1 the second sigma replaces it in the denominator: std is noise_level.
    assert transition(plan, 1.0, 0.9)[1] == pytest.approx(0.7, abs=1e-12)
    # The published .04 belongs to kl="code"; without a choice there is no KL.
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"], 0.0)
    assert method.objective.needs == Needs(ratio_clip=1e-4, negative_advantage=True)
    # The std of the epoch: of 0, 2, 5, 5.2, with mean 3.05, it is sqrt(18.83 / 4).
    expected = torch.tensor([-1, 1, -0.1, 0.1]).double() / (math.sqrt(18.83 / 4) + 1e-4)
    torch.testing.assert_close(advantages(method, [0, 2, 5, 5.2]), expected, rtol=1e-6, atol=0)
    assert advantages(flow_grpo(advantage_std="none"), [0, 20, 1, 1]).tolist() == [-5, 5, 0, 0]


def test_dance_grpo_has_the_numbers_of_its_paper() -> None:
    method = dance_grpo()
    plan = method.plan(0)
    assert plan.num_steps == 16 and plan.stochastic == tuple(range(16))
    assert plan.trained == tuple(range(15)) and plan.keys is shared_start
    assert plan.trained_fraction == 0.6 and plan.num_kept == 9
    # drift .5 + .09 / (2 * .5) * 1.25 = .6125; std .3 * sqrt(.25).
    assert transition(plan, 0.5, 0.25) == pytest.approx((1 - 0.25 * 0.6125, 0.15), abs=1e-12)
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"], 0.0)


def test_mix_grpo_has_the_numbers_of_its_paper() -> None:
    method = mix_grpo()
    plan = method.plan(0)
    assert plan.num_steps == 25 and plan.stochastic == plan.trained == (0, 1, 2, 3)
    assert plan.keys is shared_start and plan.num_kept == 4
    assert method.plan(24).trained[0] == 0 and method.plan(25).trained == (1, 2, 3, 4)
    assert method.plan(10_000).trained == (20, 21, 22, 23)  # stays, one step before the end
    assert transition(plan, 0.5, 0.25) == pytest.approx((1 - 0.25 * 1.1125, 0.35), abs=1e-12)
    assert method.objective == ClippedRatio(1e-4, 1e-4, KLS["paper"], 0.0)


def test_grpo_has_the_numbers_of_its_paper() -> None:
    method = grpo()
    assert method.policy == "token" and method.plan(3) == TokenPlan()
    assert (method.objective.clip_low, method.objective.clip_high) == (0.2, 0.2)
    assert method.objective.kl_coef == 0 and method.objective.needs.sets == ()
    # The std of the group, ddof 0: 1 for both groups, whatever their scale.
    expected = torch.tensor([-1, 1, -0.1, 0.1]) / (torch.tensor([1, 1, 0.1, 0.1]) + 1e-4)
    torch.testing.assert_close(advantages(method, [0, 2, 5, 5.2]), expected.double())


@pytest.mark.parametrize("make", [dance_grpo, mix_grpo])
def test_rewards_are_normalized_one_by_one_then_summed_and_clipped(
    make: Callable[..., Method],
) -> None:
    # Of two samples with ddof 1 the std is sqrt(2) times the deviation, whatever the scale, also a
    # small one: eps is 1e-8. The second reward opposes the first in the second group.
    one = advantages(make(), [0, 2, 5, 5 + 2e-5])
    expected = torch.tensor([-1, 1, -1, 1]).double() / math.sqrt(2)
    torch.testing.assert_close(one, expected, rtol=2e-3, atol=0)
    both = advantages(make(), [0, 2, 5, 6], [0, 100, 8, 7])
    torch.testing.assert_close(
        both, 2 * torch.tensor([-1, 1, 0, 0]) / math.sqrt(2), atol=1e-6, rtol=0, check_dtype=False
    )
    assert advantages(make(advantage_clip=0.5), [0, 2, 5, 6]).tolist() == [-0.5, 0.5, -0.5, 0.5]


@pytest.mark.parametrize("make", FLOW)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_steps", [5, 16])
def test_the_last_step_is_never_trained(
    make: Callable[..., Method], kernel: str, num_steps: int
) -> None:
    method = make(num_steps=num_steps, kernel=kernel)
    for step in (0, 1, 30, 500, 9999):
        plan = method.plan(step)
        assert plan.trained and max(plan.trained) < num_steps - 1
        assert set(plan.trained) <= set(plan.stochastic)


@pytest.mark.parametrize("strategy", ["progressive", "random"])
def test_a_plan_depends_on_the_training_step_alone(strategy: str) -> None:
    def steps(method: Method, order: range) -> list[tuple[int, ...]]:
        return [method.plan(step).trained for step in order]

    first, second = (mix_grpo(interval=3, strategy=strategy) for _ in range(2))
    forward = steps(first, range(40))
    assert steps(second, range(39, -1, -1)) == forward[::-1]
    assert steps(first, range(40)) == forward


OTHER: dict[str, dict[str, Any]] = {
    "flow_grpo": {
        "num_steps": 7,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_std": "group",
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "kl": "code",
        "kl_coef": 0.017,
        "shared_noise": True,
    },
    "dance_grpo": {
        "num_steps": 7,
        "kernel": "cps",
        "noise_level": 0.31,
        "trained_fraction": 0.616,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "num_extremes": 3,
        "shared_noise": False,
    },
    "mix_grpo": {
        "num_steps": 7,
        "window": 3,
        "window_end": 5,
        "stride": 2,
        "interval": 19,
        "strategy": "frozen",
        "roll_back": True,
        "exp_threshold": 17,
        "window_seed": 31,
        "kernel": "cps",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "kl": "code",
        "kl_coef": 0.017,
        "shared_noise": False,
    },
    "flow_grpo_fast": {
        "num_steps": 14,
        "window": 2,
        "window_end": 4,
        "window_seed": 31,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_std": "group",
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "kl": "code",
        "kl_coef": 0.017,
        "shared_noise": True,
    },
    "mix_grpo_flash": {
        "frozen": True,
        "tail_ratio": 0.37,
        "tail_count": "code",
        "num_steps": 7,
        "window": 3,
        "stride": 2,
        "interval": 19,
        "kernel": "cps",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "kl": "code",
        "kl_coef": 0.017,
        "shared_noise": False,
    },
    "branch_grpo": {
        "num_steps": 17,
        "splits": (0, 5),
        "factor": 3,
        "noise_scale": 2.5,
        "kernel": "cps",
        "noise_level": 0.31,
        "fusion": "path_prob",
        "width_pruning": "parent_top1",
        "num_extremes": 3,
        "depth_pruning": True,
        "depth_window": 5,
        "depth_interval": 31,
        "depth_stop": 13,
        "mix": True,
        "mix_window": 6,
        "mix_interval": 23,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
    },
    "tempflow_grpo": {
        "num_steps": 7,
        "num_seeds": 3,
        "num_branches": 5,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "kl": "code",
        "kl_coef": 0.017,
    },
    "flash_grpo": {
        "num_steps": 14,
        "window_end": 4,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_std": "group",
        "advantage_clip": 3.25,
        "kl": "code",
        "kl_coef": 0.017,
    },
    "g2rpo": {
        "num_steps": 14,
        "window_end": 4,
        "granularities": (1, 3),
        "num_branches": 5,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
    },
    "dense_grpo": {
        "num_steps": 7,
        "num_trajectories": 5,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "kl": "code",
        "kl_coef": 0.017,
    },
    "neighbor_grpo": {
        "num_steps": 7,
        "solver": "ode",
        "group_size": 13,
        "num_anchors": 5,
        "num_trained": 3,
        "step_seed": 31,
        "spread": 0.37,
        "temperature": 0.71,
        "power": 0.93,
        "clip_range": 0.013,
    },
    "grpo_guard": {
        "num_steps": 7,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_std": "none",
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "shared_noise": True,
    },
    "pref_grpo": {
        "num_steps": 7,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "trained_fraction": 0.616,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "shared_noise": False,
    },
    "flow_gdpo": {
        "num_steps": 7,
        "kernel": "cps",
        "noise_level": 0.31,
        "clip_range": 0.013,
        "advantage_clip": 3.25,
        "kl": "code",
        "kl_coef": 0.017,
        "shared_noise": True,
    },
    "flow_dppo": {
        "num_steps": 14,
        "window": 3,
        "window_end": 4,
        "window_seed": 31,
        "kernel": "dance_sde",
        "noise_level": 0.31,
        "threshold": 0.013,
        "advantage_std": "group",
        "shared_noise": True,
    },
    "diffusion_nft": {
        "num_steps": 7,
        "solver": "ode",
        "num_draws": 3,
        "trained_fraction": 0.616,
        "loss": "paper",
        "mix": 0.13,
        "advantage_std": "global",
        "advantage_clip": 3.25,
        "decay_start": 75,
        "decay_slope": 0.0075,
        "decay_most": 0.999,
        "kl_coef": 0.017,
    },
    "awm": {
        "num_steps": 7,
        "solver": "dpmpp_2m",
        "num_draws": 3,
        "first_step": 2,
        "trained_fraction": 0.616,
        "weighting": "huber",
        "clip_range": 0.013,
        "off_policy": True,
        "advantage_std": "group",
        "advantage_clip": 3.25,
        "advantage_scale": 0.31,
        "decay_slope": 0.0075,
        "decay_most": 0.37,
        "kl_coef": 0.017,
        "old_kl_coef": 0.71,
    },
    "dgpo": {
        "group_size": 13,
        "num_steps": 7,
        "solver": "ode",
        "num_draws": 3,
        "trained_fraction": 0.616,
        "scale": 17.5,
        "anchor": "old",
        "old_from": 31,
        "advantage_std": "global",
        "advantage_clip": 3.25,
        "decay_slope": 0.0075,
        "decay_most": 0.37,
        "kl_coef": 0.017,
    },
    "online_dpo": {
        "num_steps": 7,
        "solver": "dpmpp_2m",
        "num_draws": 3,
        "scale": 17.5,
        "renew_every": 31,
    },
    "flow_dpo": {
        "num_draws": 3,
        "scale": 17.5,
    },
    "best_of_n_sft": {
        "num_steps": 7,
        "solver": "dpmpp_2m",
        "num_draws": 3,
        "weight": "reward",
        "kl_coef": 0.017,
    },
    "grpo": {
        "clip_low": 0.13,
        "clip_high": 0.27,
        "advantage_std": "leave_one_out",
        "advantage_clip": 3.25,
        "reward_losses": "separate",
        "kl_coef": 0.017,
    },
}
IN_FORCE_WITH = {
    "exp_threshold": {"strategy": "exp_decay"},
    "mix_grpo.window_seed": {"strategy": "random"},
    "branch_grpo.num_extremes": {"width_pruning": "extreme"},
    "depth_window": {"depth_pruning": True},
    "depth_interval": {"depth_pruning": True},
    "depth_stop": {"depth_pruning": True},
    "mix_window": {"mix": True},
    "mix_interval": {"mix": True},
}


@pytest.mark.parametrize("name", METHODS)
def test_describe_prints_every_argument(name: str) -> None:
    make = METHODS[name]
    assert list(inspect.signature(make).parameters) == list(OTHER[name])
    for argument, value in OTHER[name].items():
        company = IN_FORCE_WITH.get(f"{name}.{argument}", IN_FORCE_WITH.get(argument, {}))
        rows = make(**company, **{argument: value}).describe()
        assert rows != make(**company).describe(), f"{argument} is not printed"
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert any(str(value) in text for _, text in rows), f"{argument}={value} is not printed"


def test_describe_prints_the_numbers_that_are_no_arguments() -> None:
    texts = {
        name: " ".join(text for _, text in make().describe()) for name, make in METHODS.items()
    }
    assert "global_std_normalized(eps=0.0001, ddof=0)" in texts["flow_grpo"]
    assert "eps=1e-08, ddof=1" in texts["dance_grpo"] and "eps=1e-08, ddof=1" in texts["mix_grpo"]
    assert "group_normalized(eps=0.0001, ddof=0)" in texts["grpo"]
    assert "9 of 0 to 14" in texts["dance_grpo"]
    assert "before step 24" in texts["mix_grpo"] and "2507.21802" in texts["mix_grpo"]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (mix_grpo, {"window": 25}, "window=25 does not fit into 24 trainable steps"),
        (mix_grpo, {"num_steps": 4}, "window=4 does not fit into 3 trainable steps"),
        (mix_grpo, {"stride": 0}, "strategy='frozen'"),
        (flow_grpo, {"num_steps": 1}, "num_steps=1 leaves nothing to train"),
        (dance_grpo, {"num_steps": 1}, "num_steps=1 leaves nothing to train"),
        (dance_grpo, {"trained_fraction": 0.06}, "of 15 steps keeps 0; use 0.0667 to 1"),
        (dance_grpo, {"trained_fraction": 1.2}, "trained_fraction=1.2 of 15 steps keeps 18"),
        *((make, {"noise_level": 0.0}, "noise_level must be positive, got 0") for make in FLOW),
        *((make, {"clip_range": 0.0}, "clip_range must be positive") for make in FLOW),
        *((make, {"advantage_clip": -5.0}, "advantage_clip must be positive") for make in FLOW),
        (flow_grpo, {"kernel": "cps", "noise_level": 1.2}, r"cps must be in \(0, 1\], got 1.2"),
        (mix_grpo_flash, {"tail_ratio": 1.5}, r"ratio of the tail must be in \(0, 1\]"),
        (flow_grpo_fast, {"window": 6}, "window=6 does not fit before window_end=5"),
        (branch_grpo, {"splits": (3, 0)}, "must be ascending steps"),
        (branch_grpo, {"splits": (0, 19)}, r"ascending steps in \[0, 18\]"),
        (branch_grpo, {"factor": 1}, "factor=1 does not branch"),
        (branch_grpo, {"depth_pruning": True, "depth_stop": 16}, "use 9 to 15"),
        (branch_grpo, {"depth_pruning": True, "splits": (3,)}, "two splits or more"),
        (tempflow_grpo, {"num_steps": 1}, "leaves no step to branch at"),
        (tempflow_grpo, {"num_seeds": 0}, "num_seeds must be positive"),
        (flow_grpo, {"kl_coef": -0.1}, "kl_coef must not be negative"),
        (mix_grpo, {"kl_coef": -0.1}, "kl_coef must not be negative"),
        (grpo, {"kl_coef": -0.1}, "kl_coef must not be negative"),
        (grpo, {"clip_low": 0.0}, "clip_low must be positive"),
        (grpo, {"clip_high": -0.2}, "clip_high must be positive"),
        (grpo, {"advantage_clip": 0.0}, "advantage_clip must be positive"),
    ],
)
def test_an_impossible_combination_is_refused_when_it_is_built(
    make: Callable[..., Method], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    ("stochastic", "trained", "message"),
    [
        ((0, 1), (1, 2), "not all stochastic"),
        ((0, 4), (0,), r"do not lie in \[0, 4\)"),
        ((-1, 0), (0,), r"do not lie in \[0, 4\)"),
        ((0, 1, 2), (2, 1), "ascending order"),
        ((0, 1, 2), (1, 1), "ascending order"),
    ],
)
def test_a_step_plan_that_cannot_be_is_refused(
    stochastic: tuple[int, ...], trained: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepPlan(4, KERNELS["cps"](0.5), stochastic, trained)


def test_the_tree_methods_have_the_numbers_of_their_papers() -> None:
    branch = branch_grpo().plan(0)
    assert branch.group_size == 16 and branch.stochastic == tuple(range(20))
    assert branch.trained == tuple(range(19)) and branch.mix is not None
    assert branch.mix.scale == 4 and isinstance(branch.mix.keys, partial)
    assert branch.mix.keys.func is parent_keys
    pruned = branch_grpo(depth_pruning=True)
    assert pruned.plan(29).trained == (*range(9), *range(13, 19))
    assert pruned.plan(30).trained == (*range(10), *range(14, 19))
    assert pruned.plan(9999).trained == tuple(range(15))
    hybrid = branch_grpo(mix=True)
    assert hybrid.plan(0).stochastic == hybrid.plan(0).trained == (0, 1, 2, 3, 6, 9)
    assert hybrid.plan(25 * 4).trained == (0, 3, 4, 5, 6, 7, 9)
    temp = tempflow_grpo().plan(0)
    assert temp.group_size == 4 * 9 * 6 and temp.trained == tuple(range(9))
    flash, star = mix_grpo_flash().plan(0), mix_grpo_flash(frozen=True).plan(999)
    assert flash.tail == Tail(0.4) and mix_grpo_flash().plan(20).trained == (1, 2, 3, 4)
    assert star.tail == Tail(0.2) and star.trained == (0, 1, 2, 3)
    fast = flow_grpo_fast()
    starts = {fast.plan(step).trained[0] for step in range(100)}
    assert starts == {0, 1, 2} and fast.plan(3).stochastic == fast.plan(3).trained


def test_the_tail_is_as_long_as_paper_and_code_say() -> None:
    # Reference: the code's evaluations at r = .4, T = 25, w = 4 and l = 0, 1, ... (without its bug,
    # one step at least); the paper's ceil.
    code = [11, 12, 13, 13, 14, 14, 15, 16, 16, 17, 17, 18]
    for start, evals in enumerate(code):
        assert start + 4 + Tail(0.4, "code").num_steps(21 - start) == evals
    assert 4 + Tail(0.2, "code").num_steps(21) == 7
    for start in range(21):
        assert Tail(0.4).num_steps(21 - start) == -(-(21 - start) * 4 // 10)
        assert Tail(0.2, "code").num_steps(21 - start) >= 1
    assert Tail(0.1).num_steps(30) == 3
    with pytest.raises(ValueError, match=r"step 3, the last stochastic one, 0 of 4 .* needs 1"):
        StepPlan(4, KERNELS["cps"](0.5), (3,), (), tail=Tail(0.5))


def test_the_objective_by_hand() -> None:
    # Ratios 1.1, 1.1, .9, .9 and advantages 2, -2, 2, -2 at clip .05 (low) and .02 (high): the
    # smaller product is the clipped one only for a good decision above and a bad one below.
    ratio, advantage = torch.tensor([1.1, 1.1, 0.9, 0.9]), torch.tensor([2.0, -2, 2, -2])
    objective = ClippedRatio(0.05, 0.02, transition_kl)
    loss = objective(Evaluation(ratio.log()), None, None, chunk(torch.zeros(4), advantage))
    torch.testing.assert_close(loss.values, torch.tensor([-2.04, 2.2, -1.8, 1.9]))
    # The clip counts only where it binds: the other two are on their way back.
    assert loss.metrics["clip_frac_high"].tolist() == [1, 0, 0, 0]
    assert loss.metrics["clip_frac_low"].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(loss.metrics["ratio_max_dev"], torch.full((4,), 0.1))
    torch.testing.assert_close(loss.metrics["approx_kl"], ratio.log() ** 2 / 2)
    assert "kl" not in loss.metrics


def test_both_kls_of_a_transition_by_hand() -> None:
    # Means differ by (.2, 0): the mean square is .02; / (2 * .25) is .04; the code's is times -dt.
    mean = torch.tensor([[0.2, 1.0]], requires_grad=True)
    new = Evaluation(torch.zeros(1), mean, torch.tensor([[0.5]]))
    reference = Evaluation(torch.zeros(1), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5]]))
    for kl, expected in (("paper", 0.04), ("code", 0.01)):
        objective = flow_grpo(kl=kl, kl_coef=3.0).objective
        loss = objective(new, None, reference, chunk(torch.zeros(1), torch.zeros(1)))
        assert loss.values.item() == pytest.approx(3 * expected)
        assert loss.metrics["kl"].item() == pytest.approx(expected)
        assert not loss.metrics["kl"].requires_grad and loss.values.requires_grad


def test_a_kl_without_what_it_needs_is_an_error() -> None:
    tokens, part = Evaluation(torch.zeros(2)), chunk(torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="needs the reference's evaluation"):
        grpo(kl_coef=0.1).objective(tokens, None, None, part)
    with pytest.raises(ValueError, match="needs a flow policy; use token_kl"):
        flow_grpo(kl_coef=0.1).objective(tokens, None, tokens, part)
