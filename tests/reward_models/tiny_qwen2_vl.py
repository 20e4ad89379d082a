"""A Qwen2-VL of width 32 on disk, laid out as Qwen/Qwen2-VL-*-Instruct, and its forward by hand.

`write_base` writes what a reward reads of its base: a flat config.json as it is published, the
tokenizer, processor and chat template. `make_source` is a network for checkpoints to be made of.
`hidden` is the published reward models' forward: embeddings, with the image's features at its
tokens, through the text model, which then counts positions one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
NUM_TOKENS = 256 + len(SPECIAL)
TABLE = NUM_TOKENS + 20  # rows of the base's own table: more than tokens, as published
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_base(folder: Path) -> Path:
    """Configuration, tokenizer, processor and chat template; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    names = bytes_to_unicode().values()
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [*range(256, NUM_TOKENS)]
    pixels = {"min_pixels": 56 * 56, "max_pixels": 16384 * 28 * 28}
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": TABLE,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "vision_start_token_id": 259,
        "vision_end_token_id": 260,
        "vision_token_id": 261,
        "image_token_id": 262,
        "video_token_id": 263,
        "vision_config": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2,
                          "in_chans": 3, "hidden_size": 32, "patch_size": 14,
                          "spatial_merge_size": 2, "spatial_patch_size": 14,
                          "temporal_patch_size": 2},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_source(base: Path, num_tokens: int) -> Any:
    """A random Qwen2VLForConditionalGeneration whose table has `num_tokens` rows."""
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = num_tokens
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def published_name(name: str) -> str:
    """What transformers 4.45 called the tensor `name` of today's model."""
    for today, then in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(today):
            return then + name.removeprefix(today)
    return name


def hidden(model: Any, ids: Tensor, pixels: Tensor, grid: Tensor, mark: int) -> Tensor:
    """Last hidden states [S, D], float64, of one sequence of `ids` [S] without padding.

    Args:
        model: as of `make_source`, maybe with a LoRA in it.
        ids: with `mark` where image tokens are.
        pixels: patches [N, 1176].
        grid: int64 [1, 3].
        mark: id of the image's, or video's, tokens.
    """
    with torch.no_grad():
        embeddings = model.model.language_model.embed_tokens(ids)
        features = model.model.visual(pixels, grid_thw=grid).pooler_output
        assert int((ids == mark).sum()) == len(features)
        embeddings[ids == mark] = features
        states = model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state
    return states[0].double()
