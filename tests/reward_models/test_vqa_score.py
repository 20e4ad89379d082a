"""VQAScore on a tiny LLaVA with its processor and chat template, tokens and pixels by hand.

Kills, among others: another question, or braces of a prompt that are formatted; a probability over
yes and no only; logits of another place than the last; prompts that are mixed up when they are
grouped; scores that depend on the batch around them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

import rewards
from flowrl.testing import check_reward
from rewards.vqa_score import VqaScore

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIAL = ["<s>", "</s>", "<pad>", "<image>"]
BYTES = bytes_to_unicode()
NAMES = [*SPECIAL, *BYTES.values(), "Ye", "Yes"]
TEMPLATE = (
    "<s>{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of width 32: 28 x 28 pixels, four image tokens, a token per byte, and "Yes"."""
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

    folder = tmp_path_factory.mktemp("llava")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=16),
        text_config=LlamaConfig(
            **sizes, num_key_value_heads=2, vocab_size=len(NAMES), max_position_embeddings=512
        ),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(folder)
    vocabulary = {name: index for index, name in enumerate(NAMES)}
    merges = [("Y", "e"), ("Ye", "s")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Four images of the network's own size: what a processor does to others is its own affair."""
    return torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(4))


def oracle(folder: Path, image: Tensor, question: str, answer: str = "Yes") -> float:
    """P(answer) with pixels and tokens by hand, one image at a time."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    levels = np.rint(image.permute(1, 2, 0).numpy() * 255)
    pixels = torch.tensor((levels / 255 - MEAN) / STD).float().permute(2, 0, 1)
    before, after = "USER: ", f"\n{question} ASSISTANT:"
    ids = [0, *spelt(before), 3, 3, 3, 3, *spelt(after)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels[None]).logits[0, -1]
    exponents = (logits.double() - logits.max()).exp()
    return float(exponents[NAMES.index(answer)] / exponents.sum())


def spelt(text: str) -> list[int]:
    """A token per byte, and one for each "Yes"."""
    parts = [[NAMES.index(BYTES[b]) for b in part.encode()] for part in text.split("Yes")]
    ids = parts[0]
    for part in parts[1:]:
        ids = [*ids, NAMES.index("Yes"), *part]
    return ids


def make(folder: Path, **args: object) -> VqaScore:
    reward = rewards.load("vqa_score", model=str(folder), **{"dtype": "float32", **args})
    assert isinstance(reward, VqaScore)
    return reward


def test_the_score_is_the_probability_of_yes(folder: Path, small: Tensor) -> None:
    prompts = ["a red cube", "two dogs", "a red cube", 'braces {text} and "quotes"']
    expected = [
        oracle(folder, image, f'Does this figure show "{prompt}"? Please answer yes or no.')
        for image, prompt in zip(small, prompts, strict=True)
    ]
    assert np.std(np.log(expected)) > 0.1
    scores = make(folder).score(images=small, prompts=prompts)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-3)


def test_another_question_and_answer(folder: Path, small: Tensor) -> None:
    reward = make(folder, question="{text}! Yes?", answer="n", batch_size=1)
    scores = reward.score(images=small[:2], prompts=["snow", "snow"])
    expected = [oracle(folder, image, "snow! Yes?", "n") for image in small[:2]]
    assert scores.tolist() == pytest.approx(expected, rel=1e-3)


def test_it_conforms(folder: Path) -> None:
    check_reward(make(folder))


def test_what_does_not_fit_is_refused(folder: Path, small: Tensor, tmp_path: Path) -> None:
    given = {"images": small, "prompts": ["x"] * 4}
    with pytest.raises(ValueError, match=r'must hold "\{text\}" for the prompt, got .Is it'):
        VqaScore(question="Is it?")
    with pytest.raises(ValueError, match=r"one token of .*, but 'no' is 2; choose another"):
        make(folder, answer="no").score(**given)
    with pytest.raises(ValueError, match="4 images and 1 prompts"):
        make(folder).score(images=small, prompts=["x"])
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no chat template in its processor"):
        make(tmp_path).score(**given)
