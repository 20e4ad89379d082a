"""A tokenizer with what it is trained with: dropout, add-ons, one output of named losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer


class TokenizerTraining(nn.Module):
    """What a training loop calls: images in, losses out.

    Args:
        tokenizer: that is trained.
        dropout: of its tokens; None = all are kept.
        addons: by name.

    Raises:
        ValueError: an add-on or the dropout does not fit the tokenizer.
    """

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        *,
        dropout: TokenDropout | None = None,
        addons: Mapping[str, AddOn] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.dropout = dropout
        self.addons = nn.ModuleDict(addons or {})
        for name, addon in (addons or {}).items():
            if addon.needs_reconstruction and tokenizer.is_generative:
                raise ValueError(
                    f"add-on '{name}' looks at the reconstruction, and the decoder of "
                    f"{tokenizer.name} samples: it has none in training"
                )
            addon.attach(tokenizer)
        if dropout is not None:
            dropout.draw(1, tokenizer.token_counts)

    def forward(
        self, images: Tensor, *, progress: float, generator: torch.Generator | None = None
    ) -> TokenizerOutput:
        """Tokens and all losses of a batch; progress in [0, 1]."""
        num_tokens = None
        if self.dropout is not None:
            counts = self.tokenizer.token_counts
            num_tokens = self.dropout.draw(len(images), counts, generator).to(images.device)
        output: TokenizerOutput = self.tokenizer(
            images, progress=progress, num_tokens=num_tokens, generator=generator
        )
        for addon in self.addons.values():
            output = output.with_losses(
                addon(images, output, progress=progress, generator=generator)
            )
        return output

    @property
    def adversaries(self) -> dict[str, AddOn]:
        """The add-ons that have one."""
        found = {name: each for name, each in self.addons.items() if isinstance(each, AddOn)}
        return {name: each for name, each in found.items() if each.adversary is not None}
