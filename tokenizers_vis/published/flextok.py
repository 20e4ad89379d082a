"""FlexTok as its authors released it: registers of a VAE's latents, FSQ, a flow decoder.

Paper: FlexTok, arXiv:2502.13967. Checkpoints: EPFL-VILAB/flextok_{d12_d12_in1k, d18_d18_in1k,
d18_d28_in1k, d18_d28_dfn}: config.json and model.safetensors, or the latter alone, whose metadata
hold the configuration. Networks see and give [-1, 1]. What is sure: the released code says what
every part computes, how its weights are named and how the configuration wires parts, and all of it
is read here. What is not: the four configurations themselves were not at hand, so sizes, the kind
of places and the order of parts come from whatever the file says; a part or an argument that the
released code has and this reader does not is refused by name. No published image was compared.

Differs: encodes the mean of the VAE's posterior where the release draws from it. The VAE's norms
have 32 groups, which its weights cannot say.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vector_quantize_pytorch import FSQ

from tokenizers_vis.latents import Stage0
from tokenizers_vis.published.flextok_parts import (
    HIDDEN,
    KEPT,
    MaskedNestedDropout,
    NullCond,
    Pipeline,
    Registers1D,
)
from tokenizers_vis.published.sources import count_of, find_file
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import Codebook, Tokens, register_layout
from tokenizers_vis.weights import fit_weights, load_tensors

SECTIONS = ("vae", "encoder", "decoder", "regularizer", "pipeline")
_DECODER_SEED = 0  # of the noise, where the caller gives no generator
_MOMENTUM, _MAX_NORM = -0.5, 2.5  # of the projected guidance, in the release


@dataclass(frozen=True)
class PublishedFlexTokConfig:
    """A released configuration, and what it leaves to others.

    Attributes:
        encoder, decoder, regularizer, pipeline, vae: its sections.
        autoencoder: diffusers' configuration of the VAE, with the scaling factor that is used.
        image_size: of the square images, pixels.
        solver: of the decoder; the release recommends 20 steps and guidance 7.5.
        is_projected: guidance is projected and bounded (APG, arXiv:2410.02416), as it recommends.
    """

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    regularizer: dict[str, Any]
    pipeline: dict[str, Any]
    vae: dict[str, Any]
    autoencoder: dict[str, Any]
    image_size: int = 256
    solver: Solver = field(default_factory=lambda: Solver(20, 7.5))
    is_projected: bool = True


class PublishedFlexTok(VisualTokenizer):
    """Ordered registers, any prefix of which decodes. See the module."""

    half_levels: Tensor
    Config = PublishedFlexTokConfig
    name = "flextok_published"

    def __init__(self, config: PublishedFlexTokConfig) -> None:
        levels = list(config.regularizer["levels"])
        encoder = Pipeline(config.encoder, where="encoder")
        decoder = Pipeline(config.decoder, where="decoder")
        registers = [part for part in encoder.modules() if isinstance(part, Registers1D)]
        if len(registers) != 1:
            raise ValueError(f"a FlexTok has one set of registers, this one has {len(registers)}")
        num = len(registers[0].registers)
        is_nested = any(isinstance(part, MaskedNestedDropout) for part in decoder.modules())
        super().__init__(
            config,
            layout=register_layout(num, nested=is_nested),
            codebooks=[Codebook("fsq", len(levels), math.prod(levels))],
            token_counts=range(1, num + 1) if is_nested else None,
            sample_shape=(3, config.image_size, config.image_size),
            is_generative=True,
        )
        self.encoder, self.decoder = encoder, decoder
        self.regularizer = FSQ(levels)
        self.register_buffer("half_levels", torch.tensor(levels) // 2, persistent=False)
        self.vae = Stage0(config.autoencoder, image_size=config.image_size)
        nulls = [part for part in decoder.modules() if isinstance(part, NullCond)]
        self.null_rate = max((part.dropout_prob for part in nulls), default=0.0)
        self.has_null = bool(nulls)

    @classmethod
    def from_published(cls, source: Path | str, *, revision: str | None = None) -> PublishedFlexTok:
        """Reads a released checkpoint.

        Args:
            source: model.safetensors; a folder with it; or "EPFL-VILAB/flextok_d18_d28_in1k".
            revision: on the Hub.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a configuration with parts that are not known here, or other weights.
        """
        path = find_file(source, "model.safetensors", revision=revision)
        published = _configuration(source, path, revision)
        if missing := [name for name in SECTIONS if name not in published]:
            raise ValueError(f"the configuration of {path} has no {', '.join(missing)}")
        weights = load_tensors(path)
        autoencoder = _autoencoder(published["vae"], weights, where=str(path))
        numbers = PublishedFlexTokConfig(
            **{name: published[name] for name in SECTIONS},
            autoencoder=autoencoder,
            image_size=_image_size(published["encoder"], autoencoder),
        )
        tokenizer = cls(numbers)
        fit_weights(tokenizer, weights, where=str(path))
        return tokenizer.eval()

    def embed(self, ids: Tensor) -> Tensor:
        return self.regularizer.indices_to_codes(ids)  # type: ignore[no-any-return]

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        """The flow loss with logit-normal noise levels; REPA and nested dropout are add-ons."""
        self.check_samples(images)
        clean = self.vae.encode(images)
        tokens = self._quantized(clean)
        if num_tokens is not None:
            tokens = tokens.keep(num_tokens)
        sigma = torch.sigmoid(torch.randn(len(images), generator=generator)).to(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        place = sigma[:, None, None, None]
        is_null = torch.rand(len(images), generator=generator) < self.null_rate
        velocity = self.velocity(
            (1 - place) * clean + place * noise, sigma, tokens, is_null=is_null.to(clean.device)
        )
        error = (velocity.float() - (noise - clean)).square().mean()
        return TokenizerOutput(tokens, {"flow": LossTerm(1.0, error)})

    def velocity(
        self, x_t: Tensor, sigma: Tensor, tokens: Tokens, *, is_null: Tensor | None = None
    ) -> Tensor:
        """dx_t / dsigma [B, C, h, w] of noisy latents at sigma [B]; bool [B] hides tokens."""
        keys = self.config.pipeline
        record: dict[str, Any] = {
            self.config.regularizer["quants_write_key"]: tokens.embeddings,
            keys["noised_images_read_key"]: x_t,
            keys["timesteps_read_key"]: sigma,
            KEPT: tokens.mask,
        }
        if is_null is not None:
            record[HIDDEN] = is_null
        return self.decoder(record)[keys["reconst_write_key"]]  # type: ignore[no-any-return]

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._quantized(self.vae.encode(images))

    def _quantized(self, latents: Tensor) -> Tokens:
        record = self.encoder({self.config.vae["vae_latents_write_key"]: latents})
        features = record[self.config.regularizer["latents_read_key"]].float()
        _, ids = self.regularizer(features)
        ids = ids.long()
        # Straight-through of the bounded features, with the value of the code to the last bit.
        soft = self.regularizer.bound(features) / self.half_levels
        embeddings = self.embed(ids) + (soft - soft.detach())
        mask = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        return Tokens(embeddings, mask, self.layout, ids, features)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        solver = solver or self.config.solver
        if solver.guidance_scale != 1.0 and not self.has_null:
            raise ValueError("this FlexTok has no null condition: use a guidance_scale of 1.0")
        device = tokens.embeddings.device
        generator = generator or torch.Generator().manual_seed(_DECODER_SEED)
        # One draw for all numbers of tokens: prefixes of an image are compared with equal noise.
        x = torch.randn(len(tokens), *self.vae.shape, generator=generator).to(device)
        momentum = torch.zeros_like(x)
        sigmas = torch.linspace(1, 0, solver.num_steps + 1, device=device)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            times = sigma.expand(len(x))
            velocity = self.velocity(x, times, tokens)
            if solver.guidance_scale != 1.0:
                everyone = torch.ones(len(x), dtype=torch.bool, device=device)
                plain = self.velocity(x, times, tokens, is_null=everyone)
                if self.config.is_projected:
                    momentum = velocity - plain + _MOMENTUM * momentum
                    step = projected_guidance(velocity, momentum)
                    velocity = velocity + (solver.guidance_scale - 1) * step
                else:
                    velocity = plain + solver.guidance_scale * (velocity - plain)
            x = x + (sigma_next - sigma) * velocity
        return self.vae.decode(x)


def projected_guidance(velocity: Tensor, difference: Tensor) -> Tensor:
    """The part of a guidance direction that is orthogonal to the prediction, no longer than 2.5.

    Paper: APG, arXiv:2410.02416, eq. 5 and section 4, with its parallel weight 0.

    Args:
        velocity: [B, C, h, w] of the condition.
        difference: [B, C, h, w] from the unconditional one, with momentum.
    """
    axes = (-1, -2, -3)
    length = difference.double().square().sum(axes, keepdim=True).sqrt()
    bounded = difference.double() * (_MAX_NORM / length.clamp_min(1e-12)).clamp(max=1)
    along = velocity.double()
    squared = along.square().sum(axes, keepdim=True).clamp_min(1e-24)
    parallel = (bounded * along).sum(axes, keepdim=True) / squared * along
    return (bounded - parallel).to(velocity.dtype)


def _configuration(source: Path | str, path: Path, revision: str | None) -> dict[str, Any]:
    """Of the weights' metadata (a Python literal for every section), else of config.json."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "encoder" in metadata:
        try:
            return {
                name: ast.literal_eval(text) for name, text in metadata.items() if name in SECTIONS
            }
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"the metadata of {path} are no configuration: {error}") from error
    beside = path.with_name("config.json")
    if not (beside.is_file() or path == Path(source).expanduser()):
        beside = find_file(source, "config.json", revision=revision)
    if not beside.is_file():
        raise ValueError(f"{path} has no configuration in its metadata, and no config.json beside")
    found = json.loads(beside.read_text())
    return found.get("config", found)  # type: ignore[no-any-return]


