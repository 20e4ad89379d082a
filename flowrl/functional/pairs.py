"""Preferences between two samples or inside a group, from the errors of a flow's velocity.

`error` is `matching.matching_error`: low = the policy finds the sample likely. Compared with the
reference's error at the same (sigma, noise) it is an implicit reward, -(error - ref_error).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.functional.shapes import require_same_shape


def flow_dpo(
    win_error: Tensor,
    lose_error: Tensor,
    ref_win_error: Tensor,
    ref_lose_error: Tensor,
    scale: float,
) -> Tensor:
    """Loss [P] of pairs: -log sigmoid(scale / 2 * `preference_margin`).

    Paper: Diffusion-DPO, arXiv:2311.12908, eq. 14, with a flow's velocity for the noise. Differs:
    errors are means over dims and the factor T * weight(sigma) is part of the scale, as in
    Flow-GRPO's code (scale 100); Flow-Factory uses 2000. Online, the pair is the best and the worst
    of a group (`selection.best_and_worst`); offline, a pair of the data set.

    Args:
        win_error: [P], of the preferred sample; carries the gradient.
        lose_error: [P], of the other, at the same sigma and noise; carries the gradient.
        ref_win_error: [P], of the reference; detached.
        ref_lose_error: [P], of the reference; detached.
        scale: positive; the papers' beta.

    Raises:
        ValueError: shapes that differ or a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, but is {scale}.")
    margin = preference_margin(win_error, lose_error, ref_win_error, ref_lose_error)
    return -logsigmoid(0.5 * scale * margin)


def preference_margin(
    win_error: Tensor, lose_error: Tensor, ref_win_error: Tensor, ref_lose_error: Tensor
) -> Tensor:
    """Implicit reward of the winner minus the loser's [P]; positive = the pair is ranked right.

    Arguments and errors as `flow_dpo`.
    """
    require_same_shape(
        win_error=win_error,
        lose_error=lose_error,
        ref_win_error=ref_win_error,
        ref_lose_error=ref_lose_error,
    )
    return (lose_error - ref_lose_error.detach()) - (win_error - ref_win_error.detach())


def dgpo_weight(
    error: Tensor,
    ref_error: Tensor,
    advantage: Tensor,
    unit: Tensor,
    *,
    scale: float,
    group_size: int,
) -> Tensor:
    """How wrong the policy still ranks its group: sigmoid(scale * mean of A * (error - ref)) [E].

    Paper: DGPO, arXiv:2510.08425, whose loss is the mean of weight * advantage * error; read in the
    authors' code. 1/2 at the start, towards 0 where good samples became likelier than bad ones.

    Args:
        error: [E], of the current policy; detached here.
        ref_error: [E], of the reference, at the same sigma and noise; detached.
        advantage: [E], centred in the group; detached.
        unit: int64 [E]; decisions of one group and draw share one. All of a unit with an advantage
            other than 0 must be present.
        scale: positive; the paper's beta, 100 (authors' code) or 10 (Flow-Factory).
        group_size: samples of a group, by which the sum over the unit is divided.

    Returns:
        [E], in (0, 1), equal within a unit, detached.

    Raises:
        ValueError: shapes that differ, or numbers that are not positive.
    """
    if not (scale > 0 and group_size > 0):
        raise ValueError(f"scale and group_size must be positive, but are {scale}, {group_size}.")
    require_same_shape(error=error, ref_error=ref_error, advantage=advantage, unit=unit)
    terms = scale / group_size * advantage.detach() * (error - ref_error).detach()
    return torch.sigmoid(unit_sum(terms, unit))


def unit_sum(values: Tensor, unit: Tensor) -> Tensor:
    """Sum of `values` [E] over the decisions of the same `unit` (int64 [E]), for each of them."""
    names, place = torch.unique(unit, return_inverse=True)
    return values.new_zeros(len(names)).index_add(0, place, values)[place]
