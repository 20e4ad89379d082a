"""What the papers on token policies are made of; keyword defaults are the paper's table."""

from __future__ import annotations

from functools import partial

from flowrl.methods.objectives import (
    COMPARES,
    NORMALIZERS,
    AdvantageStd,
    ClippedRatio,
    summed_rewards,
    token_kl,
)
from flowrl.methods.several import RewardLosses, combine
from flowrl.methods.spec import Method, TokenPlan, require_positive


def grpo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    advantage_std: AdvantageStd = "group",
    advantage_clip: float = 5.0,
    reward_losses: RewardLosses = "summed",
    kl_coef: float = 0.0,
) -> Method:
    """Group-relative advantages on every token, PPO-clip, k3 to the reference.

    Paper: GRPO, arXiv:2402.03300, eq. 3 to 4. Differs: the loss is the mean over all tokens of the
    update, not the mean of sequence means (equal for sequences of one length); kl_coef is 0 by
    default (the paper's is 0.04).

    Use when: the model is autoregressive over tokens; it is the only method here that trains one.
    """
    require_positive(advantage_clip=advantage_clip)
    method = Method(
        name="grpo",
        paper="GRPO, arXiv:2402.03300",
        policy="token",
        plan=lambda step: TokenPlan(),
        advantage=partial(
            summed_rewards, normalize=NORMALIZERS[advantage_std], clip=advantage_clip
        ),
        compares=COMPARES[advantage_std],
        objective=ClippedRatio(clip_low, clip_high, token_kl, kl_coef),
        numbers={"decisions": "every token"},
    )
    return combine(method, reward_losses, normalize=NORMALIZERS[advantage_std], clip=advantage_clip)
