"""The records that pass between the parts of flowrl, and THE legend of shapes.

N samples of a rank's rollout (its share of num_groups * group_size); T sampler steps; [T+1] sigmas;
R rows (a row is one network evaluation of training); E decisions (a flow transition, a token row);
S decisions in a token row; D latent elements of a sample. float32 unless said; ids are int64.
A decision is scored by one row; a row scores one decision or more (siblings of a tree share it).
Reading order: PromptBatch -> Rollout -> Trajectory (protocols.py) -> Evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import ShapeError

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its reward needs to know, e.g. GenEval's record."""

    text: str
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class PromptBatch:
    """A rank's samples of one training step or one evaluation.

    Attributes:
        prompts: [N]; a prompt stands once per sample.
        group_id: int64 [N]; samples with one id form a group, unique within the step on all ranks.
        sample_id: int64 [N]; index of the sample in the step over all ranks. All noise derives from
            (seed, sample_id or group_id), so the world size cannot change a sample.
        update: int64 [N]; the optimiser update of this step that trains on the sample.
        seed: int64 seed of the step's noise.
    """

    prompts: tuple[Prompt, ...]
    group_id: Tensor
    sample_id: Tensor
    update: Tensor
    seed: int

    def __post_init__(self) -> None:
        for name in ("group_id", "sample_id", "update"):
            value: Tensor = getattr(self, name)
            if value.dtype != torch.int64 or value.shape != (len(self.prompts),):
                raise ShapeError(
                    f"PromptBatch.{name} must be int64 [{len(self.prompts)}], "
                    f"got {value.dtype} {tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Decisions:
    """What the trajectory stored about its decisions, in the order in which rows score them.

    Attributes:
        row: int64 [E], ascending; the row that scores the decision.
        sample: int64 [E]; the sample (index into the batch) that the decision belongs to.
        old_log_prob: [E] or [E, S]; log density under the behaviour policy.
        mask: bool, as old_log_prob; True = contributes to the loss.
        sigma, sigma_next: [E]; the noise levels that a transition joins; NaN for tokens.
    """

    row: Tensor
    sample: Tensor
    old_log_prob: Tensor
    mask: Tensor
    sigma: Tensor
    sigma_next: Tensor

    def __post_init__(self) -> None:
        num = len(self.row)
        if self.mask.shape != self.old_log_prob.shape or len(self.old_log_prob) != num:
            raise ShapeError(
                f"{num} decisions need old_log_prob and mask of one shape [{num}, ...], got "
                f"{tuple(self.old_log_prob.shape)} and {tuple(self.mask.shape)}"
            )

    def select(self, keep: Tensor) -> Decisions:
        """The decisions at a bool or int64 index [K], in that order."""
        return Decisions(
            row=self.row[keep],
            sample=self.sample[keep],
            old_log_prob=self.old_log_prob[keep],
            mask=self.mask[keep],
            sigma=self.sigma[keep],
            sigma_next=self.sigma_next[keep],
        )

    def to(self, device: torch.device) -> Decisions:
        """The decisions on a device."""
        return Decisions(*(getattr(self, f.name).to(device) for f in fields(self)))


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


@dataclass(frozen=True)
class Chunk:
    """Decisions of one forward-backward with what the objective needs beside the evaluation.

    Attributes:
        decisions: [E] of them.
        advantage: as decisions.old_log_prob; detached.
    """

    decisions: Decisions
    advantage: Tensor


@dataclass(frozen=True)
class Rollout:
    """What a policy drew for a batch.

    Attributes:
        images: [N, 3, H, W] in [0, 1], on the CPU.
        decode_s: seconds spent in the decoder.
        network_evals: rows that went through the network, over the rank's batch; a guided
            evaluation (conditional and unconditional) counts as two.
    """

    batch: PromptBatch
    images: Tensor
    network_evals: int
    decode_s: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Rewards of N samples.

    Attributes:
        rewards: name -> [N]; NaN where invalid.
        weights: name -> factor in the sum; monitors are absent.
        valid: bool [N]; False = some trained reward failed, the sample is masked.
    """

    rewards: dict[str, Tensor]
    weights: dict[str, float]
    valid: Tensor
