"""What the papers on flow models are made of; a function's keyword defaults are the paper's table.

Presets for a model (steps, guidance, learning rate) are in `configs/`. Every rollout is T sampler
steps of which some are stochastic; the last step is never trained, because its Gaussian is too
sharp (Flow-GRPO), or has no density at all (CPS).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from flowrl.methods.objectives import (
    COMPARES,
    KLS,
    NORMALIZERS,
    AdvantageStd,
    ClippedRatio,
    KLName,
    extreme_samples,
    normalized_rewards,
    summed_rewards,
)
from flowrl.methods.several import DANCE, RewardLosses, combine
from flowrl.methods.spec import (
    KERNELS,
    KernelName,
    Method,
    StepPlan,
    own_noise,
    require_positive,
    shared_start,
)
from flowrl.methods.tails import Tail, TailCount
from flowrl.methods.windows import SlidingWindow, Strategy


def flow_grpo(
    *,
    num_steps: int = 10,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_std: AdvantageStd = "global",
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    kl: KLName = "paper",
    kl_coef: float = 0.0,
    shared_noise: bool = False,
) -> Method:
    """Every step stochastic, all but the last trained, KL to the reference in closed form.

    Paper: Flow-GRPO, arXiv:2505.05470, eq. 4 to 9. Differs: kl_coef is 0 by default, because the
    published 0.04 (GenEval, OCR) and 0.01 (PickScore) belong to `kl="code"`, whose KL lacks the
    factor 1/dt of the paper's; set both to reproduce the published runs.

    Use when: you want the baseline that the others are measured against, and can pay for training
    nearly every sampler step.
    """
    require_positive(noise_level=noise_level, clip_range=clip_range, advantage_clip=advantage_clip)
    plan = StepPlan(
        num_steps=num_steps,
        kernel=KERNELS[kernel](noise_level),
        stochastic=tuple(range(num_steps)),
        trained=_all_but_last(num_steps),
        keys=shared_start if shared_noise else own_noise,
    )
    method = Method(
        name="flow_grpo",
        paper="Flow-GRPO, arXiv:2505.05470",
        policy="flow",
        plan=lambda step: plan,
        advantage=partial(
            summed_rewards, normalize=NORMALIZERS[advantage_std], clip=advantage_clip
        ),
        compares=COMPARES[advantage_std],
        objective=ClippedRatio(clip_range, clip_range, KLS[kl], kl_coef),
        numbers={
            "sampler steps": num_steps,
            "kernel": f"{kernel}(noise_level={noise_level})",
            "stochastic steps": "all",
            "trained steps": f"0 to {num_steps - 2}",
            "shared noise in a group": shared_noise,
        },
    )
    return combine(method, reward_losses, normalize=NORMALIZERS[advantage_std], clip=advantage_clip)


def dance_grpo(
    *,
    num_steps: int = 16,
    kernel: KernelName = "dance_sde",
    noise_level: float = 0.3,
    trained_fraction: float = 0.6,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    num_extremes: int | None = None,
    shared_noise: bool = True,
) -> Method:
    """Every step stochastic with constant noise; each sample trains a random 60 % of the steps.

    Paper: DanceGRPO, arXiv:2505.07818, eq. 8 to 11. A group shares its starting noise; rewards are
    normalised one by one in their group (with the published code's eps=1e-8, ddof=1) and then
    summed. num_extremes is its best-of-N selection: only that many of the best and of the worst
    samples of a group are trained (video: 4 and 4 of 24), with the advantages of the whole group.
    Differs: one clipped loss of the summed advantages; reward_losses="separate" is the published
    code's, which adds one clipped loss per reward, of an advantage that is clamped by itself.

    Use when: the samples of a group should start from one noise, which the paper found to prevent
    reward hacking on video, or its published FLUX runs are your reference.
    """
    require_positive(noise_level=noise_level, clip_range=clip_range, advantage_clip=advantage_clip)
    if num_extremes is not None:
        require_positive(num_extremes=num_extremes)
    plan = StepPlan(
        num_steps=num_steps,
        kernel=KERNELS[kernel](noise_level),
        stochastic=tuple(range(num_steps)),
        trained=_all_but_last(num_steps),
        trained_fraction=trained_fraction,
        keys=shared_start if shared_noise else own_noise,
    )
    method = Method(
        name="dance_grpo",
        paper="DanceGRPO, arXiv:2505.07818",
        policy="flow",
        plan=lambda step: plan,
        advantage=partial(normalized_rewards, eps=1e-8, ddof=1, clip=advantage_clip),
        compares="group",
        objective=ClippedRatio(clip_range, clip_range, KLS["paper"]),
        prune=None if num_extremes is None else partial(extreme_samples, num=num_extremes),
        numbers={
            "sampler steps": num_steps,
            "kernel": f"{kernel}(noise_level={noise_level})",
            "stochastic steps": "all",
            "trained steps": f"{plan.num_kept} of 0 to {num_steps - 2}, random per sample "
            f"(trained_fraction={trained_fraction})",
            "shared noise in a group": shared_noise,
        },
    )
    return combine(method, reward_losses, normalize=DANCE, clip=advantage_clip)


def mix_grpo(
    *,
    num_steps: int = 25,
    window: int = 4,
    window_end: int | None = None,
    stride: int = 1,
    interval: int = 25,
    strategy: Strategy = "progressive",
    roll_back: bool = False,
    exp_threshold: int = 13,
    window_seed: int = 0,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    kl: KLName = "paper",
    kl_coef: float = 0.0,
    shared_noise: bool = True,
) -> Method:
    """Stochastic and trained inside a sliding window, deterministic elsewhere.

    Paper: MixGRPO, arXiv:2507.21802, section 4. The group shares its starting noise, so everything
    before the window is computed once per group. Rewards are normalised one by one in their group
    (with the published code's eps=1e-8, ddof=1) and then summed. Differs: see `windows`; the window
    stops before step window_end, None = the last step, which is never trained. A window that comes
    to the low noise levels can undo what it learnt: their Gaussians are sharp.

    Use when: time counts: a window costs a fraction of training every step, in the paper at an
    equal or better reward, so it is the first to try.
    """
    require_positive(noise_level=noise_level, clip_range=clip_range, advantage_clip=advantage_clip)
    end = _window_end(window_end, num_steps - 1, num_steps, window)
    sliding = SlidingWindow(
        end, window, stride, interval, strategy, roll_back, exp_threshold, window_seed
    )
    make_kernel = KERNELS[kernel](noise_level)

    def plan(step: int) -> StepPlan:
        inside = sliding.steps(step)
        keys = shared_start if shared_noise else own_noise
        return StepPlan(num_steps, make_kernel, inside, inside, keys=keys)

    method = Method(
        name="mix_grpo",
        paper="MixGRPO, arXiv:2507.21802",
        policy="flow",
        plan=plan,
        advantage=partial(normalized_rewards, eps=1e-8, ddof=1, clip=advantage_clip),
        compares="group",
        objective=ClippedRatio(clip_range, clip_range, KLS[kl], kl_coef),
        numbers={
            "sampler steps": num_steps,
            "kernel": f"{kernel}(noise_level={noise_level})",
            "stochastic steps": f"a window of {window} before step {end}",
            "trained steps": "the window",
            "window's position": sliding.words,
            "shared noise in a group": shared_noise,
        },
    )
    return combine(method, reward_losses, normalize=DANCE, clip=advantage_clip)


def mix_grpo_flash(
    *,
    frozen: bool = False,
    tail_ratio: float | None = None,
    tail_count: TailCount = "paper",
    num_steps: int = 25,
    window: int = 4,
    stride: int = 1,
    interval: int = 20,
    kernel: KernelName = "flow_sde",
    noise_level: float = 0.7,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    kl: KLName = "paper",
    kl_coef: float = 0.0,
    shared_noise: bool = True,
) -> Method:
    """MixGRPO with fewer steps, of second order, after the window.

    Paper: MixGRPO, arXiv:2507.21802, section 4.4. The remaining T - w - l steps become
    ceil((T - w - l) * tail_ratio) of DPM-Solver++ 2M, tail_ratio 0.4; `frozen` is Flash*, whose
    window stays at 0, with 0.2. Differs: tail_count="code" counts as its code does, but always
    ends at sigma = 0 (see `tails.Tail`); otherwise as `mix_grpo`.

    Use when: the rollout takes most of the time even with `mix_grpo`, and a slightly lower reward
    than its own is acceptable.
    """
    base = mix_grpo(
        num_steps=num_steps,
        window=window,
        stride=stride,
        interval=interval,
        strategy="frozen" if frozen else "progressive",
        kernel=kernel,
        noise_level=noise_level,
        clip_range=clip_range,
        advantage_clip=advantage_clip,
        reward_losses=reward_losses,
        kl=kl,
        kl_coef=kl_coef,
        shared_noise=shared_noise,
    )
    tail = Tail((0.2 if frozen else 0.4) if tail_ratio is None else tail_ratio, tail_count)
    return replace(
        base,
        name="mix_grpo_flash",
        paper="MixGRPO-Flash, arXiv:2507.21802",
        plan=lambda step: replace(base.plan(step), tail=tail),
        numbers=base.numbers
        | {"after the window": f"dpmpp_2m, ratio {tail.ratio}, counted as in the {tail_count}"},
    )


def flow_grpo_fast(
    *,
    num_steps: int = 10,
    window: int = 3,
    window_end: int | None = None,
    window_seed: int = 0,
    kernel: KernelName = "cps",
    noise_level: float = 0.8,
    clip_range: float = 1e-5,
    advantage_std: AdvantageStd = "global",
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    kl: KLName = "paper",
    kl_coef: float = 0.0,
    shared_noise: bool = False,
) -> Method:
    """Flow-GRPO on a window of steps at a random place in the first half; the ODE elsewhere.

    Paper: none; Flow-GRPO's repository, "Flow-GRPO-Fast", without guidance in training and test.
    With shared_noise a group branches from one state at the window's start, as its first version
    did. Differs: all ranks draw the same window, anew in every training step, where the code draws
    one per call of the pipeline, so that groups mix windows. window_end None = num_steps // 2.

    Use when: Flow-GRPO's training steps cost too much, or the model is to do without guidance,
    which such a run distils into it.
    """
    base = flow_grpo(
        num_steps=num_steps,
        kernel=kernel,
        noise_level=noise_level,
        clip_range=clip_range,
        advantage_std=advantage_std,
        advantage_clip=advantage_clip,
        reward_losses=reward_losses,
        kl=kl,
        kl_coef=kl_coef,
        shared_noise=shared_noise,
    )
    end = _window_end(window_end, num_steps // 2, num_steps, window)
    sliding = SlidingWindow(end, window, strategy="random", seed=window_seed)

    def plan(step: int) -> StepPlan:
        inside = sliding.steps(step)
        everywhere: StepPlan = base.plan(step)
        return replace(everywhere, stochastic=inside, trained=inside)

    return replace(
        base,
        name="flow_grpo_fast",
        paper="Flow-GRPO-Fast, github.com/yifan123/flow_grpo",
        plan=plan,
        numbers=base.numbers
        | {
            "stochastic steps": f"a window of {window} before step {end}",
            "trained steps": "the window",
            "window's position": sliding.words,
        },
    )


def _window_end(given: int | None, default: int, num_steps: int, window: int) -> int:
    """The step before which a window of steps stops."""
    end = default if given is None else given
    if window < num_steps and not window <= end < num_steps:
        raise ValueError(
            f"window={window} does not fit before window_end={end}; window_end may be {window} to "
            f"{num_steps - 1}"
        )
    return end


def _all_but_last(num_steps: int) -> tuple[int, ...]:
    """The steps that are trained where all are stochastic."""
    if num_steps < 2:
        raise ValueError(
            f"num_steps={num_steps} leaves nothing to train: the last sampler step never is; "
            "use at least 2"
        )
    return tuple(range(num_steps - 1))
