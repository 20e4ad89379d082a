"""What is a generator's own in a run: held-out likelihood, drawn images, and its export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from flowrl.ar.card import write_card
from flowrl.ar.data import Pairs
from flowrl.ar.schema import ArConfig
from flowrl.data.sampler import eval_batch
from flowrl.functional.tokens import token_log_prob
from flowrl.policies.token import TokenPolicy
from flowrl.policies.weights import FullWeights
from flowrl.pretrain.task import Measured
from flowrl.types import Prompt
from pipelines.ar.pipeline import Autoregressive
from pipelines.ar.registry import Model, save_model


class ArTask:
    """Measures and exports a generator.

    Args:
        config: the run's.
        model: whose generator is trained.
        held_out: never trained on.
    """

    shown = ("eval/loss", "eval/bits_per_token", "eval/accuracy")

    def __init__(self, config: ArConfig, model: Model, held_out: Pairs) -> None:
        self.config = config
        self.model = model
        self.held_out = held_out

    @torch.no_grad()
    def measure(self, *, progress: float, device: torch.device) -> Measured:
        """Likelihood and accuracy of held-out tokens, and images drawn for held-out prompts."""
        generator, settings = self.model.generator, self.config.eval
        was_training = generator.training
        generator.eval()
        try:
            scores, hits = [], []
            parts = torch.arange(len(self.held_out)).split(settings.batch_size)
            for part in parts:
                ids = self.held_out.ids[part].long().to(device)
                logits = generator(ids, self.held_out.text[part].long().to(device))
                scores.append(token_log_prob(logits, ids).cpu())
                hits.append((logits.argmax(-1) == ids).float().cpu())
            images = self._drawn(device)
        finally:
            generator.train(was_training)
        loss = -float(torch.cat(scores).mean())
        metrics = {
            "eval/loss": loss,
            "eval/bits_per_token": loss / math.log(2),
            "eval/accuracy": float(torch.cat(hits).mean()),
        }
        captions = self.held_out.prompts[: len(images)]
        return Measured(metrics, images, captions, min(8, len(images)), "drawn")

    def export(self, folder: Path, *, step: int, metrics: Mapping[str, float]) -> None:
        """The model as `Autoregressive` loads it, with its card."""
        save_model(self.model, folder)
        write_card(folder, self.config, self.model, step=step, metrics=metrics)

    def _drawn(self, device: torch.device) -> torch.Tensor:
        """[N, 3, H, W], one image for each of the first held-out prompts."""
        settings = self.config.eval
        prompts = [Prompt(text) for text in self.held_out.prompts[: settings.num_shown]]
        batch = eval_batch(
            prompts, samples_per_prompt=1, seed=settings.seed, rank=0, world_size=1
        )  # fmt: skip
        policy = TokenPolicy(
            Autoregressive.of(self.model),
            FullWeights(self.model.generator, with_reference=False),
            rollout_batch_size=settings.batch_size,
            decode_batch_size=settings.batch_size,
            device=device,
        )
        return policy.sample(batch, num_steps=0, guidance_scale=1.0).images
