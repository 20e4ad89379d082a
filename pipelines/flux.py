"""FLUX.1-dev and models made from it: diffusers' own pipeline, taken apart into callables.

Loads Hub ids and local folders alike with `FluxPipeline.from_pretrained`. Latents are the VAE's,
[B, 16, h, w]: `velocity` alone packs them into the network's tokens, so noise, solvers and kernels
see what they see of any other model. Guidance is the one that the model was distilled with, an
input of the network (`embeds_guidance`): one forward per step. True classifier-free guidance, two
forwards with an empty prompt, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from pipelines import artefacts


class Flux(artefacts.DiffusersAdapter):
    """A guidance-distilled rectified-flow transformer with its VAE and text encoders.

    Source: FLUX.1-dev, github.com/black-forest-labs/flux, as in diffusers' `FluxPipeline`.

    Args:
        source: Hub id or folder in diffusers' format.
        revision: the Hub's branch, tag or commit.
        height, width: of the images, pixels; multiples of twice the VAE's factor. None = 1024 for a
            VAE of factor 8.
        max_sequence_length: tokens to which the T5 text is padded, unmasked, at most 512. Published
            samples of FLUX.1-dev have 512.
        dtype: of all parts.
        device: of the network and, while needed, of the other parts.
        shift: None = the folder's schedule, whose shift grows with the number of image tokens; a
            number = this shift at every size (DanceGRPO and MixGRPO: 3). Either is applied once, to
            linspace(1, 0).

    Raises:
        FileNotFoundError: the folder lacks a component; names it.
        ValueError: another kind of model, one without a guidance input, a size that the model
            cannot draw, or a longer text.
    """

    embeds_guidance = True

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shift: float | None = None,
    ) -> None:
        if max_sequence_length > 512:
            raise ValueError(f"max_sequence_length={max_sequence_length} is beyond FLUX's 512")
        self.source, self.revision = source, revision
        self.pipe = artefacts.load_pipeline(
            FluxPipeline, source, revision=revision, dtype=dtype, device=device
        )
        self.network: nn.Module = self.pipe.transformer
        if not self.network.config.guidance_embeds:
            raise ValueError(
                f"{source} takes no guidance: its guidance_embeds is false, as in FLUX.1-schnell, "
                "which is distilled to few steps; use FLUX.1-dev or a model made from it"
            )
        if shift is not None:
            self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                self.pipe.scheduler.config, shift=shift, use_dynamic_shifting=False
            )
        self.max_sequence_length = max_sequence_length
        self.latent_shape = self._latent_shape(height, width)
        self.fingerprint = f"flux {source} {revision} {max_sequence_length} {dtype}"

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's embeddings [P, tokens, D] and CLIP's pooled [P, D'] of the prompts, on the CPU.

        Raises:
            RuntimeError: the encoders were released.
        """
        self.require_encoders()
        with torch.no_grad():
            embeds, pooled, _ = self.pipe.encode_prompt(
                list(prompts), None, max_sequence_length=self.max_sequence_length
            )
        return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def sigmas(self, num_steps: int) -> Tensor:
        """Float32 [num_steps + 1], descending from 1 to exactly 0, for images of this size."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        _, height, width = self.latent_shape
        config = scheduler.config
        mu = calculate_shift(
            height // 2 * (width // 2),
            config.base_image_seq_len,
            config.max_image_seq_len,
            config.base_shift,
            config.max_shift,
        )
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.float()

    def velocity(
        self, network: nn.Module, x_t: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Velocity [B, 16, h, w] of latents at sigma [B], in the network's dtype.

        `conditioning` holds, beside what `encode` gives, the embedded "guidance" [B].
        """
        dtype = self.pipe.transformer.dtype
        factor = self.pipe.vae_scale_factor
        batch, channels, height, width = x_t.shape
        embeds = conditioning["embeds"].to(dtype)
        packed = network(
            hidden_states=self.pipe._pack_latents(x_t.to(dtype), batch, channels, height, width),
            timestep=sigma,  # the network itself multiplies it and the guidance by 1000
            guidance=conditioning["guidance"],
            encoder_hidden_states=embeds,
            pooled_projections=conditioning["pooled"].to(dtype),
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(
                batch, height // 2, width // 2, x_t.device, dtype
            ),
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(packed, height * factor, width * factor, factor)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        usual = self.pipe.default_sample_size * factor
        height, width = height or usual, width or usual
        for name, size in (("height", height), ("width", width)):
            artefacts.require_size(size, name, step=2 * factor)
        channels = self.pipe.transformer.config.in_channels // 4
        return (channels, height // factor, width // factor)
