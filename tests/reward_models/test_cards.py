"""Cards: they agree with their rewards, and their sizes with the published architectures.

Kills, among others: a card that is copied and keeps the other's name, inputs or range; a parameter
count that is guessed; a table whose import loads torch.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from rewards import registry
from rewards.cards import Card, cards

WITH_CARDS = {"pickscore", "clip_score", "hps_v2", "aesthetic", "siglip", "image_reward",
              "diversity", "colourfulness", "vqa_score", "geneval", "ocr", "vlm_judge",
              "vlm_pair_judge", "unified_reward", "unified_reward_pairs", "hps_v3",
              "video_align"}  # fmt: skip
HEAD = 768 * 1024 + 1024 + 1024 * 128 + 128 + 128 * 64 + 64 + 64 * 16 + 16 + 16 + 1


def test_every_card_agrees_with_its_reward() -> None:
    found = cards()
    assert set(found) >= WITH_CARDS
    for name, card in found.items():
        assert card.name == name
        module, _, attribute = registry._TABLE[name][0].partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        assert card.inputs == kind.inputs and card.range == kind.range
        texts = (card.model, card.licence, card.paper, card.preprocessing, card.verified)
        assert all(texts)


def test_memory_is_that_of_the_weights() -> None:
    card = Card("x", "x", "x", "x", ("images",), (0, 1), 1_500_000_000, "x", "x")
    assert card.gigabytes() == 6.0 and card.gigabytes("bfloat16") == 3.0
    with pytest.raises(KeyError):
        card.gigabytes("int8")


def clip_l() -> Iterable[nn.Module]:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "patch_size": 14}  # fmt: skip
    yield CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))


def clip_h() -> Iterable[nn.Module]:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16}  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
              "num_attention_heads": 16, "patch_size": 14}  # fmt: skip
    yield CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024))


def open_clip_h() -> Iterable[nn.Module]:
    open_clip = pytest.importorskip("open_clip")
    yield open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))


def siglip2() -> Iterable[nn.Module]:
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
             "num_attention_heads": 16}  # fmt: skip
    text = {**sizes, "vocab_size": 256000}
    vision = {**sizes, "image_size": 384, "patch_size": 14}
    yield SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def dinov2() -> Iterable[nn.Module]:
    from transformers import Dinov2Config, Dinov2Model

    yield Dinov2Model(Dinov2Config(image_size=518, patch_size=14))


def blip() -> Iterable[nn.Module]:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    yield BlipVisionModel(
        BlipVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=224,
        )
    )
    text = BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12)
    yield BlipTextModel(text, add_pooling_layer=False)


def qwen() -> Iterable[nn.Module]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
              "out_hidden_size": 3584}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    yield Qwen2_5_VLForConditionalGeneration(config)


def mask2former_and_clip() -> Iterable[nn.Module]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24],
                      window_size=7, image_size=384,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(backbone_config=swin, num_queries=100, num_labels=80)
    yield Mask2FormerForUniversalSegmentation(config)
    yield from clip_l()


def qwen2_7b() -> Iterable[nn.Module]:
    yield qwen2(3584, 18944, 28, 4, tokens=151657 + 1)


def qwen2_2b() -> Iterable[nn.Module]:
    yield qwen2(1536, 8960, 12, 2, tokens=151657 + 3)


def qwen2(width: int, inner: int, heads: int, kv_heads: int, *, tokens: int) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": 28,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "vocab_size": tokens}  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": width}
    return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize(
    ("name", "networks", "others"),
    [
        ("clip_score", clip_l, 0),
        ("aesthetic", clip_l, HEAD),
        ("pickscore", clip_h, 0),
        ("hps_v2", open_clip_h, 0),
        ("siglip", siglip2, 0),
        ("diversity", dinov2, 0),
        ("image_reward", blip, HEAD),
        ("vqa_score", qwen, 0),
        ("geneval", mask2former_and_clip, 0),
        ("vlm_judge", qwen, 0),
        ("unified_reward", qwen, 0),
        ("hps_v3", qwen2_7b, 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2),
        ("video_align", qwen2_2b, 1536),
    ],
)
def test_the_parameters_are_those_of_the_published_architecture(
    name: str, networks: Callable[[], Iterable[Any]], others: int
) -> None:
    with torch.device("meta"):
        count = sum(weight.numel() for network in networks() for weight in network.parameters())
    assert cards()[name].parameters == count + others


def test_the_table_loads_no_torch() -> None:
    code = "import sys, rewards, rewards.cards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
