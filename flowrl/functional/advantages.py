"""Advantages: how much better a sample is than its group, the samples of one prompt.

Every function takes `(rewards [N], group_id int64 [N], valid bool [N] or None)` and returns
advantages [N], detached, in the dtype of rewards (float32 at least) and zero where invalid. Groups
are found by group_id alone: any order, spread out, of unequal sizes. An invalid sample counts for
nobody, also when its reward is nan; a reward that is not finite and not marked invalid is refused.

With several rewards, `weighted_sum` adds raw scores before one of the functions, and
`sum_of_normalized` normalises each score by itself, so that no reward wins by its scale;
`signed_sums` also tells apart what the rewards that praise a sample say, and those that blame it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.functional.shapes import at_least_float32, require_same_shape


def group_normalized(
    rewards: Tensor,
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    eps: float = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """(reward - mean of its group) / (std of its group + eps) [N], detached.

    Paper: GRPO, arXiv:2402.03300, section 4.1. Differs: eps as in Flow-GRPO; DanceGRPO and its
    descendants use eps=1e-8, ddof=1.

    Args:
        rewards: [N].
        group_id: int64 [N].
        valid: bool [N], True = counts; None = all.
        eps: added to the std.
        ddof: 0 divides the variance by the number of members n, 1 by n - 1.

    Returns:
        [N], summing to 0 in every group.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a valid reward that is not finite.
    """
    groups = _group(rewards, group_id, valid)
    return groups.deviation / (_group_std(groups, ddof) + eps)


def global_std_normalized(
    rewards: Tensor,
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    eps: float = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """(reward - mean of its group) / (std over ALL valid rewards + eps) [N], detached.

    Paper: Flow-GRPO's code, its default (`global_std`). A group of nearly equal rewards then stays
    near zero instead of being blown up to unit variance. Arguments and errors as
    `group_normalized`.
    """
    groups = _group(rewards, group_id, valid)
    everyone = _group(rewards, torch.zeros_like(group_id), valid)
    return groups.deviation / (_group_std(everyone, ddof) + eps)


def group_centered(rewards: Tensor, group_id: Tensor, valid: Tensor | None = None) -> Tensor:
    """Reward minus the mean of its group [N], detached; no division by a std.

    Paper: Dr. GRPO, arXiv:2503.20783. Arguments and errors as `group_normalized`.
    """
    return _group(rewards, group_id, valid).deviation


def leave_one_out(rewards: Tensor, group_id: Tensor, valid: Tensor | None = None) -> Tensor:
    """Reward minus the mean of the OTHER members of its group [N], detached; 0 for a group of one.

    Paper: RLOO, arXiv:2402.14740. The baseline does not contain the sample, so the gradient is
    unbiased; it equals group_centered * n / (n - 1). Arguments and errors as `group_normalized`.
    """
    groups = _group(rewards, group_id, valid)
    return groups.deviation * groups.size / (groups.size - 1).clamp(min=1)


def zero_std_groups(
    rewards: Tensor,
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    floor: float = 1e-6,
    ddof: int = 0,
) -> Tensor:
    """Bool [N], True = the sample's group teaches nothing: under two valid members or std < floor.

    Arguments and errors as `group_normalized`; an invalid sample gets the answer of its group.
    """
    groups = _group(rewards, group_id, valid)
    return (groups.size < 2) | (_group_std(groups, ddof) < floor)


def clip_advantages(advantages: Tensor, limit: float) -> Tensor:
    """Advantages clamped to [-limit, limit]; every published trainer uses 5.

    Raises:
        ValueError: limit is not positive.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, but is {limit}.")
    return advantages.clamp(-limit, limit)


