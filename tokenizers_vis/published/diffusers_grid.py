"""diffusers' own autoencoders as grids of tokens: VQModel (ids) and AutoencoderKL (continuous).

Papers: VQGAN, arXiv:2012.09841; latent diffusion, arXiv:2112.10752. Checkpoints: what their
`from_pretrained` reads, e.g. stabilityai/sd-vae-ft-mse, or a pipeline's part as
"owner/name/subfolder"; the library's modules do the work. They see and give [-1, 1], except
aMUSEd's VQModel, which has [0, 1]: its configuration alone says `lookup_from_codebook`. A latent is
as AutoencoderKL has it, neither shifted nor scaled. Perceptual and adversarial losses are add-ons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.published.codebook import reconstruction_output
from tokenizers_vis.published.sources import split_hub_id
from tokenizers_vis.quantizers.base import LossTerm, Quantized
from tokenizers_vis.tokenizer import Solver, TokenizerOutput, VisualTokenizer
from tokenizers_vis.tokens import Codebook, Tokens, grid_layout

CLASSES = ("VQModel", "AutoencoderKL")
_KL_WEIGHT = 1e-6  # latent diffusion's, of the sum over a latent's numbers


@dataclass(frozen=True)
class DiffusersConfig:
    """The numbers of a grid of diffusers.

    Attributes:
        autoencoder: the library's configuration of it, with `_class_name`.
        image_size: of the square images, pixels.
        is_unit_range: its networks see and give [0, 1] instead of [-1, 1].
    """

    autoencoder: dict[str, Any] = field(default_factory=lambda: {"_class_name": "AutoencoderKL"})
    image_size: int = 256
    is_unit_range: bool = False


class DiffusersGrid(VisualTokenizer):
    """A VQModel or an AutoencoderKL. See the module."""

    Config = DiffusersConfig
    name = "diffusers"

    def __init__(self, config: DiffusersConfig) -> None:
        vae: Any = _library_class(config.autoencoder).from_config(dict(config.autoencoder))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side, rest = divmod(config.image_size, factor)
        if rest or not side:
            raise ValueError(f"image_size {config.image_size} does not divide by {factor}")
        is_vq = type(vae).__name__ == "VQModel"
        codebook = (
            Codebook("vq", vae.quantize.vq_embed_dim, vae.quantize.n_e)
            if is_vq
            else Codebook("continuous", vae.config.latent_channels)
        )
        super().__init__(
            config,
            layout=grid_layout(side, side),
            codebooks=[codebook],
            sample_shape=(3, config.image_size, config.image_size),
        )
        self.vae = vae
        self.is_vq = is_vq

    @classmethod
    def from_published(
        cls, source: Path | str, *, revision: str | None = None, image_size: int = 256
    ) -> DiffusersGrid:
        """Reads a folder that `save_pretrained` of the library wrote.

        Args:
            source: the folder; or "owner/name" or "owner/name/subfolder" on the Hub.
            revision: on the Hub.
            image_size: that the tokenizer is to take; any that the factor divides.

        Raises:
            OSError: there is no such folder or Hub id (the library's own error).
            ValueError: another class of the library, or weights that are missing or unknown.
        """
        from diffusers import AutoencoderKL

        where: dict[str, Any] = {"revision": revision}
        found = str(source)
        if not Path(source).expanduser().is_dir():
            found, inside = split_hub_id(source)
            where |= {"subfolder": inside} if inside else {}
        numbers = AutoencoderKL.load_config(found, **where)
        vae, info = _library_class(numbers).from_pretrained(
            found, **where, output_loading_info=True
        )
        problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        problems += [f"{key} is unknown" for key in sorted(info["unexpected_keys"])]
        if problems:
            raise ValueError(f"the weights of {source} do not fit: {'; '.join(problems[:5])}")
        config = DiffusersConfig(
            {key: _plain(value) for key, value in numbers.items() if key != "_name_or_path"},
            image_size,
            is_unit_range=bool(numbers.get("lookup_from_codebook")),
        )
        tokenizer = cls(config)
        tokenizer.vae.load_state_dict(vae.state_dict())
        return tokenizer.eval()

    def embed(self, ids: Tensor) -> Tensor:
        if not self.is_vq:
            raise ValueError("a continuous token has no id; keep its embeddings")
        return F.embedding(ids, self.vae.quantize.embedding.weight)

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
        seen = images if self.config.is_unit_range else images * 2 - 1
        if self.is_vq:
            return self._found_ids(self.vae.encode(seen).latents)
        posterior = self.vae.encode(seen).latent_dist
        drawn = posterior.sample(generator) if sample else posterior.mean
        kl = LossTerm(_KL_WEIGHT, posterior.kl().mean())
        return Quantized(_rows(drawn), _rows(posterior.mean), None, {"kl": kl})

    def _found_ids(self, grid: Tensor) -> Quantized:
        """The library's nearest codes, and its loss (commitment 1, codebook 0.25)."""
        _, loss, (_, _, ids) = self.vae.quantize(grid)
        features, ids = _rows(grid), ids.view(len(grid), -1)
        # Straight-through, written so that the value is the code to the last bit.
        embeddings = self.embed(ids).detach() + (features - features.detach())
        return Quantized(embeddings, features, ids, {"codebook": LossTerm(1.0, loss)})

    def _image(self, embeddings: Tensor) -> Tensor:
        grid = embeddings.transpose(1, 2).unflatten(2, self.layout.segments[0].shape)
        grid = grid.to(self.vae.dtype)
        if self.is_vq:  # the library's decode() would quantise once more, or take ids
            spatial = grid if self.vae.config.norm_type == "spatial" else None
            drawn = self.vae.decoder(self.vae.post_quant_conv(grid), spatial)
        else:
            drawn = self.vae.decode(grid).sample
        return drawn if self.config.is_unit_range else (drawn + 1) / 2


def _rows(grid: Tensor) -> Tensor:
    """[B, C, h, w] -> float32 [B, L, C], row by row; under autocast the grid is bfloat16."""
    return grid.flatten(2).transpose(1, 2).float()


def _library_class(numbers: Mapping[str, Any]) -> Any:
    import diffusers

    name = numbers.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"this adapter reads diffusers' {' and '.join(CLASSES)}, not {name}")
    return getattr(diffusers, name)


def _plain(value: Any) -> Any:
    """As it comes back from JSON, so that a configuration that was saved is equal to this one."""
    return list(value) if isinstance(value, tuple) else value
