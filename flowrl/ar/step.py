"""A generator's training as a network that gives its loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowrl.functional.tokens import token_entropy, token_log_prob
from pipelines.ar.generator import Generator


class LossNetwork(nn.Module):
    """The mean negative log-likelihood of a token given those before it and its prompt, in nats."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(
        self, sample: Mapping[str, Tensor], progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor], None]:
        """The loss, and numbers to log; nothing is drawn, and there is no adversary to judge it."""
        logits = self.generator(sample["ids"], sample["text"])
        loss = -token_log_prob(logits, sample["ids"]).mean()
        right = (logits.detach().argmax(-1) == sample["ids"]).float().mean()
        entropy = token_entropy(logits.detach()).mean()
        numbers = {"loss": loss.detach(), "metric/accuracy": right, "metric/entropy": entropy}
        return loss, numbers, None
