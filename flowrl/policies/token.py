"""The policy of an autoregressive token model; its decisions are categorical.

`rollout` draws group after group with the pipeline's cache, then scores the complete tokens through
`_evaluate`, the function that training differentiates: so the ratio is exactly 1 on the first pass,
whatever a faster sampler may compute. Each sample draws from its own uniform numbers by the inverse
of the distribution function, so neither the batch it is in nor the rank changes it.

The law is the whole one: top-k and top-p would cut off what training may make likely, and a ratio
of what was cut off is not one; they are not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowrl.data.noise import INITIAL_STREAM, sample_uniform
from flowrl.errors import ConfigError
from flowrl.functional.tokens import (
    guidance_at,
    guided_logits,
    inverse_cdf,
    token_entropy,
    token_log_prob,
)
from flowrl.policies.conditioning import PromptTable
from flowrl.protocols import TokenPipeline, Weights
from flowrl.types import Decisions, Evaluation, PromptBatch, Rollout


@dataclass(frozen=True)
class TokenTrajectory:
    """The drawn tokens, int64 [N, S] on the CPU; one row and one decision per sample."""

    batch: PromptBatch
    tokens: Tensor
    decisions: Decisions

    @property
    def num_rows(self) -> int:
        """Network evaluations that scoring every decision takes: one per sample."""
        return len(self.tokens)

    @property
    def unit(self) -> Tensor:
        """Int64 [E]: each decision is one of its own."""
        return self.decisions.row

    @property
    def tree(self) -> None:
        """No tree: sequences have nothing in common."""
        return None


@dataclass(frozen=True)
class Sampling:
    """The law that is drawn from, beside the network.

    Attributes:
        temperature: positive; logits are divided by it, in drawing and in scoring.
        guidance_scale: classifier-free guidance of the logits; 1 = off.
        guidance_schedule: of the scale over the steps of a draw, see `guidance_at`.
        log_prob: "guided" scores the law that is drawn from; "conditional" the conditional law
            alone, as T2I-R1 does: half of the network rows, but the ratio is of another law than
            the samples (cosine of its gradient with the true one about .94 at scale 3, .89 at 5).
    """

    temperature: float = 1.0
    guidance_scale: float = 1.0
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    log_prob: Literal["guided", "conditional"] = "guided"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature must be positive, got {self.temperature}; 1 is the model's"
            )


class TokenPolicy:
    """Draws and scores token sequences of one length.

    Args:
        pipeline: the model.
        weights: the parameter sets of its network.
        sampling: the law that rollouts draw from; the model's own by default.
        rollout_batch_size: network rows per forward without gradient.
        decode_batch_size: samples per call of the decoder.
        device: where the network is. What is returned lies on the CPU, but for `evaluate`.

    Attributes:
        training_network: what `evaluate` calls: the network, or the wrapper of it that a
            distributed run puts here, which makes the gradients of all ranks meet.
    """

    def __init__(
        self,
        pipeline: TokenPipeline,
        weights: Weights,
        *,
        rollout_batch_size: int,
        decode_batch_size: int,
        device: torch.device | str,
        sampling: Sampling | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.weights = weights
        self.sampling = sampling or Sampling()
        self.rollout_batch_size = rollout_batch_size
        self.decode_batch_size = decode_batch_size
        self.device = torch.device(device)
        self.training_network: nn.Module = weights.network
        self._level = torch.empty(pipeline.num_tokens, dtype=torch.int64, device=self.device)
        for number, group in enumerate(pipeline.groups):
            self._level[group] = number
        self._table: PromptTable | None = None

    @property
    def rows_per_draw(self) -> int:
        """Network rows that drawing one sample of a rollout takes."""
        return len(self.pipeline.groups) * _rows(self.sampling)

    @property
    def rows_per_score(self) -> int:
        """Network rows that scoring one sample takes, in rollout and training."""
        return _rows(self._scoring)

    @property
    def _scoring(self) -> Sampling:
        """The law that is scored."""
        if self.sampling.log_prob == "guided":
            return self.sampling
        return replace(self.sampling, guidance_scale=1.0)

    def precompute(self, prompts: Sequence[str], folder: Path | None) -> None:
        """Encode all prompts once, into memory or a folder, and release the text encoders.

        Afterwards only these prompts can be used; before, any prompt is encoded when needed.
        """
        self._table = PromptTable(
            self.pipeline.encode,
            ["", *prompts],
            folder=folder,
            fingerprint=self.pipeline.fingerprint,
        )
        self.pipeline.release_encoders()

    def save(self, folder: Path) -> None:
        """Write the weights in use as the pipeline's own kind of artefact."""
        self.weights.save(self.pipeline, folder)

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, plan: object) -> tuple[Rollout, TokenTrajectory]:
        """Samples and what training needs to score them again.

        Args:
            batch: what to draw for; the noise of a sample derives from (seed, sample_id).
            plan: not read; nothing in the drawing of tokens changes from step to step.

        Returns:
            Rollout, K + 1 network evaluations per sample for K groups (K to draw, one to score),
            each of two rows with guidance; the trajectory.
        """
        sampling = self.sampling
        tokens = self._draw_all(batch, sampling)
        scored = []
        for part in self._parts(len(batch), sampling):
            conditioning = self._conditioning(batch, part, self._scoring)
            actions = tokens[part].to(self.device)
            scored.append(self._evaluate(self.weights.network, actions, conditioning).log_prob)
        old_log_prob = torch.cat(scored).cpu()
        number = torch.arange(len(batch))
        no_sigma = torch.full((len(batch),), torch.nan)
        decisions = Decisions(
            row=number,
            sample=number,
            step=torch.zeros_like(number),
            old_log_prob=old_log_prob,
            mask=torch.ones_like(old_log_prob, dtype=torch.bool),
            sigma=no_sigma,
            sigma_next=no_sigma,
        )
        trajectory = TokenTrajectory(batch=batch, tokens=tokens, decisions=decisions)
        evals = len(batch) * (self.rows_per_draw + self.rows_per_score)
        return Rollout(batch, tokens, evals, self._decode), trajectory

    def evaluate(self, trajectory: TokenTrajectory, index: Tensor) -> Evaluation:
        """Log-probs and entropies [K, S] of the decisions at `index` [K], with gradient."""
        sample = trajectory.decisions.sample[index.cpu()]
        conditioning = self._conditioning(trajectory.batch, sample, self._scoring)
        actions = trajectory.tokens[sample].to(self.device)
        return self._evaluate(self.training_network, actions, conditioning)

    @torch.no_grad()
    def sample(self, batch: PromptBatch, *, num_steps: int, guidance_scale: float) -> Rollout:
        """Samples alone, drawn as in `rollout`.

        Args:
            batch: what to draw for.
            num_steps: not read; a sequence takes as many steps as its order has groups.
            guidance_scale: instead of the rollout's.
        """
        sampling = replace(self.sampling, guidance_scale=guidance_scale)
        tokens = self._draw_all(batch, sampling)
        evals = len(batch) * len(self.pipeline.groups) * _rows(sampling)
        return Rollout(batch, tokens, evals, self._decode)

    def _evaluate(
        self, network: nn.Module, tokens: Tensor, conditioning: _Conditioned
    ) -> Evaluation:
        """Teacher-forced scores of complete tokens [B, S]: the one definition of the policy."""
        repeated = tokens.repeat(conditioning.rows, 1)
        logits = conditioning.combined(
            self.pipeline.logits(network, repeated, conditioning.given), self._level
        )
        temperature = self.sampling.temperature
        return Evaluation(
            log_prob=token_log_prob(logits, tokens, temperature=temperature),
            entropy=token_entropy(logits, temperature=temperature),
        )

    def _draw_all(self, batch: PromptBatch, sampling: Sampling) -> Tensor:
        """Tokens int64 [N, S], on the CPU."""
        parts = self._parts(len(batch), sampling)
        return torch.cat([self._draw(batch, part, sampling) for part in parts])

    def _decode(self, tokens: Tensor) -> Tensor:
        """Images [N, 3, H, W] of tokens [N, S], on the CPU."""
        images = [
            self.pipeline.decode(tokens[part].to(self.device)).float().cpu()
            for part in _parts(len(tokens), self.decode_batch_size)
        ]
        return torch.cat(images)

    def _draw(self, batch: PromptBatch, part: Tensor, sampling: Sampling) -> Tensor:
        """Tokens int64 [B, S] of the samples at `part` [B], group by group; on the CPU."""
        length = self.pipeline.num_tokens
        conditioning = self._conditioning(batch, part, sampling)
        uniform = sample_uniform(
            batch.seed, batch.sample_id[part], (length,), stream=INITIAL_STREAM, device=self.device
        )
        tokens = torch.zeros(len(part), length, dtype=torch.int64, device=self.device)
        network = self.weights.network
        state = self.pipeline.start(network, conditioning.given)
        for group in self.pipeline.groups:
            # What is drawn next and later is still a placeholder, which no logit of it may see.
            repeated = tokens.repeat(conditioning.rows, 1)
            logits = self.pipeline.step(network, state, repeated)
            logits = conditioning.combined(logits, self._level[group])
            tokens[:, group] = inverse_cdf(logits, uniform[:, group], sampling.temperature)
        return tokens.cpu()

    def _conditioning(self, batch: PromptBatch, index: Tensor, sampling: Sampling) -> _Conditioned:
        """Rows of the samples at `index`, then, if the sampling guides, those of no prompt."""
        texts = [batch.prompts[i].text for i in index.tolist()]
        if sampling.guidance_scale == 1:
            return _Conditioned(self._encoded(texts), None)
        scale = guidance_at(
            sampling.guidance_scale, len(self.pipeline.groups), sampling.guidance_schedule
        )
        return _Conditioned(self._encoded([*texts, *[""] * len(texts)]), scale.to(self.device))

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self._table is not None:
            return self._table.rows(texts, self.device)
        return {name: rows.to(self.device) for name, rows in self.pipeline.encode(texts).items()}

    def _parts(self, num: int, sampling: Sampling) -> list[Tensor]:
        """The samples of every forward without gradient."""
        return _parts(num, max(1, self.rollout_batch_size // _rows(sampling)))


@dataclass(frozen=True)
class _Conditioned:
    """What a forward is conditioned on: B rows, or B and as many of no prompt.

    Attributes:
        given: named tensors of all rows.
        scale: [K], guidance of every step; None = there is none.
    """

    given: dict[str, Tensor]
    scale: Tensor | None

    @property
    def rows(self) -> int:
        """Per sample."""
        return 1 if self.scale is None else 2

    def combined(self, logits: Tensor, level: Tensor) -> Tensor:
        """The law's logits [B, n, V] of those of all rows; int64 `level` [n], the steps."""
        if self.scale is None:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guided_logits(conditional, unconditional, self.scale[level][:, None])


def _rows(sampling: Sampling) -> int:
    """Network rows per sample."""
    return 1 if sampling.guidance_scale == 1 else 2


def _parts(num: int, size: int) -> list[Tensor]:
    """The indices 0 ... num - 1 in consecutive parts of at most `size`."""
    return [torch.arange(start, min(start + size, num)) for start in range(0, num, size)]
