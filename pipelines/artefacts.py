"""What the adapters of diffusers' pipelines share: folders read and written, latents decoded.

Plain functions of a `DiffusionPipeline`; an adapter says which class it is of, and what is its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""All attention projections of an MMDiT, as in Flow-GRPO."""

_COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def load_pipeline(
    kind: type[DiffusionPipeline],
    source: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> DiffusionPipeline:
    """The pipeline of a Hub id or folder, its frozen parts frozen.

    Raises:
        FileNotFoundError: the folder lacks a component; names it.
        ValueError: the folder is another kind of pipeline.
    """
    _require_components(kind, source)
    pipe = kind.from_pretrained(source, revision=revision, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    pipe.transformer.eval()
    for part in (pipe.vae, *(getattr(pipe, name, None) for name in _ENCODERS)):
        if part is not None:
            part.requires_grad_(False).eval()
    return pipe


def require_encoders(pipe: DiffusionPipeline) -> None:
    """Refuses (RuntimeError) a pipeline whose text encoders were released."""
    if pipe.text_encoder is None:
        raise RuntimeError("the text encoders were released; encode all prompts beforehand")


def release_encoders(pipe: DiffusionPipeline) -> None:
    """Frees the text encoders' memory."""
    for name in _ENCODERS:
        if hasattr(pipe, name):
            setattr(pipe, name, None)


def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Images float32 [B, 3, H, W] in [0, 1] of the VAE's latents [B, C, h, w]."""
    vae = pipe.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)


def require_size(size: int, name: str, *, step: int, most: int | None = None) -> None:
    """Refuses (ValueError) a height or width, pixels, that the model cannot draw."""
    if size % step or (most is not None and size > most):
        limit = "" if most is None else f", at most {most}"
        raise ValueError(f"{name}={size} does not fit the model: use a multiple of {step}{limit}")


def save_lora(pipe: DiffusionPipeline, folder: Path) -> None:
    """Writes pytorch_lora_weights.safetensors, for `load_lora_weights` of the same pipeline."""
    network = pipe.transformer
    type(pipe).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(network),
        transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )


def load_lora(pipe: DiffusionPipeline, source: Path, *, base: str) -> None:
    """Puts a LoRA on the transformer, as `save_lora` writes it, frozen.

    Args:
        pipe: whose transformer.
        source: a safetensors file, or a folder with a pytorch_lora_weights.safetensors.
        base: name of the model, for the error message.

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
            f"give one that diffusers' {type(pipe).__name__}.save_lora_weights wrote"
        )
    try:
        # Without use_safetensors diffusers reads no metadata, and takes alpha for the rank.
        pipe.transformer.load_lora_adapter(str(file), prefix="transformer", use_safetensors=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{file} does not fit the model {base}: {error}") from error
    pipe.transformer.requires_grad_(False)


def save_full(pipe: DiffusionPipeline, source: str, revision: str | None, folder: Path) -> None:
    """Writes `folder/pipeline`, complete, for `from_pretrained` of the same pipeline.

    The other parts are read again from the source, because the text encoders were released.
    """
    whole = type(pipe).from_pretrained(
        source, revision=revision, dtype=pipe.vae.dtype, transformer=pipe.transformer
    )
    whole.save_pretrained(folder / "pipeline")


def _require_components(kind: type[DiffusionPipeline], source: str) -> None:
    """Refuses a local folder that lacks a part or is another pipeline's, before it is loaded."""
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"there is no model folder {source}")
        return
    wanted: Sequence[str] = ("model_index.json", *_COMPONENTS)
    if missing := [name for name in wanted if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"the model folder {source} lacks {', '.join(missing)}; expected is what "
            f"{kind.__name__}.save_pretrained writes"
        )
    found = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    if found != kind.__name__:
        raise ValueError(
            f"the model folder {source} is a {found}, and this adapter loads a {kind.__name__}; "
            "set model.pipeline to the adapter of that model"
        )
