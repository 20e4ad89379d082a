"""TokenFlow's teacher, by name, so that a configuration can say it."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.teachers import timm_teacher
from tokenizers_vis.tokenflow import TokenFlow
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer


class SemanticTeacher(AddOn):
    """Sets a TokenFlow's teacher before training; the tokenizer itself has the semantic loss.

    Paper: TokenFlow, arXiv:2412.03069, with CLIP, ViTamin or SigLIP. For any callable instead of a
    name call `TokenFlow.teach`.

    Args:
        teacher: name of a timm network, whose features are as wide as the tokenizer's teacher_dim.
        image_size: to which images are resized for it; None = the size that it was trained with.
        is_pretrained: False = random weights.
    """

    def __init__(
        self, teacher: str, *, image_size: int | None = None, is_pretrained: bool = True
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.image_size, self.is_pretrained = image_size, is_pretrained

    def attach(self, tokenizer: VisualTokenizer) -> None:
        if not isinstance(tokenizer, TokenFlow):
            raise ValueError(f"semantic_teacher is for tokenflow, not for {tokenizer.name}")
        tokenizer.teach(
            timm_teacher(self.teacher, image_size=self.image_size, is_pretrained=self.is_pretrained)
        )

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        return {}
