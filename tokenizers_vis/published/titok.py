"""TiTok: an image as a fixed number of 1-D tokens without an order, VQ or Gaussian.

Paper: TiTok, arXiv:2406.07550. Checkpoints: yucornetto/tokenizer_titok_{l32,b64,s128}_imagenet
(decoded by way of MaskGIT's VQ codes), ..._{bl64,bl128,sl256}_vq8k_imagenet and
..._{ll32,bl64,bl128}_vae_c16_imagenet (pixels at once), each config.json and model.safetensors. The
networks see and give [0, 1]. What config.json names by a size ("large") is read from the weights.
The paper's second stage trains the decoder alone, with perceptual and adversarial losses; the
training forward here trains all that is not frozen, on pixels, and losses are add-ons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenizers_vis.published.codebook import CodeTable, reconstruction_output
from tokenizers_vis.published.sources import count_of, find_file
from tokenizers_vis.published.titok_parts import ProxyDecoder, TiTokDecoder, TiTokEncoder
from tokenizers_vis.quantizers.base import LossTerm, Quantized, Quantizer, masked_mean
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import Codebook, Tokens, register_layout
from tokenizers_vis.weights import fit_weights, load_tensors


@dataclass(frozen=True)
class TiTokConfig:
    """The numbers of TiTok-L-32.

    Attributes:
        image_size: of the square images, pixels.
        num_tokens: of an image.
        token_dim: width of a token.
        quantize_mode: "vq" or "vae" (Gaussian).
        vocab: codes of "vq".
        unit_length: codes have length 1 (`use_l2_norm`).
        is_legacy: of the first three checkpoints; see `TiTokEncoder`.
        encoder_dim, encoder_depth, decoder_dim, decoder_depth: of the ViTs.
        encoder_patch, decoder_patch: pixels.
        proxy_widths: of MaskGIT's decoder, fine to coarse; empty = the decoder draws pixels.
        proxy_blocks, proxy_vocab, proxy_dim: its blocks per level, and its codes.
    """

    image_size: int = 256
    num_tokens: int = 32
    token_dim: int = 12
    quantize_mode: Literal["vq", "vae"] = "vq"
    vocab: int = 4096
    unit_length: bool = True
    is_legacy: bool = True
    encoder_dim: int = 1024
    encoder_depth: int = 24
    encoder_patch: int = 16
    decoder_dim: int = 1024
    decoder_depth: int = 24
    decoder_patch: int = 16
    proxy_widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    proxy_blocks: int = 2
    proxy_vocab: int = 1024
    proxy_dim: int = 256


class GaussianTokens(Quantizer):
    """The mean of a posterior, or a draw of it; without weights of its own (`VAE` checkpoints).

    Args:
        dim: of a token.
        kl: weight of the divergence from N(0, 1) per number; ours, the paper's is not published.
    """

    def __init__(self, dim: int, *, kl: float = 1e-6) -> None:
        super().__init__(Codebook("continuous", dim))
        self.kl = kl

    def forward(
        self,
        features: Tensor,
        *,
        mask: Tensor | None = None,
        progress: float = 0.0,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        mean, log_var = features.float().chunk(2, dim=-1)
        log_var = log_var.clamp(-30, 20)
        latent = mean
        if sample:
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            latent = mean + torch.exp(0.5 * log_var) * noise
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean(-1)
        losses = {"kl": LossTerm(self.kl, masked_mean(divergence, mask))}
        return Quantized(latent, mean, None, losses)

    def embed(self, ids: Tensor) -> Tensor:
        raise ValueError("a continuous token has no id; keep its embeddings")


class PublishedTiTok(VisualTokenizer):
    """A fixed number of tokens. See the module."""

    Config = TiTokConfig
    name = "titok_published"

    def __init__(self, config: TiTokConfig) -> None:
        is_vq = config.quantize_mode == "vq"
        quantize: Quantizer = (
            CodeTable(config.vocab, config.token_dim, unit_length=config.unit_length)
            if is_vq
            else GaussianTokens(config.token_dim)
        )
        super().__init__(
            config,
            layout=register_layout(config.num_tokens, nested=False, name="latent"),
            codebooks=[quantize.codebook],
            sample_shape=(3, config.image_size, config.image_size),
        )
        self.encoder = TiTokEncoder(
            config.encoder_dim,
            config.encoder_depth,
            grid=config.image_size // config.encoder_patch,
            num_tokens=config.num_tokens,
            patch_size=config.encoder_patch,
            out_dim=config.token_dim * (1 if is_vq else 2),
            is_legacy=config.is_legacy,
        )
        has_proxy = bool(config.proxy_widths)
        self.decoder = TiTokDecoder(
            config.decoder_dim,
            config.decoder_depth,
            grid=config.image_size // config.decoder_patch,
            num_tokens=config.num_tokens,
            patch_size=config.decoder_patch,
            token_dim=config.token_dim,
            proxy_vocab=config.proxy_vocab if has_proxy else None,
        )
        spread = config.encoder_dim**-0.5
        self.latent_tokens = nn.Parameter(
            spread * torch.randn(config.num_tokens, config.encoder_dim)
        )
        self.quantize = quantize
        if has_proxy:
            factor = 2 ** (len(config.proxy_widths) - 1)
            if factor != config.decoder_patch:
                raise ValueError(
                    f"{len(config.proxy_widths)} proxy_widths enlarge by {factor}, but decoder_"
                    f"patch is {config.decoder_patch}"
                )
            self.pixel_quantize = nn.Module()
            self.pixel_quantize.embedding = nn.Embedding(config.proxy_vocab, config.proxy_dim)
            self.pixel_decoder = ProxyDecoder(
                config.proxy_widths, num_blocks=config.proxy_blocks, z_channels=config.proxy_dim
            )

    @classmethod
    def from_published(cls, source: Path | str, *, revision: str | None = None) -> PublishedTiTok:
        """Reads config.json and model.safetensors.

        Args:
            source: the folder of both, or "yucornetto/tokenizer_titok_l32_imagenet" on the Hub.
            revision: on the Hub.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: weights that are not these, or the first stage of training, which ends at
                codes of another tokenizer.
        """
        if Path(source).is_file():
            source = Path(source).parent
        config = find_file(source, "config.json", revision=revision)
        path = find_file(source, "model.safetensors", revision=revision)
        weights = load_tensors(path)
        numbers = _config_of(json.loads(config.read_text()), weights, where=str(path))
        tokenizer = cls(numbers)
        fit_weights(tokenizer, weights, where=str(path))
        return tokenizer.eval()

    def embed(self, ids: Tensor) -> Tensor:
        return self.quantize.embed(ids)

    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        self.check_samples(images)
        found = self._found(images, sample=True, generator=generator)
        return reconstruction_output(images, self._image(found.embeddings), found, self.layout)

    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        return self._found(images, sample=sample, generator=generator).tokens(self.layout)

    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        return self._image(torch.where(tokens.mask[..., None], tokens.embeddings, 0))

    def _found(
        self, images: Tensor, *, sample: bool, generator: torch.Generator | None
    ) -> Quantized:
        features = self.encoder(images, self.latent_tokens)
        found: Quantized = self.quantize(features, sample=sample, generator=generator)
        return found

    def _image(self, embeddings: Tensor) -> Tensor:
        drawn: Tensor = self.decoder(embeddings)
        if not self.config.proxy_widths:
            return drawn
        # The mean code under the predicted distribution, not the likeliest one.
        codes = torch.einsum(
            "bvhw,vc->bchw", drawn.softmax(1), self.pixel_quantize.embedding.weight
        )
        return self.pixel_decoder(codes)  # type: ignore[no-any-return]


def _config_of(
    published: Mapping[str, Any], weights: Mapping[str, Tensor], *, where: str
) -> TiTokConfig:
    """The numbers that config.json and the shapes of the weights say."""
    try:
        said = published["model"]["vq_model"]
        image_size = published["dataset"]["preprocessing"]["crop_size"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"config.json of {where} has no {error}; is it TiTok's (model.vq_model and "
            "dataset.preprocessing.crop_size)?"
        ) from error

    def shape(key: str) -> torch.Size:
        if key not in weights:
            raise ValueError(f"{where} does not fit: {key} is missing")
        return weights[key].shape

    is_legacy, mode = said.get("is_legacy", True), said.get("quantize_mode", "vq")
    num_tokens, encoder_dim = shape("latent_tokens")
    patch = shape("encoder.patch_embed.weight")[-1]
    numbers: dict[str, Any] = {}
    if mode == "vq":
        numbers["vocab"], token_dim = shape("quantize.embedding.weight")
        numbers["unit_length"] = said.get("use_l2_norm", False)
    else:
        token_dim = shape("encoder.conv_out.weight")[0] // 2
    if said.get("finetune_decoder", True):
        levels = count_of(weights, "pixel_decoder.up", where=where)
        vocab, dim = shape("pixel_quantize.embedding.weight")
        numbers |= {
            "proxy_widths": tuple(
                shape(f"pixel_decoder.up.{level}.block.0.conv1.weight")[0]
                for level in range(levels)
            ),
            "proxy_blocks": count_of(weights, "pixel_decoder.mid", where=where),
            "proxy_vocab": vocab,
            "proxy_dim": dim,
            "decoder_patch": 2 ** (levels - 1),
        }
    elif is_legacy:
        raise ValueError(
            f"{where} is a first stage (finetune_decoder false): it ends at codes of MaskGIT's VQ "
            "and holds no decoder of them; give the second stage"
        )
    else:
        size = shape("decoder.ffn.0.weight")[0]
        numbers |= {"proxy_widths": (), "decoder_patch": round((size / 3) ** 0.5)}
    return TiTokConfig(
        image_size=image_size,
        num_tokens=num_tokens,
        token_dim=token_dim,
        quantize_mode=mode,
        is_legacy=is_legacy,
        encoder_dim=encoder_dim,
        encoder_depth=count_of(weights, "encoder.transformer", where=where),
        encoder_patch=patch,
        decoder_dim=shape("decoder.decoder_embed.weight")[0],
        decoder_depth=count_of(weights, "decoder.transformer", where=where),
        **numbers,
    )