def weighted_sum(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of weights[name] * rewards[name] [N]: raw scores, so their scales matter.

    A reward of weight 0 is watched, not used: its nan does not enter. The weights are taken as
    given.

    Raises:
        ValueError: no rewards, names that differ from the weights', or shapes that differ.
    """
    _require_weights(rewards, weights)
    total = torch.zeros_like(at_least_float32(next(iter(rewards.values()))))
    for name, weight in weights.items():
        if weight != 0:
            total = total + weight * rewards[name]
    return total


def sum_of_normalized(
    rewards: Mapping[str, Tensor],
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    weights: Mapping[str, float],
    eps: float = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """Sum of weights[name] * group_normalized(rewards[name]) [N], detached.

    Paper: MixGRPO, arXiv:2507.21802 (its code's "advantage_aggr"). Differs: the weights are taken
    as given, as in Pref-GRPO; MixGRPO divides them by their sum. GDPO normalises the result once
    more, see `gdpo`.

    Args:
        rewards: name -> [N].
        group_id: int64 [N].
        valid: bool [N], True = all its rewards count; None = all.
        weights: name -> coefficient, for exactly the rewards; 0 = watched, not used.
        eps: added to each std.
        ddof: 0 or 1, as in `group_normalized`.

    Raises:
        ValueError: as `weighted_sum` and `group_normalized`.
    """
    used = {name: reward for name, reward in rewards.items() if weights.get(name) != 0}
    normalized = {
        name: group_normalized(reward, group_id, valid, eps=eps, ddof=ddof)
        for name, reward in used.items()
    }
    return weighted_sum({**rewards, **normalized}, weights)


def signed_sums(
    rewards: Mapping[str, Tensor],
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    weights: Mapping[str, float],
    normalize: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    limit: float,
) -> tuple[Tensor, Tensor]:
    """(sum of the rewards' advantages, sum of the negative ones alone), [N] each, detached.

    Paper: DanceGRPO, arXiv:2505.07818, whose code gives each reward an advantage, and a clipped
    loss, of its own; `surrogates.ppo_clip_each` takes these two sums. An advantage is
    weights[name] * clip_advantages(normalize(rewards[name]), limit): clamped before it is weighted,
    as there. A negative weight turns a reward round: it is clipped like the negated reward.

    Args:
        rewards: name -> [N].
        group_id: int64 [N].
        valid: bool [N], True = all its rewards count; None = all.
        weights: name -> coefficient, for exactly the rewards; 0 = watched, not used.
        normalize: (reward, group_id, valid) -> advantage [N], a function of this file.
        limit: to which each advantage is clamped.

    Returns:
        The second is at most 0, and at most the first.

    Raises:
        ValueError: as `weighted_sum`, `clip_advantages` and `normalize`.
    """
    _require_weights(rewards, weights)
    positive = negative = torch.zeros_like(at_least_float32(next(iter(rewards.values()))))
    for name, weight in weights.items():
        if weight != 0:
            advantage = clip_advantages(normalize(rewards[name], group_id, valid), limit)
            positive = positive + (weight * advantage).clamp(min=0)
            negative = negative + (weight * advantage).clamp(max=0)
    return positive + negative, negative


def gdpo(
    rewards: Mapping[str, Tensor],
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    weights: Mapping[str, float],
    eps: float = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """`sum_of_normalized`, then divided by its std over the whole batch [N], detached.

    Paper: GDPO (reward-decoupled normalisation), arXiv:2601.05242. Rewards keep their resolution
    as in `sum_of_normalized`, and the scale of the result does not grow with their number. The
    batch must be whole (all ranks), because its std is taken. Its mean, which the paper subtracts,
    is 0 up to rounding; without it, a group of equal rewards has advantages of exactly 0. Arguments
    and errors as `sum_of_normalized`.
    """
    total = sum_of_normalized(rewards, group_id, valid, weights=weights, eps=eps, ddof=ddof)
    return global_std_normalized(total, group_id, valid, eps=eps, ddof=ddof)


def dense_gains(
    rewards: Tensor,
    group_id: Tensor,
    valid: Tensor | None = None,
    *,
    eps: float = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """What every sampler step gained, normalised in the group step by step: [N, T], detached.

    Paper: DenseGRPO, arXiv:2601.20218: the gain R_{t-1} - R_t, where R_t is the reward of the
    image that the deterministic sampler makes of x_t. Differs: columns run in sampling order, so
    the gain of step i is rewards[:, i + 1] - rewards[:, i].

    Args:
        rewards: [N, T + 1]; column i = completed from the state before step i, the last = the image
            itself.
        group_id: int64 [N].
        valid: bool [N], True = all rewards of the row count; None = all.
        eps: added to each std; DenseGRPO's own eps was not verified.
        ddof: 0 or 1, as in `group_normalized`.

    Raises:
        ValueError: rewards that are not [N, T + 1] with T >= 1, or as `group_normalized`.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [N, T + 1], T >= 1, but have {list(rewards.shape)}.")
    gains = at_least_float32(rewards.detach()).diff(dim=1).unbind(1)
    columns = [group_normalized(gain, group_id, valid, eps=eps, ddof=ddof) for gain in gains]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class _Groups:
    """What a group's statistics are made of, spread back to its members."""

    index: Tensor  # int64 [N], 0 .. num_groups - 1
    num_groups: int
    size: Tensor  # [N], number of valid members of the sample's group
    deviation: Tensor  # [N], reward - mean of the group; 0 where invalid


def _group(rewards: Tensor, group_id: Tensor, valid: Tensor | None) -> _Groups:
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    _require_rewards(rewards, group_id, valid)
    rewards = at_least_float32(rewards.detach())
    ids, index = torch.unique(group_id, return_inverse=True)
    size = _group_sum(valid.to(rewards.dtype), index, len(ids))
    # Measured from the group's lowest reward, equal rewards deviate by exactly 0, not by rounding,
    # which a std of 1e-8 and eps=1e-8 would turn into advantages of order one.
    lowest = rewards.new_full((len(ids),), torch.inf).scatter_reduce(
        0, index, torch.where(valid, rewards, torch.inf), "amin"
    )
    above = torch.where(valid, rewards - lowest[index], 0.0)
    mean = _group_sum(above, index, len(ids)) / size.clamp(min=1)
    deviation = torch.where(valid, above - mean, 0.0)
    return _Groups(index, len(ids), size, deviation)


def _group_sum(values: Tensor, index: Tensor, num_groups: int) -> Tensor:
    """[N]: sum of `values` over the sample's group."""
    return values.new_zeros(num_groups).index_add(0, index, values)[index]


def _group_std(groups: _Groups, ddof: int) -> Tensor:
    """[N]: std of the sample's group, 0 where it has too few members for one."""
    squares = _group_sum(groups.deviation**2, groups.index, groups.num_groups)
    return torch.sqrt(squares / (groups.size - ddof).clamp(min=1))


def _require_weights(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    if not rewards or rewards.keys() != weights.keys():
        raise ValueError(
            f"weights must name exactly the rewards {sorted(rewards)}, but name {sorted(weights)}; "
            "give a reward that is only watched the weight 0."
        )
    require_same_shape(**rewards)


def _require_rewards(rewards: Tensor, group_id: Tensor, valid: Tensor) -> None:
    if rewards.ndim != 1:
        raise ValueError(f"rewards must be [N], but have shape {list(rewards.shape)}.")
    require_same_shape(rewards=rewards, group_id=group_id, valid=valid)
    if group_id.dtype != torch.int64 or valid.dtype != torch.bool:
        raise ValueError(
            "group_id must be int64 and valid bool, "
            f"but they are {group_id.dtype} and {valid.dtype}."
        )
    wrong = valid & ~torch.isfinite(rewards)
    if wrong.any():
        raise ValueError(
            f"rewards are not finite at {wrong.nonzero().flatten().tolist()}, where valid is True; "
            "a failed reward is invalid, so mark it False in valid."
        )
