"""A LLaVA of width 32 on disk that answers in digits, for judges: here and behind a server.

28 x 28 pixels, four image tokens, a token per byte. Only digits, the end of the text and the words
yes and no have rows in the output layer; what it says depends on the image and on the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BYTES = bytes_to_unicode()
SPACE = BYTES[32]
WORDS = ["Yes", "yes", SPACE + "YES", "No", SPACE + "no", "Yesno"]
PLAIN = ["<s>", "</s>", "<pad>", "<image>", *BYTES.values()]
NAMES = [*PLAIN, *WORDS]
END = 1
DIGITS = [NAMES.index(str(digit)) for digit in range(10)]
YES = [NAMES.index(word) for word in WORDS[:3]]
NO = [NAMES.index(word) for word in WORDS[3:5]]
TEMPLATE = (
    "<s>{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def in_digits(model: Any) -> None:
    """Few words, loudly; see above."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.mul_(0.6)  # else the last token would drown what was seen and read
        elif parameter.ndim > 1:
            parameter.mul_(6 if "vision" in name or "lm_head" in name else 12)
    rows = model.lm_head.weight
    silent = [i for i in range(len(NAMES)) if i not in (*DIGITS, *YES, *NO, END)]
    rows[silent] = 0
    rows[DIGITS] *= 4
    rows[END] *= 2


def write_llava(
    folder: Path,
    names: list[str] = NAMES,
    merges: Sequence[tuple[str, str]] = (),
    speak: Callable[[Any], None] = in_digits,
) -> Path:
    """Writes the model, its processor and its chat template, as published ones are laid out.

    Args:
        folder: where to.
        names: of the tokens; `PLAIN`, and others behind.
        merges: of byte pairs into further names.
        speak: changes the weights from which the model begins.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    text = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=len(names),
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=END,
        pad_token_id=2,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=16),
        text_config=text,
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        speak(model)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    vocabulary = {name: index for index, name in enumerate(names)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 28, "width": 28}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def spelt(text: str) -> list[int]:
    """A token per byte."""
    return [PLAIN.index(BYTES[byte]) for byte in text.encode()]


class ByHand:
    """The same model with tokens and pixels by hand, one question at a time."""

    def __init__(self, folder: Path, spelt: Callable[[str], list[int]] = spelt) -> None:
        from transformers import LlavaForConditionalGeneration

        self._spelt = spelt
        self._model = LlavaForConditionalGeneration.from_pretrained(folder)

    def logits(self, images: list[Tensor], text: str, said: list[int]) -> Tensor:
        """Of the next token, float64 [V], after the question and the tokens `said`."""
        levels = [np.rint(image.permute(1, 2, 0).numpy() * 255) for image in images]
        pixels = [torch.tensor((each / 255 - MEAN) / STD).float() for each in levels]
        ids = [0, *self._spelt("USER: ")]
        for _ in images:
            ids += [3, 3, 3, 3, *self._spelt("\n")]
        ids += [*self._spelt(f"{text} ASSISTANT:"), *said]
        with torch.no_grad():
            out = self._model(
                input_ids=torch.tensor([ids]), pixel_values=torch.stack(pixels).permute(0, 3, 1, 2)
            )
        return out.logits[0, -1].double()

    def answer(self, images: list[Tensor], text: str, max_tokens: int) -> tuple[str, bool]:
        """The greedy answer, and whether it was cut."""
        said: list[int] = []
        while len(said) < max_tokens:
            token = int(self.logits(images, text, said).argmax())
            if token == END:
                return "".join(NAMES[each] for each in said), False
            said.append(token)
        return "".join(NAMES[each] for each in said), True

    def yes_share(self, images: list[Tensor], text: str) -> float:
        """P(yes) / (P(yes) + P(no)) of the first token."""
        weights = (self.logits(images, text, [])).exp()
        yes, no = float(weights[YES].sum()), float(weights[NO].sum())
        return yes / (yes + no)
