"""ImageReward: how well an image pleases people for its prompt, by a BLIP trained on their ranking.

Paper: ImageReward, arXiv:2304.05977, section 3; BLIP, arXiv:2201.12086. A ViT-L reads the image, a
BERT reads the prompt and attends to the image in every layer; its first token goes through a head
of linear layers. The published checkpoint is one file in BLIP's own layout:

    blip.visual_encoder.*   -> BlipVisionModel of transformers, renamed by `_VISION`
    blip.text_encoder.*     -> BlipTextModel, names unchanged
    mlp.layers.*            -> `rewards.heads`
    blip.vision_proj.*, blip.text_proj.*, position_ids: not used by the score, left out

All sizes are read off the tensors; heads are 64 wide, as in both published networks. Reading order:
`ImageReward.score`, `_Network.forward`, `_load`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewards.backbones import (
    Placement,
    checkpoint_file,
    load_tensors,
    pretrained_processor,
    score_in_batches,
    shared,
)
from rewards.base import Metadata
from rewards.cards import Card
from rewards.clip import clip_pixels
from rewards.heads import linear_head

_NUM_TOKENS = 35
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the published network on its data
_HEAD_WIDTH = 64
# BLIP's name of a vision tensor, piece by piece -> transformers'.
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
_UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")


class ImageReward:
    """(head(BERT(prompt | ViT(image))) - 0.167) / 1.033 of every image and its prompt.

    The authors standardised it to mean 0 and deviation 1 on their data. The preprocessing is the
    published one: 8 bit RGB in PIL, shorter side to 224 bicubic, centre crop, CLIP's mean and std;
    the prompt in lower case, padded or cut to 35 tokens of BERT.

    Args:
        model: the checkpoint, or a folder or Hub id that holds it; a torch file or a .safetensors
            file of the same names.
        file: its name there.
        tokenizer: Hub id, or a folder, of BERT's uncased tokenizer.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32" (as published), "bfloat16" or "float16", of the two towers; head and scores
            are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (-float("inf"), float("inf"))
    higher_is_better = True
    card = Card(
        name="image_reward",
        model="zai-org/ImageReward ImageReward.pt (version 1.0; formerly THUDM/ImageReward), "
        "tokenizer of google-bert/bert-base-uncased",
        licence="Apache-2.0",
        paper="ImageReward, arXiv:2304.05977",
        inputs=inputs,
        range=range,
        parameters=445_278_720 + 927_969,
        preprocessing="8 bit RGB; shorter side to 224 bicubic (PIL), centre crop, CLIP's mean and "
        "std; 35 tokens of BERT",
        verified="a random checkpoint in BLIP's layout against a BLIP of plain torch; not run on "
        "the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "zai-org/ImageReward",
        file: str = "ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        self.model, self.file, self.tokenizer = model, file, tokenizer
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind, not one prompt per image, or a checkpoint
                of another layout.
            OSError: the weights are neither on this machine nor to be had.
        """
        size = self._placement.batch_size
        return score_in_batches(self._score, images, prompts, batch_size=size)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of one forward."""
        network, device = self._network, self._placement.torch_device
        inputs = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=_NUM_TOKENS,
            return_tensors="pt",
        ).to(device)
        pixels = clip_pixels(images, network.image_size)
        raw: Tensor = network(
            pixels.to(device, self._placement.torch_dtype),
            inputs["input_ids"],
            inputs["attention_mask"],
        )
        return (raw - _MEAN) / _STD

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import BertTokenizer

        return pretrained_processor(
            BertTokenizer, self.tokenizer, reward="ImageReward", argument="tokenizer"
        )

    @cached_property
    def _network(self) -> _Network:
        path = checkpoint_file(self.model, self.file, reward="ImageReward")
        key = ("ImageReward", str(path), *self._placement.key)
        return shared(key, lambda: _load(path, self._placement))


class _Network(nn.Module):
    """Image tower, text tower with cross attention, head.

    Args:
        vision: BlipVisionModel.
        text: BlipTextModel.
        head: [.., D] -> [.., 1], float32.
    """

    def __init__(self, vision: Any, text: Any, head: nn.Sequential) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.image_size: int = vision.config.image_size

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores, float32 [B], of pixels [B, 3, H, H], ids and mask int64 [B, S]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen)
        raw: Tensor = self.head(read.last_hidden_state[:, 0].float())
        return raw.squeeze(-1)


def _load(path: Path, placement: Placement) -> _Network:
    """The frozen network of a checkpoint in BLIP's layout.

    Raises:
        ValueError: the file has another layout.
    """
    tensors = {n: t for n, t in load_tensors(path).items() if not _UNUSED.search(n)}
    vision, text, head = (
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    )
    if not (vision and text and head) or len(vision) + len(text) + len(head) != len(tensors):
        raise ValueError(
            f"{path} is not an ImageReward checkpoint: expected blip.visual_encoder.*, "
            f"blip.text_encoder.* and mlp.layers.*, got {sorted(tensors)[:4]} ..."
        )
    towers = [
        (_vision_model(vision), {_renamed(name): tensor for name, tensor in vision.items()}),
        (_text_model(text), text),
    ]
    for model, weights in towers:
        model.load_state_dict(weights)
        model.to(device=placement.torch_device, dtype=placement.torch_dtype)
    scoring = linear_head(head, source=str(path)).to(placement.torch_device)
    return _Network(towers[0][0], towers[1][0], scoring).eval().requires_grad_(False)


def _renamed(name: str) -> str:
    """The name in transformers of BLIP's vision tensor `name`."""
    for pattern, replacement in _VISION:
        name = re.sub(pattern, replacement, name)
    return name


def _vision_model(tensors: Mapping[str, Tensor]) -> Any:
    """An empty BlipVisionModel of the sizes of `tensors`."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, patch = tensors["patch_embed.proj.weight"].shape[0::3]
    grid = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_num_layers(tensors, "blocks"),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * grid,
        patch_size=patch,
        layer_norm_eps=1e-6,  # BLIP's; transformers' own default is 1e-5
    )
    return BlipVisionModel(config)


def _text_model(tensors: Mapping[str, Tensor]) -> Any:
    """An empty BlipTextModel of the sizes of `tensors`."""
    from transformers import BlipTextConfig, BlipTextModel

    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    layer = "encoder.layer.0."
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=tensors[layer + "crossattention.self.key.weight"].shape[1],
        intermediate_size=tensors[layer + "intermediate.dense.weight"].shape[0],
        num_hidden_layers=_num_layers(tensors, "encoder.layer"),
        num_attention_heads=width // _HEAD_WIDTH,  # 12; transformers' own default is 8
        max_position_embeddings=tensors["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
    )
    return BlipTextModel(config, add_pooling_layer=False)


def _num_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in tensors)
    return 1 + max(int(match[1]) for match in found if match)
