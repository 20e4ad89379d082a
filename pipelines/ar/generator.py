"""What every autoregressive generator is to its pipeline: the law of the tokens, twice.

`forward` gives the logits of whole sequences at once, teacher-forced: what training and scoring
call. `start` and `step` give them group after group with a cache: what drawing calls. Both are the
same law; a test holds every generator to it.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from pipelines.ar.orders import TokenOrder
from tokenizers_vis.tokens import Codebook, TokenLayout


class Generator(nn.Module, ABC):
    """A text-conditional law over the ids of a tokenizer's layout.

    Attributes:
        name: in the registry.
        config: the numbers; plain data.
        order: which positions each step draws.
        vocab: ids per token.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    order: TokenOrder
    vocab: int

    def __init__(self, config: Any, layout: TokenLayout, codebook: Codebook) -> None:
        """Random weights.

        Args:
            config: of type `Config`.
            layout: of the tokens.
            codebook: of their ids.

        Raises:
            ValueError: tokens that this generator cannot draw.
        """
        super().__init__()
        self.config = config
        if codebook.vocab is None or codebook.groups != 1:
            raise ValueError(
                f"{self.name} draws one id per token; this tokenizer's are {codebook.kind} of "
                f"{codebook.groups} groups"
            )
        self.vocab = codebook.vocab

    def config_dict(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return dataclasses.asdict(self.config)

    @abstractmethod
    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Logits [B, L, V] of int64 tokens [B, L]; each is of the law given the groups before.

        Args:
            tokens: whole sequences.
            text: int64 [B, T] of the prompt's words.
        """

    @abstractmethod
    def start(self, text: Tensor) -> Any:
        """The state before the first group is drawn, for int64 text [B, T]."""

    @abstractmethod
    def step(self, state: Any, tokens: Tensor) -> Tensor:
        """Logits [B, g, V] of the next group.

        Args:
            state: of `start`; it moves on.
            tokens: int64 [B, L]; all groups before the next one are filled in.
        """
