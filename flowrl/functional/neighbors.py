"""Neighbor GRPO: a policy over the members of a group, without any stochastic step.

Paper: Neighbor GRPO, arXiv:2511.16955. A group starts from neighbouring noises, every member is
sampled deterministically, and the current policy's one-step prediction from one of them (the
anchor) is scored by how near it lies to each member. The formulas are those of a third party's note
and an independent implementation: the scale of the distance (sum or mean over dims) and the use of
the weights were not verified in the paper.
"""

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32, require_same_shape


def neighbor_noise(shared: Tensor, own: Tensor, spread: float) -> Tensor:
    """Starting noise sqrt(1 - spread^2) * shared + spread * own [...]: standard normal again.

    Members of one group correlate by 1 - spread^2; the best published spread is 0.3.

    Raises:
        ValueError: a spread outside (0, 1], or shapes that differ.
    """
    if not 0 < spread <= 1:
        raise ValueError(f"spread must be in (0, 1], but is {spread}; 1 = independent noises.")
    require_same_shape(shared=shared, own=own)
    return float((1 - spread**2) ** 0.5) * shared + spread * own


def neighbor_log_prob(candidates: Tensor, anchor: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-policy over a group's members: log softmax(-|candidate - anchor|^2 / temperature) [B, G].

    Its gradient pulls the anchor's prediction towards a candidate and away from the mean of all,
    weighted by how near they are.

    Args:
        candidates: [B, G, ...], the members' states at one noise level; detached.
        anchor: [B, ...], the current policy's prediction of that state; carries the gradient.
        temperature: positive; divides the squared distance, a sum over dims.

    Returns:
        float32 [B, G], float64 if an input is; log-probs that sum to 1 over G.

    Raises:
        ValueError: shapes that do not fit or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, but is {temperature}.")
    if candidates.ndim < 3 or candidates[:, 0].shape != anchor.shape:
        raise ValueError(
            "candidates must be [B, G, ...] for an anchor [B, ...], "
            f"but are {list(candidates.shape)} for {list(anchor.shape)}."
        )
    difference = at_least_float32(candidates.detach()) - at_least_float32(anchor)[:, None]
    distance = difference.square().flatten(2).sum(dim=2)
    return torch.log_softmax(-distance / temperature, dim=1)


def quasi_norm_weighted(advantages: Tensor, group_id: Tensor, *, power: float = 0.8) -> Tensor:
    """Advantages over the quasi-norm of their group, A / (sum of |A|^power)^(1 / power) [N].

    Below 1 the quasi-norm of a flat group is larger than that of a peaked one of equal energy, so
    groups in which nobody stands out teach less. Detached; a group of zeros stays zero.

    Args:
        advantages: [N], 0 where invalid.
        group_id: int64 [N].
        power: in (0, 1]; published: 0.8.

    Raises:
        ValueError: a power outside (0, 1], or shapes that differ.
    """
    if not 0 < power <= 1:
        raise ValueError(f"power must be in (0, 1], but is {power}.")
    require_same_shape(advantages=advantages, group_id=group_id)
    advantages = at_least_float32(advantages.detach())
    ids, index = torch.unique(group_id, return_inverse=True)
    total = advantages.new_zeros(len(ids)).index_add(0, index, advantages.abs() ** power)
    norm = total[index] ** (1 / power)
    return torch.where(norm > 0, advantages / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
