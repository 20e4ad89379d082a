"""Stable Diffusion 3 and 3.5: diffusers' own pipeline, taken apart into callables.

Loads Hub ids and local folders alike with `StableDiffusion3Pipeline.from_pretrained`. The class
adds no mathematics: `velocity` is one call of the transformer, `sigmas` is the folder's scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor, nn

from pipelines import artefacts


class StableDiffusion3(artefacts.DiffusersAdapter):
    """A text-to-image rectified-flow transformer (MMDiT) with its VAE and text encoders.

    Source: Stable Diffusion 3, arXiv:2403.03206.

    Args:
        source: Hub id or folder in diffusers' format.
        revision: the Hub's branch, tag or commit.
        height, width: of the images, pixels; multiples of the VAE's factor times the patch size.
            None = the size that the model was trained for.
        max_sequence_length: tokens to which the T5 text is padded. It conditions the model (SD3
            does not mask the padding), so keep the length that the model was trained with.
        dtype: of all parts.
        device: of the network and, while needed, of the other parts.
        schedule: "diffusers" takes the sigmas of the folder's scheduler, which applies the shift
            twice (flow_grpo's choice); "linear" applies it once to linspace(1, 0) (DanceGRPO's
            and MixGRPO's).
        shift: replaces the scheduler's static shift; None keeps it.

    Raises:
        FileNotFoundError: the folder lacks a component; names it.
        ValueError: another kind of model, or a size that the model cannot draw.
    """

    embeds_guidance = False

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 256,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        schedule: Literal["diffusers", "linear"] = "diffusers",
        shift: float | None = None,
    ) -> None:
        self.source, self.revision = source, revision
        self.pipe = artefacts.load_pipeline(
            StableDiffusion3Pipeline, source, revision=revision, dtype=dtype, device=device
        )
        self.network: nn.Module = self.pipe.transformer
        self.schedule = schedule
        self.shift = float(shift or self.pipe.scheduler.config.shift)
        if shift is not None:
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                self.pipe.scheduler.config, shift=shift
            )
        self.max_sequence_length = max_sequence_length
        self.latent_shape = self._latent_shape(height, width)
        self.fingerprint = f"sd3 {source} {revision} {max_sequence_length} {dtype}"

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings [P, tokens, D] and pooled [P, D'] of the prompts, on the CPU.

        Raises:
            RuntimeError: the encoders were released.
        """
        self.require_encoders()
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts),
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def sigmas(self, num_steps: int) -> Tensor:
        """Float32 [num_steps + 1], descending from 1 to exactly 0."""
        if self.schedule == "diffusers":
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
            scheduler.set_timesteps(num_steps)
            return scheduler.sigmas.float()
        line = torch.linspace(1, 0, num_steps + 1)
        return self.shift * line / (1 + (self.shift - 1) * line)

    def velocity(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Velocity [B, C, h, w] of latents at sigma [B], in the network's dtype."""
        dtype = self.pipe.transformer.dtype
        return network(
            hidden_states=x_t.to(dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning["embeds"].to(dtype),
            pooled_projections=conditioning["pooled"].to(dtype),
            return_dict=False,
        )[0]

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        config = self.pipe.transformer.config
        height, width = height or config.sample_size * factor, width or config.sample_size * factor
        step = factor * config.patch_size
        most = step * config.pos_embed_max_size
        for name, size in (("height", height), ("width", width)):
            artefacts.require_size(size, name, step=step, most=most)
        return (config.in_channels, height // factor, width // factor)
