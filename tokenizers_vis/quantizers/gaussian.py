"""A continuous latent with a Gaussian posterior: the bottleneck of a VAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import LossTerm, Quantized, Quantizer, masked_mean
from tokenizers_vis.tokens import Codebook


class Gaussian(Quantizer):
    """Mean and log-variance; `sample` draws from the posterior, otherwise its mean.

    Paper: VAE, arXiv:1312.6114, with the small weight of latent diffusion, arXiv:2112.10752.

    Args:
        in_dim: width of the features.
        dim: of the latent.
        kl: weight of the divergence from N(0, 1), per dimension.
    """

    def __init__(self, in_dim: int, dim: int, *, kl: float = 1e-4) -> None:
        super().__init__(Codebook("continuous", dim))
        self.kl = kl
        self.project = nn.Sequential(nn.LayerNorm(in_dim), nn.Linear(in_dim, 2 * dim))

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        mean, log_var = self.project(features).float().chunk(2, dim=-1)
        log_var = log_var.clamp(-20, 10)
        latent = mean
        if sample:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
            latent = mean + torch.exp(0.5 * log_var) * noise
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(-1)
        return Quantized(
            latent, mean, None, {"kl": LossTerm(self.kl, masked_mean(divergence, mask))}
        )

    def embed(self, ids: Tensor) -> Tensor:
        raise ValueError("a continuous token has no id; keep its embeddings")
