"""FlexTok: an image as an ordered sequence of registers, of which any prefix stands for all of it.

Paper: FlexTok, arXiv:2502.13967. An encoder gathers the image in causal registers, FSQ makes them
ids, nested dropout hides a tail of them, and a rectified-flow decoder draws what the prefix does
not say. Reading order: `FlexTok.forward`, `_encode`, `_decode`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_vis.blocks import (
    Transformer,
    image_to_patches,
    patches_to_image,
    time_embedding,
)
from tokenizers_vis.latents import Stage0
from tokenizers_vis.quantizers.base import LossTerm, Quantized
from tokenizers_vis.quantizers.library import Fsq
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import Tokens, grid_layout, register_layout

_DECODER_SEED = 0  # of the noise, where the caller gives no generator


@dataclass(frozen=True)
class FlexTokConfig:
    """The numbers of a FlexTok; the paper's in brackets.

    Attributes:
        image_size: of the square images, pixels [256].
        autoencoder: configuration of diffusers' AutoencoderKL whose latents are tokenised [an
            8-fold VAE of 4 to 16 channels]; None = pixels in [-1, 1].
        patch_size: of a patch of latents, or pixels [2].
        num_registers: tokens at most [256].
        levels: of FSQ [8, 8, 8, 5, 5, 5].
        dim, num_heads: width and heads [64 per layer of depth].
        encoder_depth, decoder_depth: blocks [12 or 18; 12, 18 or 28].
        is_causal: a register sees those before it, not those after.
        null_rate: share of training images whose registers are hidden altogether, for guidance.
        sigma_mean: noise levels in training are sigmoid(N(sigma_mean, 1)) [0].
        compare: "velocity" [the paper's loss], or "clean": the error of the clean image, which
            leaves small noise, where tokens are not needed, less weight.
        min_sigma: the predicted clean image is divided by no less than this to be a velocity.
    """

    image_size: int = 64
    autoencoder: dict[str, Any] | None = None
    patch_size: int = 8
    num_registers: int = 32
    levels: tuple[int, ...] = (8, 5, 5, 5)
    dim: int = 128
    num_heads: int = 4
    encoder_depth: int = 3
    decoder_depth: int = 5
    is_causal: bool = True
    null_rate: float = 0.1
    sigma_mean: float = 0.0
    compare: Literal["velocity", "clean"] = "velocity"
    min_sigma: float = 0.05
    solver: Solver = field(default_factory=Solver)


class FlexTok(VisualTokenizer):
    """Registers, FSQ, and a flow decoder. See the module.

    Differs from the published model: the decoder predicts the clean image and is compared as a
    velocity (a patch of 192 pixels through a narrow network cannot carry the noise that a velocity
    has; measured with width 96: with velocities the error is that of no tokens at all); rotary
    and learned places; no muP. There is no REPA (the decoder's middle features beside DINOv2's,
    whose weights are not here; its weight and layer are not published): the add-on `distill`
    teaches the tokens, which is something else. Guidance is plain, and off unless asked for; the
    release has 7.5, projected and bounded (APG), as `published.flextok` does.
    A small model learns to look at its tokens several times sooner with compare="clean" and
    sigma_mean=1 (32 x 32 Shapes, 600 steps: error with all tokens 0.022 against 0.035).
    """

    Config = FlexTokConfig
    name = "flextok"

    def __init__(self, config: FlexTokConfig) -> None:
        stage0 = Stage0(config.autoencoder, image_size=config.image_size)
        channels, height, width = stage0.shape
        rows, columns = height // config.patch_size, width // config.patch_size
        if (rows * config.patch_size, columns * config.patch_size) != (height, width):
            raise ValueError(
                f"{height} x {width} does not divide by patch_size {config.patch_size}"
            )
        quantizer = Fsq(config.dim, config.levels)
        num = config.num_registers
        super().__init__(
            config,
            layout=register_layout(num, nested=True),
            codebooks=[quantizer.codebook],
            token_counts=range(1, num + 1),
            sample_shape=(3, config.image_size, config.image_size),
            is_generative=True,
        )
        dim, patch_dim = config.dim, channels * config.patch_size**2
        self.stage0, self.quantizer = stage0, quantizer
        self.num_patches = rows * columns
        places = [grid_layout(rows, columns).coords[:, 1:], torch.full((num, 2), torch.nan)]
        self.register_buffer("coords", torch.cat(places), persistent=False)
        is_register = torch.arange(self.num_patches + num) >= self.num_patches
        self.register_buffer("kind", is_register.long(), persistent=False)
        mask = _encoder_mask(self.num_patches, num, is_causal=config.is_causal)
        self.register_buffer("encoder_mask", mask, persistent=False)
        trunk: dict[str, Any] = {"num_heads": config.num_heads, "rotary_axes": 2}
        self.patch_in = nn.Linear(patch_dim, dim)
        self.patch_place = nn.Parameter(0.5 * torch.randn(self.num_patches, dim))
        # Of spread 1: registers that start alike stay alike (measured with LARP's queries).
        self.registers = nn.Parameter(torch.randn(num, dim))
        self.encoder = Transformer(dim, config.encoder_depth, **trunk)
        self.noisy_in = nn.Linear(patch_dim, dim)
        self.noisy_place = nn.Parameter(0.5 * torch.randn(self.num_patches, dim))
        self.token_in = nn.Linear(quantizer.codebook.dim, dim)
        self.token_place = nn.Parameter(0.5 * torch.randn(num, dim))
        self.dropped = nn.Parameter(0.02 * torch.randn(dim))
        self.null = nn.Parameter(0.02 * torch.randn(dim))
        self.time_in = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.decoder = Transformer(
            dim, config.decoder_depth, condition_dim=dim, num_kinds=2, **trunk
        )
        self.patch_out = nn.Linear(dim, patch_dim)

    def embed(self, ids: Tensor) -> Tensor:
        return self.quantizer.embed(ids)

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        self.check_samples(images)
        clean = self.patches(images)
        tokens = self._quantized(clean)
        if num_tokens is not None:
            tokens = tokens.keep(num_tokens)
        # Logit-normal noise levels, as in Stable Diffusion 3 (arXiv:2403.03206, section 3.1).
        normal = torch.randn(len(images), generator=generator) + self.config.sigma_mean
        sigma = torch.sigmoid(normal).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        x_t = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        is_null = torch.rand(len(images), generator=generator) < self.config.null_rate
        velocity = self.velocity(x_t, sigma, tokens, is_null=is_null.to(clean.device))
        error = (velocity.float() - (noise - clean)).square().mean((1, 2))
        weight = sigma.square() if self.config.compare == "clean" else torch.ones_like(sigma)
        return TokenizerOutput(tokens, {"flow": LossTerm(1.0, (weight * error).mean())})

    def velocity(
        self, x_t: Tensor, sigma: Tensor, tokens: Tokens, *, is_null: Tensor | None = None
    ) -> Tensor:
        """dx_t / dsigma [B, P, patch_dim] of noisy patches at sigma [B]; bool [B] hides tokens."""
        seen = torch.where(tokens.mask[..., None], self.token_in(tokens.embeddings), self.dropped)
        if is_null is not None:
            seen = torch.where(is_null[:, None, None], self.null, seen)
        x = torch.cat([self.noisy_in(x_t) + self.noisy_place, seen + self.token_place], dim=1)
        time = self.time_in(time_embedding(sigma, self.config.dim).to(x))
        x = self.decoder(x, coords=self.coords, condition=time, kind=self.kind)
        clean = self.patch_out(x[:, : self.num_patches]).float()
        return (x_t - clean) / sigma.clamp_min(self.config.min_sigma)[:, None, None]

    def patches(self, images: Tensor) -> Tensor:
        """What is tokenised [B, P, patch_dim]: patches of latents, or of pixels in [-1, 1]."""
        return image_to_patches(self.stage0.encode(images), self.config.patch_size)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._quantized(self.patches(images))

    def _quantized(self, patches: Tensor) -> Tokens:
        registers = self.registers.expand(len(patches), -1, -1)
        x = torch.cat([self.patch_in(patches) + self.patch_place, registers], dim=1)
        x = self.encoder(x, mask=self.encoder_mask, coords=self.coords)
        found: Quantized = self.quantizer(x[:, self.num_patches :])
        return found.tokens(self.layout)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        solver = solver or self.config.solver
        device = tokens.embeddings.device
        generator = generator or torch.Generator().manual_seed(_DECODER_SEED)
        patch_dim = self.patch_out.out_features
        # One draw for all numbers of tokens: prefixes of an image are compared with equal noise.
        x = torch.randn(len(tokens), self.num_patches, patch_dim, generator=generator).to(device)
        sigmas = torch.linspace(1, 0, solver.num_steps + 1, device=device)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            x = x + (sigma_next - sigma) * self._guided(x, sigma, tokens, solver.guidance_scale)
        _, height, width = self.stage0.shape
        latents = patches_to_image(x, self.config.patch_size, height=height, width=width)
        return self.stage0.decode(latents)

    def _guided(self, x: Tensor, sigma: Tensor, tokens: Tokens, scale: float) -> Tensor:
        times = sigma.expand(len(x))
        conditional = self.velocity(x, times, tokens)
        if scale == 1.0:
            return conditional
        everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
        plain = self.velocity(x, times, tokens, is_null=everyone)
        return plain + scale * (conditional - plain)


def _encoder_mask(num_patches: int, num_registers: int, *, is_causal: bool) -> Tensor:
    """Bool [P + K, P + K]: patches see patches; registers see patches and registers up to them."""
    total = num_patches + num_registers
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:, :num_patches] = True
    among = torch.ones(num_registers, num_registers, dtype=torch.bool)
    mask[num_patches:, num_patches:] = among.tril() if is_causal else among
    return mask
