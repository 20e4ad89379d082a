"""Surrogates of the policy objective: what to maximise, from a ratio and an advantage.

Values are per decision. No mean, no mask and no sign flip here: `aggregate` reduces, and the loss
is its negative.
"""

import torch
from torch import Tensor

from flowrl.functional.shapes import expand_to


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
