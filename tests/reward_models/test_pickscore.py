"""PickScore on a tiny random CLIP in the published folder format, against plain PIL and torch.

Kills, among others: float images divided by 255 twice; images cut instead of rounded to 8 bit; a
softmax or a product without the norms; a logit_scale that is not exponentiated; scores that
depend on the batch around them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import rewards
from rewards.pickscore import PickScore

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red cube", "two dogs asleep on a sofa", "x"]
LETTERS = [*bytes_to_unicode().values()]
TOKENS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of width 32 and its processor, the files named as in the published repositories."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": 514, "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": 224, "patch_size": 32},
        projection_dim=16,
        logit_scale_init_value=3.0,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # CLIP's own start gives all images nearly the same score
                parameter.mul_(4)
    model.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    return folder


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Three images, wider than high, that are not on the 8 bit grid."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, 3, 6, 9, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(96, 144), mode="bilinear")


def make(folder: Path, **args: object) -> PickScore:
    reward = rewards.load("pickscore", model=str(folder), processor=str(folder), **args)
    assert isinstance(reward, PickScore)
    return reward


def oracle(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    """exp(logit_scale) * cos, with the pixels and tokens made by hand."""
    pixels = []
    for image in images:
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        resized = Image.fromarray(levels).resize((336, 224), Image.Resampling.BICUBIC)
        crop = np.asarray(resized)[:, 56:280]
        pixels.append((crop / 255 - MEAN) / STD)
    tokens = []
    for prompt in prompts:
        words = [[*word[:-1], word[-1] + "</w>"] for word in prompt.split()]
        ids = [TOKENS.index(token) for word in words for token in word]
        tokens.append([512, *ids, 513])  # not padded: what follows the end must not matter
    model = CLIPModel.from_pretrained(folder)
    scores = []
    for each, ids in zip(pixels, tokens, strict=True):
        with torch.no_grad():
            seen = model.vision_model(torch.tensor(each).float().permute(2, 0, 1)[None])
            read = model.text_model(torch.tensor([ids]))
            image = model.visual_projection(seen.pooler_output)[0].double()
            text = model.text_projection(read.pooler_output)[0].double()
        cosine = (image @ text) / (image @ image).sqrt() / (text @ text).sqrt()
        scores.append(np.exp(3.0) * cosine)
    return torch.stack(scores)


def test_the_score_is_the_scaled_cosine_over_26(folder: Path, images: Tensor) -> None:
    expected = oracle(folder, images, PROMPTS)
    assert expected.std() > 0.5  # or anything would agree
    scores = make(folder).score(images=images, prompts=PROMPTS)
    assert scores.dtype == torch.float32 and scores.shape == (3,)
    torch.testing.assert_close(scores.double(), expected / 26, rtol=1e-5, atol=1e-6)
    raw = make(folder, normalize=False).score(images=images, prompts=PROMPTS)
    torch.testing.assert_close(raw, 26 * scores)


def test_a_score_does_not_depend_on_the_batch_around_it(folder: Path, images: Tensor) -> None:
    reward = make(folder)
    together = reward.score(images=images, prompts=PROMPTS)
    chunked = make(folder, batch_size=2).score(images=images, prompts=PROMPTS)
    torch.testing.assert_close(chunked, together, rtol=1e-5, atol=1e-6)
    alone = reward.score(images=images[1:2], prompts=PROMPTS[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-6)


def test_a_long_prompt_is_cut_to_77_tokens(folder: Path, images: Tensor) -> None:
    same = "z" * 75  # with start and end exactly 77
    reward = make(folder)
    scores = [
        reward.score(images=images[:1], prompts=[same[:-1] + ending]).item()
        for ending in ("a" * 2, "a" * 500)
    ]
    assert scores[0] == scores[1]


def test_half_precision_stays_near(folder: Path, images: Tensor) -> None:
    exact = make(folder).score(images=images, prompts=PROMPTS)
    rough = make(folder, dtype="bfloat16").score(images=images, prompts=PROMPTS)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_nothing_is_loaded_before_the_first_score_and_missing_weights_name_the_remedy(
    folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = folder / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for argument in ("model", "processor"):
        for source in ("nobody/no-such-clip", str(empty)):
            args = {"model": str(folder), "processor": str(folder), argument: source}
            reward = rewards.load("pickscore", **args)
            with pytest.raises(OSError, match=f"PickScore's {argument} '{source}'") as caught:
                reward.score(images=images, prompts=PROMPTS)
            assert f"hf download {source}" in str(caught.value)
            assert f"argument '{argument}'" in str(caught.value)


def test_bad_arguments_and_inputs_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'fp16'"):
        PickScore(dtype="fp16")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PickScore(batch_size=0)
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        PickScore().score(images=images, prompts=PROMPTS[:2])
    with pytest.raises(ValueError, match="expected float images"):
        PickScore().score(images=(images * 255).to(torch.uint8), prompts=PROMPTS)
