"""Surrogates of the policy objective: what to maximise, from a ratio and an advantage.

Values are per decision. No mean, no mask and no sign flip here: `aggregate` reduces, and the loss
is its negative.
"""

import torch
from torch import Tensor

from flowrl.functional.shapes import expand_to, require_same_shape


def ppo_clip(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Clipped surrogate min(ratio * advantage, clipped ratio * advantage), to be maximised.

    Paper: PPO, arXiv:1707.06347, eq. 7; DAPO, arXiv:2503.14476, for clip_low != clip_high. It
    bounds ratio * advantage from below: the gradient stops once a good decision is 1 + clip_high
    times as likely, or a bad one 1 - clip_low times, and never stops the way back.

    Args:
        ratio: [...], new over old probability, per decision.
        advantage: as ratio, or [N] for ratio [N, ...]: the row's; detached.
        clip_low: positive distance below 1; at 1 or more it never binds.
        clip_high: positive distance above 1.

    Returns:
        As ratio.

    Raises:
        ValueError: a clip distance that is not positive, or shapes that do not fit.
    """
    if not (clip_low > 0 and clip_high > 0):
        raise ValueError(
            "clip_low and clip_high are positive distances from 1, "
            f"but are {clip_low} and {clip_high}; a range 0.8 to 1.2 is written 0.2, 0.2."
        )
    advantage = expand_to(advantage.detach(), ratio, "advantage")
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage)


def ppo_clip_each(
    ratio: Tensor, advantage: Tensor, negative: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Sum over rewards of `ppo_clip` of each one's advantage, to be maximised.

    Paper: DanceGRPO, arXiv:2505.07818, as its published code adds one clipped loss per reward. By
    itself ppo_clip is linear in the advantages of one sign, so of K rewards only two sums matter:
    sum_k ppo_clip(ratio, A_k) = ppo_clip(ratio, P) + ppo_clip(ratio, M), with P the sum of the
    positive A_k and M that of the negative ones. At a ratio within the bounds that is
    ppo_clip(ratio, P + M); beyond one, only the rewards that want to go further are stopped.

    Args:
        ratio: [...], new over old probability, per decision.
        advantage: P + M, as ratio, or [N] for ratio [N, ...]: the row's; detached.
        negative: M, as advantage; at most 0, and at most advantage.
        clip_low: positive distance below 1, as in `ppo_clip`.
        clip_high: positive distance above 1.

    Returns:
        As ratio.

    Raises:
        ValueError: as `ppo_clip`, or advantage and negative differ in shape.
    """
    require_same_shape(advantage=advantage, negative=negative)
    positive = ppo_clip(ratio, advantage - negative, clip_low, clip_high)
    return positive + ppo_clip(ratio, negative, clip_low, clip_high)


def dppo(ratio: Tensor, advantage: Tensor, kl: Tensor, threshold: float) -> Tensor:
    """Surrogate ratio * advantage where `dppo_keep`, else 0, to be maximised.

    Paper: Flow-DPPO, arXiv:2606.11025, as implemented in verl-omni; the paper itself was not read.
    A trust region on the divergence of the decision instead of a clip on its ratio: of a
    high-dimensional Gaussian the ratio is one noisy sample of what the KL measures exactly.

    Args:
        ratio: [...], new over old probability, per decision.
        advantage: as ratio, or [N] for ratio [N, ...]: the row's; detached.
        kl: as ratio, KL(current to old) of the decision, e.g. `regularizers.gaussian_kl` with the
            old mean; detached. nan (a decision without density, to be masked) keeps.
        threshold: positive; verl-omni uses 1e-5 for the KL divided by the number of dims.

    Returns:
        As ratio.

    Raises:
        ValueError: a threshold that is not positive, or shapes that do not fit.
    """
    keep = dppo_keep(ratio, advantage, kl, threshold)
    return torch.where(keep, ratio * expand_to(advantage.detach(), ratio, "advantage"), 0.0)


def dppo_keep(ratio: Tensor, advantage: Tensor, kl: Tensor, threshold: float) -> Tensor:
    """Bool as ratio, False = outside the trust region (kl >= threshold) and moving further away.

    Away is up for a good decision (advantage > 0, ratio > 1) and down for a bad one; the way back
    is always open. Arguments and errors as `dppo`.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, but is {threshold}.")
    require_same_shape(ratio=ratio, kl=kl)
    advantage = expand_to(advantage.detach(), ratio, "advantage")
    moves_away = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
    return ~((kl >= threshold) & moves_away)
