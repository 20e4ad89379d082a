"""What the papers on the forward process are made of; keyword defaults are the paper's table.

No density and no stochastic step: samples are drawn by a deterministic solver, noised afresh, and
the velocity there is pulled towards good ones and pushed away from bad ones. Guidance, learning
rate and batch are in `configs/`. None of them has a ratio to the rollout's log-probs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Literal

from flowrl.functional.selection import best_and_worst, best_of_group, reward_weights
from flowrl.functional.sigma_draws import logit_normal_sigma, schedule_steps
from flowrl.methods.forward_objectives import (
    NFT_LOSSES,
    WEIGHTINGS,
    GroupPreference,
    MatchedRatio,
    NegativeAware,
    NFTForm,
    PairPreference,
    WeightedMatching,
    WeightingName,
    old_decay,
    renewal,
)
from flowrl.methods.forward_plan import SOLVERS, ForwardPlan, SolverName
from flowrl.methods.objectives import (
    COMPARES,
    NORMALIZERS,
    AdvantageStd,
    chosen,
    first_of_pairs,
    selected_samples,
    summed_rewards,
)
from flowrl.methods.spec import Method, require_positive

SampleWeight = Literal["best", "reward"]
SAMPLE_WEIGHTS = {"best": best_of_group, "reward": reward_weights}


def diffusion_nft(
    *,
    num_steps: int = 10,
    solver: SolverName = "dpmpp_2m",
    num_draws: int | None = None,
    trained_fraction: float = 0.99,
    loss: NFTForm = "code",
    mix: float = 1.0,
    advantage_std: AdvantageStd = "group",
    advantage_clip: float = 5.0,
    decay_start: int = 0,
    decay_slope: float = 0.001,
    decay_most: float = 0.5,
    kl_coef: float = 1e-4,
) -> Method:
    """Good samples attract the velocity, bad ones repel it; the set that lags behind draws them.

    Paper: DiffusionNFT, arXiv:2509.16117, which samples without guidance; mix 0.1 and 25 steps for
    several rewards. num_draws None = each of the sampler's own steps but the share that
    trained_fraction leaves out, once. `loss="code"` is what produced the published numbers, with
    its factor of advantage_clip; "paper" is the formula. Differs: mean over dims, not sum.

    Use when: the model is to be sampled without guidance and by any solver, and few updates must
    suffice; not for models distilled to few steps.
    """
    require_positive(advantage_clip=advantage_clip)
    levels = _levels(num_steps, trained_fraction)
    plan = ForwardPlan(
        num_steps,
        levels if num_draws is None else num_draws,
        partial(schedule_steps, fraction=trained_fraction),
        SOLVERS[solver],
        rollout_with="old",
    )
    scale = advantage_clip if loss == "code" else 1.0
    return Method(
        name="diffusion_nft",
        paper="DiffusionNFT, arXiv:2509.16117",
        policy="forward",
        plan=lambda step: plan,
        advantage=partial(
            summed_rewards, normalize=NORMALIZERS[advantage_std], clip=advantage_clip
        ),
        compares=COMPARES[advantage_std],
        objective=NegativeAware(NFT_LOSSES[loss], mix, advantage_clip, scale, kl_coef),
        old_decay=partial(old_decay, start=decay_start, slope=decay_slope, most=decay_most),
        numbers=plan.numbers,
    )


def awm(
    *,
    num_steps: int = 14,
    solver: SolverName = "ode",
    num_draws: int = 6,
    first_step: int = 1,
    trained_fraction: float = 0.9,
    weighting: WeightingName = "ghuber",
    clip_range: float = 1.0,
    off_policy: bool = False,
    advantage_std: AdvantageStd = "global",
    advantage_clip: float = 5.0,
    advantage_scale: float = 0.2,
    decay_slope: float = 0.001,
    decay_most: float = 0.3,
    kl_coef: float = 0.003,
    old_kl_coef: float = 1.0,
) -> Method:
    """The matching error takes the part of the log-likelihood in a policy gradient.

    Paper: AWM, arXiv:2509.25050, its code for GenEval and OCR (kl_coef 1e-4 for PickScore): sampled
    by an ODE without guidance, advantages of +-5 scaled to +-1, trained at the sampler's steps from
    the second to trained_fraction. Differs: no SA-Solver; see also `MatchedRatio`.

    Use when: you want a policy gradient on clean samples, without guidance, held back by a KL to
    the reference and to the set that lags behind.
    """
    require_positive(advantage_clip=advantage_clip, advantage_scale=advantage_scale)
    _levels(num_steps, trained_fraction, first_step)
    plan = ForwardPlan(
        num_steps,
        num_draws,
        partial(schedule_steps, first=first_step, fraction=trained_fraction),
        SOLVERS[solver],
        rollout_with="old" if off_policy else "current",
    )
    decay = partial(old_decay, slope=decay_slope, most=decay_most)
    return Method(
        name="awm",
        paper="AWM, arXiv:2509.25050",
        policy="forward",
        plan=lambda step: plan,
        advantage=partial(
            summed_rewards,
            normalize=NORMALIZERS[advantage_std],
            clip=advantage_clip,
            scale=advantage_scale,
        ),
        compares=COMPARES[advantage_std],
        objective=MatchedRatio(
            WEIGHTINGS[weighting], clip_range, clip_range, off_policy, kl_coef, old_kl_coef
        ),
        old_decay=decay if off_policy or old_kl_coef > 0 else None,
        numbers=plan.numbers,
    )


def dgpo(
    *,
    group_size: int = 24,
    num_steps: int = 10,
    solver: SolverName = "dpmpp_2m",
    num_draws: int = 4,
    trained_fraction: float = 0.7,
    scale: float = 100.0,
    anchor: Literal["reference", "old"] = "reference",
    old_from: int | None = 200,
    advantage_std: AdvantageStd = "group",
    advantage_clip: float = 5.0,
    decay_slope: float = 0.001,
    decay_most: float = 0.3,
    kl_coef: float = 0.02,
) -> Method:
    """Weighted matching in a group that shares its noise, weaker the better it is ranked already.

    Paper: DGPO, arXiv:2510.08425, its code with guidance; without, it has scale 2000, kl_coef .001
    and anchor "old". From training step old_from on, the set that lags behind draws the samples;
    None = never.
    Differs: no clip of the error; levels are drawn per group, where the code draws them for all.

    Use when: groups are large and their ranking is to be learnt as one preference, from samples of
    a deterministic solver.
    """
    require_positive(advantage_clip=advantage_clip)
    _levels(num_steps, trained_fraction)
    plan = ForwardPlan(
        num_steps,
        num_draws,
        partial(schedule_steps, fraction=trained_fraction),
        SOLVERS[solver],
        shares_draws=True,
        group_size=group_size,
    )
    late = replace(plan, rollout_with="old")
    switch = math.inf if old_from is None else old_from
    decay = partial(old_decay, slope=decay_slope, most=decay_most)
    return Method(
        name="dgpo",
        paper="DGPO, arXiv:2510.08425",
        policy="forward",
        plan=lambda step: plan if step < switch else late,
        advantage=partial(
            summed_rewards, normalize=NORMALIZERS[advantage_std], clip=advantage_clip
        ),
        compares=COMPARES[advantage_std],
        objective=GroupPreference(group_size, scale, kl_coef, anchor),
        old_decay=None if anchor == "reference" and old_from is None else decay,
        numbers=plan.numbers
        | {
            "group size": group_size,
            "samples drawn with": f"current, old from training step {switch} on",
        },
    )


def online_dpo(
    *,
    num_steps: int = 40,
    solver: SolverName = "ode",
    num_draws: int = 1,
    scale: float = 100.0,
    renew_every: int | None = 40,
) -> Method:
    """The best and the worst sample of a group are a pair of Diffusion-DPO, at shared noise.

    Paper: Flow-GRPO's code, `train_sd3_dpo` (24 samples of a prompt), after Diffusion-DPO,
    arXiv:2311.12908. The pair is compared with `old`, which becomes current every renew_every
    updates; None = with the base model. Differs: a group without a difference gives no pair.

    Use when: the reward is trusted only to tell the best of a group from the worst, or a DPO
    baseline is needed.
    """
    plan = ForwardPlan(num_steps, num_draws, logit_normal_sigma, SOLVERS[solver], shares_draws=True)
    if renew_every is not None:
        require_positive(renew_every=renew_every)
    return Method(
        name="online_dpo",
        paper="Diffusion-DPO, arXiv:2311.12908, online as in github.com/yifan123/flow_grpo",
        policy="forward",
        plan=lambda step: plan,
        advantage=partial(selected_samples, select=best_and_worst),
        compares="group",
        objective=PairPreference(scale, "reference" if renew_every is None else "old"),
        prune=chosen,
        old_decay=None if renew_every is None else partial(renewal, every=renew_every),
        numbers=plan.numbers,
    )


def flow_dpo(*, num_draws: int = 1, scale: float = 5000.0) -> Method:
    """Pairs of a data set, one image chosen and one rejected, at shared noise; nothing is drawn.

    Paper: Diffusion-DPO, arXiv:2311.12908 (beta 2000 to 5000; its code's launchers 5000), on a
    flow's velocity as in Flow-DPO, arXiv:2501.13918. The pair is compared with the base model.
    Scale is the code's beta, which has the paper's factor T in it. Differs: levels are SD3's
    logit-normal, as in Flow-GRPO's DPO (scale 100), where the paper draws them evenly.

    Use when: there are pairs that somebody has judged and no reward to ask, or an offline baseline
    is needed; data.train names the file of the pairs.
    """
    plan = ForwardPlan(
        0, num_draws, logit_normal_sigma, solver=None, shares_draws=True, group_size=2
    )
    return Method(
        name="flow_dpo",
        paper="Diffusion-DPO, arXiv:2311.12908, on flows as in Flow-DPO, arXiv:2501.13918",
        policy="forward",
        plan=lambda step: plan,
        advantage=first_of_pairs,
        compares="group",
        objective=PairPreference(scale),
        numbers=plan.numbers,
    )


def best_of_n_sft(
    *,
    num_steps: int = 40,
    solver: SolverName = "ode",
    num_draws: int = 1,
    weight: SampleWeight = "best",
    kl_coef: float = 0.0,
) -> Method:
    """Supervised fine-tuning on the best sample of every group, or on all by their reward.

    Paper: Flow-GRPO's code, `train_sd3_sft`; `weight="reward"` is reward-weighted regression, whose
    weight is the sum of the rewards, which must not be negative. No sample repels.

    Use when: a supervised baseline is needed; without samples that repel, DiffusionNFT's authors
    saw such training collapse.
    """
    plan = ForwardPlan(num_steps, num_draws, logit_normal_sigma, SOLVERS[solver])
    return Method(
        name="best_of_n_sft",
        paper="Best-of-N SFT and RWR, github.com/yifan123/flow_grpo",
        policy="forward",
        plan=lambda step: plan,
        advantage=partial(selected_samples, select=SAMPLE_WEIGHTS[weight]),
        objective=WeightedMatching(kl_coef),
        prune=chosen,
        numbers=plan.numbers,
    )


def _levels(num_steps: int, fraction: float, first: int = 0) -> int:
    """How many of the sampler's own noise levels may be trained at."""
    count = min(int(num_steps * fraction), num_steps) - first
    if not 0 < fraction <= 1 or first < 0 or count < 1:
        raise ValueError(
            f"trained_fraction={fraction} leaves no step to train of {num_steps}, from {first} on"
        )
    return count
