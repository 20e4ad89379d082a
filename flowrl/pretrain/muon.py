"""Muon for the matrices of transformer blocks and AdamW for the rest, as one optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW, stepped, scheduled and saved together.

    Paper: Muon is usable at scale, arXiv:2502.16982: steps scaled to the root mean square of
    AdamW's, so that one schedule serves both.

    Args:
        matrices: of two dimensions, for Muon.
        others: parameter groups for AdamW.
        lr: of AdamW.
        muon_lr: of Muon.
        betas: of AdamW.
        weight_decay: of Muon; a group of AdamW brings its own.
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        muon_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        muon = torch.optim.Muon(
            list(matrices), lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._parts = (muon, torch.optim.AdamW(list(others), lr=lr, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of both."""
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both, one after the other."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        """A schedule changes the groups here: they are those of the parts."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def block_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The trained matrices within blocks: not of embeddings, heads or the ends of a network."""
    named = network.named_parameters()
    return [p for name, p in named if p.requires_grad and p.ndim == 2 and ".blocks." in name]
