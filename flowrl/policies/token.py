"""The policy of a fixed-length autoregressive token model; its decisions are categorical.

`rollout` draws position by position, then scores the complete tokens through `_evaluate`, the
function that training differentiates: so the ratio is exactly 1 on the first pass, whatever a
faster sampler may compute. Each sample draws from its own uniform numbers by the inverse of the
distribution function, so neither the batch it is in nor the rank changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowrl.data.noise import INITIAL_STREAM, sample_uniform
from flowrl.errors import ConfigError
from flowrl.functional.tokens import token_entropy, token_log_prob
from flowrl.policies.conditioning import PromptTable
from flowrl.protocols import Conditioning, TokenPipeline, Weights
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


class TokenPolicy:
    """Draws and scores token sequences of one length.

    Args:
        pipeline: the model; its `logits` must accept a prefix of a sequence.
        weights: the parameter sets of its network.
        temperature: positive; logits are divided by it, in drawing and in scoring.
        rollout_batch_size: network rows per forward without gradient.
        decode_batch_size: samples per call of the decoder.
        device: where the network is. What is returned lies on the CPU, but for `evaluate`.

    Attributes:
        training_network: what `evaluate` calls: the network, or the wrapper of it that a
            distributed run puts here, which makes the gradients of all ranks meet.

    Raises:
        ConfigError: a temperature that is not positive.
    """

    def __init__(
        self,
        pipeline: TokenPipeline,
        weights: Weights,
        *,
        rollout_batch_size: int,
        decode_batch_size: int,
        device: torch.device | str,
        temperature: float = 1.0,
    ) -> None:
        if not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature}; 1 is the model's")
        self.pipeline = pipeline
        self.weights = weights
        self.temperature = temperature
        self.rollout_batch_size = rollout_batch_size
        self.decode_batch_size = decode_batch_size
        self.device = torch.device(device)
        self.training_network: nn.Module = weights.network
        self._table: PromptTable | None = None

    def precompute(self, prompts: Sequence[str], folder: Path | None) -> None:
        """Encode all prompts once, into memory or a folder, and release the text encoders.

        Afterwards only these prompts can be used; before, any prompt is encoded when needed.
        """
        self._table = PromptTable(
            self.pipeline.encode, prompts, folder=folder, fingerprint=self.pipeline.fingerprint
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
            Rollout, S + 1 network rows per sample (S to draw, one to score); the trajectory.
        """
        tokens = self._draw_all(batch)
        scored = []
        for part in _parts(len(batch), self.rollout_batch_size):
            conditioning = self._conditioning(batch, part)
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
        return self._decoded(batch, tokens, tokens.numel() + len(batch)), trajectory

    def evaluate(self, trajectory: TokenTrajectory, index: Tensor) -> Evaluation:
        """Log-probs and entropies [K, S] of the decisions at `index` [K], with gradient."""
        sample = trajectory.decisions.sample[index.cpu()]
        conditioning = self._conditioning(trajectory.batch, sample)
        actions = trajectory.tokens[sample].to(self.device)
        return self._evaluate(self.training_network, actions, conditioning)

    @torch.no_grad()
    def sample(self, batch: PromptBatch, *, num_steps: int, guidance_scale: float) -> Rollout:
        """Samples alone, S network rows each, drawn as in `rollout`.

        Args:
            batch: what to draw for.
            num_steps: not read; a sequence takes as many steps as it has tokens.
            guidance_scale: 1.0; a token pipeline has no guidance.

        Raises:
            ConfigError: another guidance_scale.
        """
        if guidance_scale != 1.0:
            raise ConfigError(
                f"a token policy has no guidance, got guidance_scale={guidance_scale:g}; set 1"
            )
        tokens = self._draw_all(batch)
        return self._decoded(batch, tokens, tokens.numel())

    def _evaluate(
        self, network: nn.Module, tokens: Tensor, conditioning: Conditioning
    ) -> Evaluation:
        """Teacher-forced scores of complete tokens [B, S]: the one definition of the policy."""
        logits = self.pipeline.logits(network, tokens, conditioning)
        return Evaluation(
            log_prob=token_log_prob(logits, tokens, temperature=self.temperature),
            entropy=token_entropy(logits, temperature=self.temperature),
        )

    def _draw_all(self, batch: PromptBatch) -> Tensor:
        """Tokens int64 [N, S], on the CPU; a network row for each."""
        parts = _parts(len(batch), self.rollout_batch_size)
        return torch.cat([self._draw(batch, part) for part in parts])

    def _decoded(self, batch: PromptBatch, tokens: Tensor, network_evals: int) -> Rollout:
        """The record of complete tokens."""
        return Rollout(batch, tokens, network_evals, self._decode)

    def _decode(self, tokens: Tensor) -> Tensor:
        """Images [N, 3, H, W] of tokens [N, S], on the CPU."""
        images = [
            self.pipeline.decode(tokens[part].to(self.device)).float().cpu()
            for part in _parts(len(tokens), self.decode_batch_size)
        ]
        return torch.cat(images)

    def _draw(self, batch: PromptBatch, part: Tensor) -> Tensor:
        """Tokens int64 [B, S] of the samples at `part` [B], position by position; on the CPU."""
        length = self.pipeline.num_tokens
        conditioning = self._conditioning(batch, part)
        uniform = sample_uniform(
            batch.seed, batch.sample_id[part], (length,), stream=INITIAL_STREAM, device=self.device
        )
        tokens = torch.zeros(len(part), length, dtype=torch.int64, device=self.device)
        for position in range(length):
            # The token at `position` is still a placeholder, which no logit of it may see.
            prefix = tokens[:, : position + 1]
            logits = self.pipeline.logits(self.weights.network, prefix, conditioning)[:, -1]
            tokens[:, position] = inverse_cdf(logits, uniform[:, position], self.temperature)
        return tokens.cpu()

    def _conditioning(self, batch: PromptBatch, index: Tensor) -> dict[str, Tensor]:
        texts = [batch.prompts[i].text for i in index.tolist()]
        if self._table is not None:
            return self._table.rows(texts, self.device)
        return {name: rows.to(self.device) for name, rows in self.pipeline.encode(texts).items()}


def inverse_cdf(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The token at which the distribution function of softmax(logits / temperature) passes u.

    Args:
        logits: [B, V]; a token of logit -inf is never drawn.
        uniform: float32 [B], in [0, 1), of 24 bits as `sample_uniform` draws them.
        temperature: positive.

    Returns:
        int64 [B].
    """
    cdf = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    # The total is only about 1. As u <= 1 - 2^-24, the level rounds to below it, also in float32.
    level = uniform[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, level, right=True).squeeze(1)


def _parts(num: int, size: int) -> list[Tensor]:
    """The indices 0 ... num - 1 in consecutive parts of at most `size`."""
    return [torch.arange(start, min(start + size, num)) for start in range(0, num, size)]
