"""Reward models that are a Qwen2-VL with a head on tokens of their own: HPSv3, VideoReward.

Both were published as the state dict of a class on top of transformers 4.45's Qwen2-VL:

    visual.*                        -> visual.* of Qwen2VLModel
    model.*                         -> language_model.* of it
    rm_head.*                       -> linear layers, with ReLU between them
    lm_head.*                       not used by the score, left out
    base_model.model.*              the same behind peft's prefix
    *.base_layer.weight, *.lora_[AB].default.weight  -> merged: W + alpha / r * B A

Names of later transformers (model.visual.*, model.language_model.*) are read, too. Three facts of
that class decide the score and are kept. It counts positions one by one, image tokens included,
where Qwen2-VL itself counts them in three dimensions. The table of embeddings ends with the new
tokens. The head reads the last hidden states (after the norm) at those tokens. Reading order:
`QwenReward.__call__`, `patches`, `load_reward`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.backbones import (
    Placement,
    checkpoint_file,
    load_tensors,
    pretrained_processor,
    shared,
)

_FACTOR = 28  # 2 x 2 patches of 14 pixels make a token
_PATCH = 14
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as Qwen2-VL's
_STD = (0.26862954, 0.26130258, 0.27577711)
_RENAMES = (
    (r"^base_model\.model\.", ""),
    (r"\.base_layer\.", "."),
    (r"\.default\.weight$", ".weight"),
    (r"^model\.visual\.", "visual."),
    (r"^model\.(?!language_model\.)", "language_model."),
    (r"^model\.", ""),
)


class QwenReward:
    """The network, its tokenizer and its head.

    Args:
        model: Qwen2VLModel, frozen.
        processor: of Qwen2-VL, with `tokens` in its tokenizer.
        head: [.., D] -> [.., N], float32.
        tokens: those whose hidden states the head reads, in the order of the text.
    """

    def __init__(self, model: Any, processor: Any, head: nn.Module, tokens: Sequence[str]) -> None:
        self._model, self._processor, self._head = model, processor, head
        self._ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in tokens]
        self._reserved = tuple(processor.tokenizer.get_added_vocab())

    def is_plain(self, prompt: str) -> bool:
        """Whether `prompt` is free of the tokenizer's own marks, which would be taken for ours."""
        return not any(mark in prompt for mark in self._reserved)

    def __call__(self, kind: str, clips: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """What the head says at each token, float32 [B, K, N].

        Args:
            kind: "image" or "video", as the chat template knows them.
            clips: B of [F, 3, H, W] with values 0 to 255, H and W multiples of 28.
            texts: B, each with every token once.
        """
        cut = [patches(clip) for clip in clips]
        mark = f"<|{kind}_pad|>"
        written = [
            self._written(kind, text).replace(mark, mark * (grid[0] * grid[1] * grid[2] // 4), 1)
            for text, (_, grid) in zip(texts, cut, strict=True)
        ]
        device = self._model.device
        tokens = self._processor.tokenizer(
            written, padding=True, padding_side="right", return_tensors="pt"
        ).to(device)
        ids = tokens["input_ids"]
        positions = torch.arange(ids.shape[1], device=device).expand(3, *ids.shape)
        pixels = torch.cat([each for each, _ in cut]).to(device, self._model.dtype)
        grids = torch.tensor([grid for _, grid in cut], device=device)
        seen = {"image": ("pixel_values", "image_grid_thw"),
                "video": ("pixel_values_videos", "video_grid_thw")}[kind]  # fmt: skip
        hidden = self._model(
            input_ids=ids,
            attention_mask=tokens["attention_mask"],
            position_ids=positions,
            use_cache=False,
            **dict(zip(seen, (pixels, grids), strict=True)),
        ).last_hidden_state
        rows = torch.arange(len(ids), device=device)
        places = [(ids == token).int().argmax(1) for token in self._ids]
        chosen = torch.stack([hidden[rows, place] for place in places], 1)
        output: Tensor = self._head(chosen.float())
        return output

    def _written(self, kind: str, text: str) -> str:
        """The message of the user in the chat template, with one mark for the image or video."""
        message = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]}
        written: str = self._processor.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        return written


def smart_size(height: int, width: int, *, least: int, most: int) -> tuple[int, int]:
    """The size nearest to the given one of multiples of 28 with least <= H * W <= most.

    Too large a size is scaled down and rounded down, too small a one up; so the bounds hold, and
    with least = most the result may be a little below or above. Qwen2-VL's rule (qwen-vl-utils).

    Raises:
        ValueError: one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"Qwen2-VL takes images of which one side is at most 200 times the other, got "
            f"{height} x {width}"
        )
    high, wide = (max(_FACTOR, round(side / _FACTOR) * _FACTOR) for side in (height, width))
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high, wide = (math.floor(side / shrink / _FACTOR) * _FACTOR for side in (height, width))
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * grow / _FACTOR) * _FACTOR for side in (height, width))
    return high, wide


def patches(clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The frames as Qwen2-VL's patches of 2 x 14 x 14, normalised.

    Args:
        clip: [F, 3, H, W] with values 0 to 255; an odd last frame is shown twice.

    Returns:
        float32 [T * h * w, 3 * 2 * 14 * 14], the four patches of a token side by side; and
        (T, h, w).
    """
    frames = clip.float() / 255
    mean, std = (torch.tensor(v, device=clip.device).view(3, 1, 1) for v in (_MEAN, _STD))
    frames = (frames - mean) / std
    if len(frames) % 2:
        frames = torch.cat([frames, frames[-1:]])
    grid = (len(frames) // 2, clip.shape[2] // _PATCH, clip.shape[3] // _PATCH)
    time, high, wide = grid
    cut = frames.reshape(time, 2, 3, high // 2, 2, _PATCH, wide // 2, 2, _PATCH)
    # time, then tokens, then the patches of a token; each with channels, frames, rows, columns
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * high * wide, -1), grid


def load_reward(
    source: str,
    file: str,
    base: str,
    placement: Placement,
    *,
    tokens: Sequence[str],
    outputs: int,
    lora_alpha: float | None,
    reward: str,
) -> QwenReward:
    """The reward model of a published checkpoint, shared.

    Args:
        source: the checkpoint, or a folder or Hub id that holds it.
        file: its name there.
        base: Hub id, or a folder, of the Qwen2-VL it was made from; its weights are not read.
        placement: dtype and device; the head is float32.
        tokens: those that were added, in that order.
        outputs: of the head.
        lora_alpha: of the LoRA in the checkpoint; None = there is none.
        reward: who asks, for the errors.

    Raises:
        OSError: checkpoint or configuration is neither on this machine nor to be had.
        ValueError: the checkpoint has another layout, or does not fit the base.
    """
    path = checkpoint_file(source, file, reward=reward)
    return shared(
        (reward, str(path), base, *placement.key),
        lambda: _load(
            path, base, placement,
            tokens=tokens, outputs=outputs, lora_alpha=lora_alpha, reward=reward,
        ),
    )  # fmt: skip


def _load(
    path: Path,
    base: str,
    placement: Placement,
    *,
    tokens: Sequence[str],
    outputs: int,
    lora_alpha: float | None,
    reward: str,
) -> QwenReward:
    """See `load_reward`."""
    from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

    tensors = load_tensors(path)
    tensors = tensors.get("model", tensors)
    weights = renamed(tensors, lora_alpha=lora_alpha, source=str(path))
    head = relu_head(weights, outputs=outputs, source=str(path))
    # Copies of one's own: others may share what is loaded, and both are changed here.
    config, processor = (
        copy.deepcopy(pretrained_processor(kind, base, reward=reward, argument="base"))
        for kind in (AutoConfig, AutoProcessor)
    )
    if config.model_type != "qwen2_vl":
        raise ValueError(f"{reward}'s base {base!r} is a {config.model_type}; expected a Qwen2-VL")
    processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
    table = weights.get("language_model.embed_tokens.weight")
    rows, needed = 0 if table is None else len(table), len(processor.tokenizer)
    if rows < needed:
        raise ValueError(
            f"{path} does not fit {base!r}: with {', '.join(tokens)} its tokenizer has {needed} "
            f"tokens, the checkpoint {rows}"
        )
    config.text_config.vocab_size = rows
    inner = {n: t for n, t in weights.items() if not n.startswith(("rm_head.", "lm_head."))}
    loader: Any = Qwen2VLModel.from_pretrained  # its type does not tell of a second result
    model, told = loader(
        None, config=config, state_dict=inner, dtype=placement.torch_dtype,
        output_loading_info=True,
    )  # fmt: skip
    wrong = {key: sorted(map(str, names))[:4] for key, names in told.items() if names}
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of {reward} on {base!r}: {wrong}")
    model = model.eval().requires_grad_(False).to(placement.torch_device)
    return QwenReward(model, processor, head.to(placement.torch_device), tokens)


def renamed(
    tensors: Mapping[str, Tensor], *, lora_alpha: float | None, source: str
) -> dict[str, Tensor]:
    """The tensors by the names of Qwen2VLModel, `rm_head.*` and `lm_head.*`, LoRA merged.

    Raises:
        ValueError: there is a LoRA although `lora_alpha` is None, or half of one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        plain[name] = tensor
    down = {n: plain.pop(n) for n in [*plain] if n.endswith(".lora_A.weight")}
    up = {n: plain.pop(n) for n in [*plain] if n.endswith(".lora_B.weight")}
    if len(down) != len(up) or (down and lora_alpha is None):
        raise ValueError(
            f"{source} holds {len(down)} lora_A and {len(up)} lora_B; expected "
            f"{'none' if lora_alpha is None else 'as many of both'}"
        )
    for name, first in down.items():
        target = name.replace(".lora_A.", ".")
        scale = (lora_alpha or 0.0) / len(first)
        change = up[name.replace(".lora_A.", ".lora_B.")].float() @ first.float()
        plain[target] = (plain[target].float() + scale * change).to(plain[target].dtype)
    return plain


def relu_head(weights: Mapping[str, Tensor], *, outputs: int, source: str) -> nn.Sequential:
    """The linear layers of `rm_head.*` in their order, ReLU between them; float32, frozen.

    Dropout between them does nothing here.

    Raises:
        ValueError: there is none, or it ends in another number of outputs.
    """
    parts = {n.removeprefix("rm_head."): t for n, t in weights.items() if n.startswith("rm_head.")}
    names = sorted(n.removesuffix("weight") for n in parts if n.endswith("weight"))
    if not names or len(parts[names[-1] + "weight"]) != outputs:
        shapes = {name: list(tensor.shape) for name, tensor in parts.items()}
        raise ValueError(
            f"{source} has no head rm_head.* that ends in {outputs} numbers, got {shapes}"
        )
    layers: list[nn.Module] = []
    for name in names:
        weight, bias = parts[name + "weight"], parts.get(name + "bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight = nn.Parameter(weight.float())
        if bias is not None:
            layer.bias = nn.Parameter(bias.float())
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
