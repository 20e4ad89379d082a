"""What an add-on is: further losses of a training forward, of any tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer


class AddOn(nn.Module, ABC):
    """Base of all add-ons. Its parameters are trained with the tokenizer's and then thrown away.

    Attributes:
        adversary: a network that is trained against the tokenizer, by `adversary_loss` and an
            optimiser of its own; None = there is none.
        needs_reconstruction: whether it looks at the decoded image of the training forward.
    """

    adversary: nn.Module | None
    needs_reconstruction: bool = False

    def __init__(self) -> None:
        super().__init__()
        # Not a default of the class: it would hide the network, which nn.Module keeps elsewhere.
        self.adversary = None

    def attach(self, tokenizer: VisualTokenizer) -> None:
        """Called once, before training: makes what depends on the tokenizer.

        Raises:
            ValueError: it cannot work with this tokenizer.
        """

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        """The add-on's losses by name, with gradient to what it teaches."""

    def adversary_loss(
        self, images: Tensor, output: TokenizerOutput, *, progress: float
    ) -> Tensor | None:
        """What the adversary minimises, of a detached output; None = it rests in this step."""
        return None
