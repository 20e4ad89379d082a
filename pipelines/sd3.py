"""Stable Diffusion 3 and 3.5: diffusers' own pipeline, taken apart into callables.

Loads Hub ids and local folders alike with `StableDiffusion3Pipeline.from_pretrained`. The class
adds no mathematics: `velocity` is one call of the transformer, `sigmas` is the folder's scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_LORA_TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
]  # fmt: skip
_COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer")


class StableDiffusion3:
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
        ValueError: a size that the model cannot draw.
    """

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
        _require_components(source)
        self.source, self.revision = source, revision
        self.pipe = StableDiffusion3Pipeline.from_pretrained(source, revision=revision, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(device)
        self.network: nn.Module = self.pipe.transformer.eval()
        for part in (self.pipe.vae, *self._encoders()):
            part.requires_grad_(False).eval()
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
        if self.pipe.text_encoder is None:
            raise RuntimeError("the text encoders were released; encode all prompts beforehand")
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts),
                None,
                None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return {"embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def release_encoders(self) -> None:
        """Frees the text encoders' memory; `encode` fails afterwards."""
        self.pipe.text_encoder = self.pipe.text_encoder_2 = self.pipe.text_encoder_3 = None

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

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def lora_targets(self) -> list[str]:
        """Layers adapted by default: all attention projections, as in Flow-GRPO."""
        return list(_LORA_TARGETS)

    def save_lora(self, folder: Path) -> None:
        """Writes pytorch_lora_weights.safetensors, for `load_lora_weights` of the same pipeline."""
        network = self.pipe.transformer
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(network),
            transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
        )

    def load_lora(self, source: Path) -> None:
        """Puts a LoRA on the network, as `save_lora` writes it.

        Args:
            source: a safetensors file, or a folder with a pytorch_lora_weights.safetensors.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is a LoRA of another model, or of parts beside the transformer.
        """
        file = source / "pytorch_lora_weights.safetensors" if source.is_dir() else source
        if not file.is_file():
            raise FileNotFoundError(f"there is no LoRA {file}")
        try:
            with safe_open(file, "pt") as tensors:
                names = tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
        if foreign := [name for name in names if not name.startswith("transformer.")]:
            raise ValueError(
                f"{file} is not a LoRA of the transformer alone: it holds {min(foreign)}; "
                "give one that diffusers' StableDiffusion3Pipeline.save_lora_weights wrote"
            )
        try:
            # Without use_safetensors diffusers reads no metadata, and takes alpha for the rank.
            self.pipe.transformer.load_lora_adapter(
                str(file), prefix="transformer", use_safetensors=True
            )
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{file} does not fit the model {self.source}: {error}") from error
        self.network.requires_grad_(False)

    def save_full(self, folder: Path) -> None:
        """Writes `folder/pipeline`, complete, for `StableDiffusion3Pipeline.from_pretrained`.

        The other parts are read again from the source, because the text encoders were released.
        """
        whole = StableDiffusion3Pipeline.from_pretrained(
            self.source,
            revision=self.revision,
            dtype=self.pipe.vae.dtype,
            transformer=self.pipe.transformer,
        )
        whole.save_pretrained(folder / "pipeline")

    def _encoders(self) -> list[nn.Module]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [part for name in names if (part := getattr(self.pipe, name)) is not None]

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        config = self.pipe.transformer.config
        height, width = height or config.sample_size * factor, width or config.sample_size * factor
        step = factor * config.patch_size
        most = step * config.pos_embed_max_size
        for name, size in (("height", height), ("width", width)):
            if size % step or size > most:
                raise ValueError(
                    f"{name}={size} does not fit the model: use a multiple of {step}, "
                    f"at most {most}"
                )
        return (config.in_channels, height // factor, width // factor)


def _require_components(source: str) -> None:
    """Refuses a local folder that lacks a part, before anything is loaded."""
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"there is no model folder {source}")
        return
    missing = [n for n in ("model_index.json", *_COMPONENTS) if not (folder / n).exists()]
    if missing:
        raise FileNotFoundError(
            f"the model folder {source} lacks {', '.join(missing)}; a Stable Diffusion 3 folder is "
            "what StableDiffusion3Pipeline.save_pretrained writes"
        )
