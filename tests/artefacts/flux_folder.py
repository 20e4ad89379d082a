"""Folders in FLUX.1-dev's format with random weights: tiny ones, and one of its true widths."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flowrl.make.shapes_model import TEXT_LENGTH, build_tokenizer, build_vae

# FLUX.1-dev's scheduler/scheduler_config.json.
SCHEDULER = {
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
    "base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15,
}  # fmt: skip


def tiny_transformer(*, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    """Both kinds of blocks, for latents of 4 channels."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def dev_transformer() -> FluxTransformer2DModel:
    """FLUX.1-dev's widths (diffusers' defaults), one block of either kind, bf16, about 1 GB."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03, generator=generator)
    return model


def dev_vae() -> AutoencoderKL:
    """FLUX.1-dev's VAE with few channels inside."""
    return AutoencoderKL(
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )  # fmt: skip


def write_flux(
    folder: Path, transformer: FluxTransformer2DModel, vae: AutoencoderKL | None = None
) -> Path:
    """A complete folder around a transformer; text encoders of its widths and one layer."""
    torch.manual_seed(1)
    tokenizer, config = build_tokenizer(), transformer.config
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=config.pooled_projection_dim, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, **ids,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=config.joint_attention_dim, d_kv=8, d_ff=32,
        num_layers=1, num_heads=2, dropout_rate=0.0, is_encoder_decoder=False,
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=build_vae() if vae is None else vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
    )
    pipe.to(transformer.dtype).save_pretrained(folder)
    return folder
