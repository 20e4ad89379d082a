"""What a training keeps: all weights and statistics, and the average of the model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class TrainingWeights:
    """The state of a training, and the moving average that is evaluated and exported.

    The average is of the model's trained parameters. Statistics (a codebook that moves by averages
    of its own) are taken as they are.

    Args:
        training: everything that is trained or moves.
        model: the part of it that is exported.
        ema_decay: of the average; None = there is none.
    """

    def __init__(self, training: nn.Module, model: nn.Module, *, ema_decay: float | None) -> None:
        self.training = training
        self.model = model
        self.ema_decay = ema_decay
        self.ema: dict[str, Tensor] = {}
        if ema_decay is not None:
            self.ema = {name: value.detach().clone() for name, value in self._trained()}

    def update_ema(self, num_updates: int) -> None:
        """One step of the average, decay min(ema_decay, (1 + n) / (10 + n)) after n updates."""
        if self.ema_decay is None:
            return
        decay = min(self.ema_decay, (1 + num_updates) / (10 + num_updates))
        current = [value.detach() for _, value in self._trained()]
        torch._foreach_lerp_(list(self.ema.values()), current, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the `with`, the model computes with the average, if there is one."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, as a checkpoint stores it."""
        return {"training": dict(self.training.state_dict()), "ema": dict(self.ema)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts what `state_dict` gave back into place.

        Raises:
            RuntimeError, KeyError: names or shapes differ.
        """
        if state["ema"].keys() != self.ema.keys():
            raise KeyError("the moving average is of other weights")
        self.training.load_state_dict(state["training"])
        for name, value in self.ema.items():
            value.copy_(state["ema"][name])

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        named = self.model.named_parameters()
        return ((name, p) for name, p in named if p.requires_grad)

    def _exchange(self) -> None:
        if self.ema:
            for name, parameter in self._trained():
                parameter.data, self.ema[name] = self.ema[name], parameter.data