def _autoencoder(
    published: Mapping[str, Any], weights: Mapping[str, Tensor], *, where: str
) -> dict[str, Any]:
    """Diffusers' configuration of the VAE whose weights these are."""
    levels = count_of(weights, "vae.vae.encoder.down_blocks", where=where)
    layers = count_of(weights, "vae.vae.encoder.down_blocks.0.resnets", where=where)
    first = [f"vae.vae.encoder.down_blocks.{n}.resnets.0.conv1.weight" for n in range(levels)]
    scaling = published.get("scaling_factor")
    if not scaling and published.get("hf_hub_path"):
        from diffusers import AutoencoderKL

        scaling = AutoencoderKL.load_config(published["hf_hub_path"])["scaling_factor"]
    if not scaling:
        raise ValueError(f"the configuration of {where} gives its VAE no scaling_factor")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [weights[key].shape[0] for key in first],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": layers,
        "latent_channels": weights["vae.vae.decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "scaling_factor": scaling,
        "use_quant_conv": "vae.vae.quant_conv.weight" in weights,
        "use_post_quant_conv": "vae.vae.post_quant_conv.weight" in weights,
        "mid_block_add_attention": "vae.vae.encoder.mid_block.attentions.0.to_q.weight" in weights,
    }


def _image_size(encoder: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> int:
    """Pixels of the images whose patches fill the encoder's table of places."""
    parts = encoder.get("module_dict", {}).values()
    sizes = [part["patch_sizes"][0] for part in parts if "patch_sizes" in part]
    places = [part["max_sizes"][0] for part in parts if len(part.get("max_sizes", ())) == 2]
    if len(sizes) != 1 or len(places) != 1:
        raise ValueError("the encoder of a FlexTok has one patch embedding and one table of places")
    return int(sizes[0] * places[0] * 2 ** (len(autoencoder["block_out_channels"]) - 1))
