"""The records that pass between the parts of flowrl, and THE legend of shapes.

N samples of a rank's rollout (its share of num_groups * group_size); T sampler steps; [T+1] sigmas;
R rows (a row is one network evaluation of training); E decisions (a flow transition, a token row);
S decisions in a token row; D latent elements of a sample. float32 unless said; ids are int64.
A decision is scored by one row; a row scores one decision or more (siblings of a tree share it).
Reading order: PromptBatch -> Tree -> Rollout -> Trajectory (protocols.py) -> Evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import ShapeError

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt, what its reward needs to know, and its images if a data set has them.

    Attributes:
        text: what is asked for.
        metadata: e.g. GenEval's record.
        images: files of the samples of a group, the preferred one first; () = samples are drawn.
    """

    text: str
    metadata: Metadata = field(default_factory=dict)
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class PromptBatch:
    """A rank's samples of one training step or one evaluation.

    Attributes:
        prompts: [N]; a prompt stands once per sample.
        group_id: int64 [N]; samples with one id form a group, unique within the step on all ranks.
        sample_id: int64 [N]; index of the sample in the step over all ranks. All noise derives from
            (seed, sample_id or group_id), so the world size cannot change a sample.
        member: int64 [N]; index of the sample in its group, which may lie on several ranks.
        update: int64 [N]; the optimiser update of this step that trains on the sample.
        seed: int64 seed of the step's noise.
    """

    prompts: tuple[Prompt, ...]
    group_id: Tensor
    sample_id: Tensor
    member: Tensor
    update: Tensor
    seed: int

    def __post_init__(self) -> None:
        for name in ("group_id", "sample_id", "member", "update"):
            value: Tensor = getattr(self, name)
            if value.dtype != torch.int64 or value.shape != (len(self.prompts),):
                raise ShapeError(
                    f"PromptBatch.{name} must be int64 [{len(self.prompts)}], "
                    f"got {value.dtype} {tuple(value.shape)}"
                )

    @classmethod
    def one_group(cls, prompts: Sequence[Prompt], *, seed: int = 0) -> PromptBatch:
        """Samples of one group on one rank, in the order of `prompts`, a prompt per sample."""
        number = torch.arange(len(prompts))
        zeros = torch.zeros_like(number)
        return cls(tuple(prompts), zeros, number, number, zeros, seed)

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, index: Tensor) -> PromptBatch:
        """The samples at int64 `index` [K], in that order."""
        return PromptBatch(
            tuple(self.prompts[i] for i in index.tolist()),
            self.group_id[index],
            self.sample_id[index],
            self.member[index],
            self.update[index],
            self.seed,
        )


