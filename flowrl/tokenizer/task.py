"""What is a tokenizer's own in a run: reconstructions of held-out samples, and its export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowrl.pretrain.task import Measured
from flowrl.tokenizer.card import write_card
from flowrl.tokenizer.heldout import evaluate_held_out
from flowrl.tokenizer.schema import TokenizerConfig
from tokenizers_vis.registry import save_pretrained
from tokenizers_vis.training import TokenizerTraining


class TokenizerTask:
    """Measures and exports a tokenizer.

    Args:
        config: the run's.
        training: tokenizer and add-ons.
        held_out: uint8 [N, *sample_shape], never trained on.
    """

    shown = ("eval/loss", "eval/psnr", "eval/usage/used")

    def __init__(
        self, config: TokenizerConfig, training: TokenizerTraining, held_out: Tensor
    ) -> None:
        self.config = config
        self.training = training
        self.held_out = held_out

    def measure(self, *, progress: float, device: torch.device) -> Measured:
        """Losses, PSNR and use of codes, and a grid: originals, then a row per number of tokens."""
        settings = self.config.eval
        found = evaluate_held_out(
            self.training,
            self.held_out,
            batch_size=settings.batch_size,
            num_shown=settings.num_shown,
            seed=settings.seed,
            progress=progress,
            device=device,
        )
        columns = found.images.shape[1]
        captions = [row for row in found.rows for _ in range(columns)]
        images = found.images.flatten(0, 1)
        return Measured(found.metrics, images, captions, columns, "reconstructions")

    def export(self, folder: Path, *, step: int, metrics: Mapping[str, float]) -> None:
        """The tokenizer as `load_pretrained` reads it, with its card."""
        save_pretrained(self.training.tokenizer, folder)
        write_card(folder, self.config, self.training.tokenizer, step=step, metrics=metrics)
