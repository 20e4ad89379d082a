"""A tokenizer's training as networks that give losses: its own, and those of its adversaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.tokenizer import TokenizerOutput
from tokenizers_vis.training import TokenizerTraining


class LossNetwork(nn.Module):
    """The training as a network that gives its loss, which is all that DDP may look at."""

    def __init__(self, training: TokenizerTraining) -> None:
        super().__init__()
        self.training_parts = training

    def forward(
        self, images: Tensor, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor], TokenizerOutput]:
        """The loss, numbers to log, and the output without gradient."""
        output = self.training_parts(images, progress=progress, generator=generator)
        numbers = {f"loss/{name}": term.value for name, term in output.losses.items()}
        numbers |= {f"metric/{name}": value for name, value in output.metrics.items()}
        loss = output.loss
        numbers["loss"] = loss
        return loss, {n: v.detach().float() for n, v in numbers.items()}, detached(output)


class AdversaryNetwork(nn.Module):
    """The adversaries of all add-ons as one network that gives their losses.

    Args:
        addons: that have an adversary, by name; only the adversaries are trained here.
    """

    def __init__(self, addons: Mapping[str, AddOn]) -> None:
        super().__init__()
        self.adversaries = nn.ModuleDict({name: a.adversary for name, a in addons.items()})
        self._addons = dict(addons)

    def forward(
        self, images: Tensor, output: TokenizerOutput, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, and each by name; those that rest are left out."""
        found = {
            name: addon.adversary_loss(images, output, progress=progress)
            for name, addon in self._addons.items()
        }
        losses = {name: loss for name, loss in found.items() if loss is not None}
        if not losses:  # DDP waits for a backward after every forward: of nothing, then
            return 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum(), {}
        return torch.stack(list(losses.values())).sum(), losses


def detached(output: TokenizerOutput) -> TokenizerOutput:
    """The output without gradient."""

    def cut_off(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    tokens = replace(
        output.tokens,
        embeddings=output.tokens.embeddings.detach(),
        features=cut_off(output.tokens.features),
    )
    losses = {
        name: term._replace(value=term.value.detach()) for name, term in output.losses.items()
    }
    return replace(
        output, tokens=tokens, losses=losses, reconstruction=cut_off(output.reconstruction)
    )
