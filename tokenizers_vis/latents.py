"""What a tokenizer looks at: pixels, or the latents of a frozen AutoencoderKL of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Stage0(nn.Module):
    """Images in [0, 1] -> what is tokenised, and back.

    The autoencoder's weights are part of the tokenizer and are saved with it, but never trained.

    Args:
        autoencoder: configuration of an AutoencoderKL; None = pixels in [-1, 1].
        image_size: pixels.
    """

    def __init__(self, autoencoder: Mapping[str, Any] | None, *, image_size: int) -> None:
        super().__init__()
        self.vae: Any = None
        self.shape: tuple[int, int, int] = (3, image_size, image_size)
        if autoencoder is None:
            return
        from diffusers import AutoencoderKL

        self.vae = AutoencoderKL.from_config(dict(autoencoder)).eval().requires_grad_(False)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.shape = (self.vae.config.latent_channels, image_size // factor, image_size // factor)

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, h, w] of spread about 1, without gradient to the autoencoder."""
        if self.vae is None:
            return images * 2 - 1
        config = self.vae.config
        with torch.no_grad():
            latents = self.vae.encode(images * 2 - 1).latent_dist.mean
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images in about [0, 1]."""
        if self.vae is None:
            return (latents + 1) / 2
        config = self.vae.config
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return (self.vae.decode(latents.to(self.vae.dtype)).sample.float() + 1) / 2

    def train(self, mode: bool = True) -> Stage0:
        """The autoencoder stays in evaluation mode."""
        return super().train(False)
