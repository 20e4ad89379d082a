"""The architecture of the embedded Shapes model: a Stable Diffusion 3 small enough for a CPU."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rewards.shapes.grammar import SKILLS, requests

TEXT_LENGTH = 12  # tokens per encoder: the longest prompt; also the T5 part's `max_sequence_length`


def build_vae() -> AutoencoderKL:
    """A 4 x down-sampling VAE, 64 x 64 x 3 to 16 x 16 x 4, of 0.2 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of every word that the grammar can say."""
    words = sorted({word for skill in SKILLS for r in requests(skill) for word in r.prompt.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_pipeline(vae: AutoencoderKL, seed: int) -> StableDiffusion3Pipeline:
    """The pipeline with fresh networks: 5 blocks of width 128, three small text encoders."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=64,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        # Not 2: transformers takes a CLIP config with eos_token_id 2 for an old one and pools at
        # the largest id instead of at the first eos.
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        dropout_rate=0.0, is_encoder_decoder=False,
        relative_attention_num_buckets=16, relative_attention_max_distance=TEXT_LENGTH,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=5,
        attention_head_dim=32, num_attention_heads=4, joint_attention_dim=128,
        caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer,
    )
