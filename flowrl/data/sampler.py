"""Which prompts a step trains on, and which of its samples belong to which rank and update.

Stateless: a batch is a function of (seed, step, rank), so a resumed run needs no sampler state.
The step as a whole is the same for every world size: num_groups prompts, group_size samples each,
in one global order; updates are contiguous parts of it, and ranks are contiguous parts of updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError
from flowrl.types import Prompt, PromptBatch


class GroupSampler:
    """Groups of samples of one prompt each: `sampler(step)` is this rank's part of the step.

    Prompts are drawn without replacement, epoch after epoch, each with its own order; a step may
    cross from one epoch into the next, so no prompt is ever left over and all are seen equally
    often. A prompt that a step meets twice makes two groups.

    Args:
        prompts: what is drawn from.
        num_groups: groups per step over all ranks, M.
        group_size: samples per group, G.
        updates_per_rollout: optimiser updates per step, m; update j trains on the groups
            [j * M/m, (j + 1) * M/m).
        seed: the run's.
        shuffle: a new order in each epoch; False = the order of `prompts`.
        rank, world_size: of this process. A rank has the rank-th equal part of every update; a
            group may span ranks (see `has_whole_groups`).

    Raises:
        ConfigError: no prompts, or groups that do not divide into updates and ranks.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        num_groups: int,
        group_size: int,
        updates_per_rollout: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
    ) -> None:
        _check_arithmetic(num_groups, group_size, updates_per_rollout, world_size)
        _check_rank(rank, world_size)
        if not prompts:
            raise ConfigError("the training prompts are empty; give at least one in data.prompts")
        self.prompts = tuple(prompts)
        self.num_groups = num_groups
        self.group_size = group_size
        self.updates_per_rollout = updates_per_rollout
        self.seed = seed
        self.shuffle = shuffle
        self.world_size = world_size
        per_update = num_groups // updates_per_rollout * group_size
        share = per_update // world_size
        starts = torch.arange(updates_per_rollout) * per_update + rank * share
        self._sample_id = (starts[:, None] + torch.arange(share)).flatten()
        self._update = torch.arange(updates_per_rollout).repeat_interleave(share)

    @property
    def has_whole_groups(self) -> bool:
        """True = every group lies on one rank, which rewards of scope "group" need."""
        per_update = self.num_groups // self.updates_per_rollout * self.group_size
        return per_update // self.world_size % self.group_size == 0

    def __call__(self, step: int) -> PromptBatch:
        """This rank's samples of training step `step`, in the step's global order.

        `group_id` is step * num_groups + index of the group; `sample_id` counts the samples of the
        step over all ranks; `seed` is derived from (run seed, step).
        """
        first = step * self.num_groups
        group = self._sample_id // self.group_size
        drawn = [self._draw(first + index) for index in range(self.num_groups)]
        return PromptBatch(
            prompts=tuple(drawn[index] for index in group.tolist()),
            group_id=first + group,
            sample_id=self._sample_id,
            member=self._sample_id % self.group_size,
            update=self._update,
            seed=derive_seed(self.seed, "rollout", step),
        )

    def _draw(self, position: int) -> Prompt:
        """The prompt at a position of the endless sequence of epochs."""
        epoch, index = divmod(position, len(self.prompts))
        if self.shuffle:
            index = _permutation(self.seed, epoch, len(self.prompts))[index]
        return self.prompts[index]

    def describe(self) -> list[tuple[str, str]]:
        """The batch arithmetic as rows (what, how much), for printing before step 0."""
        groups = self.num_groups // self.updates_per_rollout
        samples = self.num_groups * self.group_size
        epoch = len(self.prompts) / self.num_groups
        order = "shuffled" if self.shuffle else "in order"
        share = len(self._sample_id)
        return [
            ("samples per step", f"{self.num_groups} groups x {self.group_size} = {samples}"),
            ("updates per step", f"{self.updates_per_rollout}, each on {groups} groups"),
            (
                "samples per rank",
                f"{samples} / {self.world_size} ranks = {share} per step, "
                f"{share // self.updates_per_rollout} per update",
            ),
            ("prompts", f"{len(self.prompts)}, {order}; an epoch takes {epoch:.4g} steps"),
        ]


def eval_batch(
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    seed: int,
    rank: int,
    world_size: int,
) -> PromptBatch:
    """This rank's samples of an evaluation: all prompts, each the same number of times.

    In the order over all ranks, the samples of a prompt stand together, `group_id` is the index of
    the prompt and `sample_id` counts, so each sample has its own noise, the same in every
    evaluation. N samples need not divide: rank r has [r * N // W, (r + 1) * N // W), which is
    floor(N / W) or ceil(N / W) of them. `update` is 0.

    Raises:
        ConfigError: fewer samples than ranks, or none.
    """
    _check_rank(rank, world_size)
    num_samples = len(prompts) * max(samples_per_prompt, 0)
    if num_samples < world_size:
        raise ConfigError(
            f"{len(prompts)} prompts x samples_per_prompt {samples_per_prompt} = {num_samples} "
            f"samples cannot be evaluated on {world_size} ranks, which need one each at least; "
            "give more prompts or raise eval.samples_per_prompt"
        )
    sample_id = torch.arange(
        rank * num_samples // world_size, (rank + 1) * num_samples // world_size
    )
    group_id = sample_id // samples_per_prompt
    return PromptBatch(
        prompts=tuple(prompts[index] for index in group_id.tolist()),
        group_id=group_id,
        sample_id=sample_id,
        member=sample_id % samples_per_prompt,
        update=torch.zeros_like(sample_id),
        seed=derive_seed(seed, "evaluation"),
    )


@lru_cache(maxsize=4)  # a step looks into one epoch or a few neighbours
def _permutation(seed: int, epoch: int, num_prompts: int) -> tuple[int, ...]:
    bits = np.random.PCG64(derive_seed(seed, "epoch", epoch))
    return tuple(np.random.Generator(bits).permutation(num_prompts).tolist())


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, {world_size}), the number of processes, got {rank}")


def _check_arithmetic(num_groups: int, group_size: int, updates: int, world_size: int) -> None:
    for name, value in (
        ("data.num_groups", num_groups),
        ("data.group_size", group_size),
        ("optim.updates_per_rollout", updates),
        ("the number of processes", world_size),
    ):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    unit = updates * world_size // math.gcd(group_size, world_size)
    if num_groups % unit == 0:
        return
    below = num_groups // unit * unit
    fitting = " or ".join(str(each) for each in (below, below + unit) if each)
    if num_groups % updates:
        raise ConfigError(
            f"data.num_groups={num_groups} groups do not divide into "
            f"optim.updates_per_rollout={updates} updates; use {fitting} groups"
        )
    per_update = num_groups // updates
    raise ConfigError(
        f"{per_update} groups x group_size {group_size} = {per_update * group_size} samples of an "
        f"update do not divide into {world_size} ranks; use data.num_groups={fitting}"
    )
