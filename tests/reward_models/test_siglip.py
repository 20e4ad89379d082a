"""SigLIP on a tiny network in the published folder format, against plain PIL and torch.

Kills, among others: an aspect that is kept, or a crop; CLIP's mean and std; capitals; a padding
that is masked or depends on the batch; a scale without exp, a bias that is forgotten; a softmax.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from rewards.siglip import Siglip

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *LETTERS.upper()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP 2 of fixed resolution: SigLIP's network and image processor, Gemma's tokenizer."""
    from transformers import (
        GemmaTokenizer,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
        SiglipProcessor,
    )

    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = SiglipConfig(
        text_config={**sizes, **ids, "vocab_size": len(NAMES), "max_position_embeddings": 64},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    model.save_pretrained(folder)
    tokenizer = GemmaTokenizer(
        vocab={name: index for index, name in enumerate(NAMES)},
        merges=[],
        padding_side="right",
        model_max_length=64,
    )
    image_processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def logits(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """The logit of each pair, float64, with pixels and tokens by hand."""
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(folder)
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        resized = Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = torch.tensor(np.asarray(resized) / 255 * 2 - 1).float().permute(2, 0, 1)
        ids = [NAMES.index(c) for c in prompt.lower().replace(" ", "▁")][:64]
        with torch.no_grad():
            seen = model.vision_model(pixels[None]).pooler_output[0].double()
            padded = torch.tensor([ids + [0] * (64 - len(ids))])
            read = model.text_model(input_ids=padded).pooler_output[0].double()
        scores.append(np.exp(2.0) * (seen @ read) / seen.norm() / read.norm() - 1.5)
    return torch.stack(scores)


def make(folder: Path, **args: object) -> Siglip:
    reward = rewards.load("siglip", model=str(folder), **args)
    assert isinstance(reward, Siglip)
    return reward


def test_the_score_is_the_sigmoid_of_the_logit(
    folder: Path, images: Tensor, prompts: list[str]
) -> None:
    asked = ["A red Cube", prompts[1], "z" * 80]
    expected = logits(folder, images, asked)
    assert expected.std() > 0.3
    reward = make(folder)
    scores = reward.score(images=images, prompts=asked)
    assert scores.dtype == torch.float32 and reward.range == (0, 1)
    torch.testing.assert_close(scores.double(), 1 / (1 + (-expected).exp()), rtol=1e-4, atol=1e-5)
    raw = make(folder, output="logit")
    torch.testing.assert_close(
        raw.score(images=images, prompts=asked).double(), expected, rtol=1e-4, atol=1e-4
    )
    assert raw.range == (-float("inf"), float("inf"))


def test_it_conforms(folder: Path) -> None:
    check_reward(make(folder, batch_size=3))


def test_what_does_not_fit_is_refused(
    folder: Path, images: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="probability, logit, got 'cosine'"):
        Siglip(output="cosine")
    for file in folder.iterdir():
        text = file.read_text() if file.name == "config.json" else ""
        if text:
            (tmp_path / file.name).write_text(text.replace('"siglip"', '"siglip2"'))
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="of type 'siglip2'; expected a checkpoint of fixed"):
        make(tmp_path).score(images=images, prompts=prompts)