@dataclass(frozen=True)
class Tree:
    """Which samples share which states: the tree of a flow rollout, of one rank or of all.

    Two samples are the same state before step i as long as their keys agree up to there.

    Attributes:
        keys: int64 [N, T+1]; column 0 names the starting noise, column 1 + i the noise of step i;
            -1 = the step is deterministic for this sample.
        log_prob: [N, T]; of the step that each sample took, under the behaviour policy; 0 where it
            was deterministic or has no density.
    """

    keys: Tensor
    log_prob: Tensor

    def __post_init__(self) -> None:
        num, levels = self.keys.shape
        if self.keys.dtype != torch.int64 or self.log_prob.shape != (num, levels - 1):
            raise ShapeError(
                f"a tree needs int64 keys [N, T+1] and log_prob [N, T], got {self.keys.dtype} "
                f"{tuple(self.keys.shape)} and {tuple(self.log_prob.shape)}"
            )

    @cached_property
    def node(self) -> Tensor:
        """Int64 [N, T+1]: the distinct state of every sample before every step, by its number.

        Numbers count from 0 in each level and ascend with the number of the parent, then the key.
        """
        columns = [torch.unique(self.keys[:, 0], return_inverse=True)[1]]
        for step in range(self.keys.shape[1] - 1):
            pair = torch.stack([columns[-1], self.keys[:, 1 + step]], dim=1)
            columns.append(torch.unique(pair, dim=0, return_inverse=True)[1])
        return torch.stack(columns, dim=1)

    def any_below(self, flags: Tensor) -> Tensor:
        """Bool [N, T]: whether bool `flags` [N] holds for a sample that took the same edge."""
        columns = []
        for node in self.node[:, 1:].unbind(1):
            hits = torch.zeros(len(node), dtype=torch.int64).index_add(0, node, flags.long())
            columns.append(hits[node] > 0)
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Decisions:
    """What the trajectory stored about its decisions, in the order in which rows score them.

    A decision of a flow is an edge of its tree, however many samples descend from it.

    Attributes:
        row: int64 [E], ascending; the row that scores the decision.
        sample: int64 [E]; the sample (index into the batch) that the decision belongs to, the first
            one that descends from it.
        step: int64 [E]; the sampler step that the decision took; 0 for tokens.
        old_log_prob: [E] or [E, S]; log density under the behaviour policy.
        mask: bool, as old_log_prob; True = contributes to the loss.
        sigma, sigma_next: [E]; the noise levels that a transition joins; NaN for tokens.
        old_mean: [E, ...latent]; transition mean under the behaviour policy, where the plan asks
            for it; None otherwise.
    """

    row: Tensor
    sample: Tensor
    step: Tensor
    old_log_prob: Tensor
    mask: Tensor
    sigma: Tensor
    sigma_next: Tensor
    old_mean: Tensor | None = None

    def __post_init__(self) -> None:
        num = len(self.row)
        if self.mask.shape != self.old_log_prob.shape or len(self.old_log_prob) != num:
            raise ShapeError(
                f"{num} decisions need old_log_prob and mask of one shape [{num}, ...], got "
                f"{tuple(self.old_log_prob.shape)} and {tuple(self.mask.shape)}"
            )

    def select(self, keep: Tensor) -> Decisions:
        """The decisions at a bool or int64 index [K], in that order."""
        return self._each(lambda value: value[keep])

    def to(self, device: torch.device) -> Decisions:
        """The decisions on a device."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Decisions:
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in given.items() if v is not None})


@dataclass(frozen=True)
class Evaluation:
    """How a parameter set sees stored decisions.

    Attributes:
        log_prob: as Decisions.old_log_prob; with gradient unless evaluated under no_grad.
        transition_mean: [E, ...latent] of a flow transition; None for tokens.
        transition_std: broadcasts against transition_mean; None for tokens.
        entropy: [E, S] of a token's distribution; None for flow transitions.
    """

    log_prob: Tensor
    transition_mean: Tensor | None = None
    transition_std: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Name -> values per decision, as log_prob."""
        return {"log_prob": self.log_prob}


@dataclass(frozen=True)
class Chunk:
    """Decisions of one forward-backward with what the objective needs beside the evaluation.

    Attributes:
        decisions: [E] of them.
        advantage: as decisions.old_log_prob; detached.
        weight: [E]; factor on the loss of a decision, detached; None = 1.
        negative_advantage: as advantage; its share from rewards that blame the sample, where the
            loss of every reward is clipped by itself; None = that of their sum is.
    """

    decisions: Decisions
    advantage: Tensor
    weight: Tensor | None = None
    negative_advantage: Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """What a policy drew for a batch, or found for it in a data set.

    Attributes:
        batch: the samples.
        latents: [N, ...latent] at the end of the sampler, or int64 [N, S] tokens.
        network_evals: rows that went through the network, over the rank's batch; a guided
            evaluation (conditional and unconditional) counts as two.
        decode: latents -> images.
    """

    batch: PromptBatch
    latents: Tensor
    network_evals: int
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def images(self) -> Tensor:
        """[N, 3, H, W] in [0, 1], on the CPU; decoded when they are first asked for."""
        with torch.no_grad():
            return self.decode(self.latents)


@dataclass
class Failures:
    """What went wrong with a reward: calls that failed, samples given up, and the last reason."""

    calls: int = 0
    samples: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Scores:
    """Rewards of N samples.

    Attributes:
        rewards: name -> [N]; NaN where invalid.
        weights: name -> factor in the sum; monitors are absent.
        valid: bool [N]; False = some trained reward failed, the sample is masked.
        components: "reward/component" -> [N], what rewards say of their scores; for the log alone.
        failures: name -> what failed on the way; rewards without are absent.
        seconds: name -> time that the reward worked.
    """

    rewards: dict[str, Tensor]
    weights: dict[str, float]
    valid: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, Failures] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, Tensor]:
        """Name -> [N] of the rewards that have a weight, without the monitors."""
        return {name: self.rewards[name] for name in self.weights}
