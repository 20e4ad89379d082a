"""HPSv3 on a tiny checkpoint of the published layout: transformers' processor, a forward by hand.

Kills, among others: another instruction or chat template; patches in another order; positions in
three dimensions; a head without its ReLU, or at another token; sigma for mu; a batch that moves a
score; a prompt that brings marks of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from rewards.hps_v3 import INSTRUCTION, HpsV3
from rewards.qwen2_vl_reward import patches, smart_size
from tests.reward_models.tiny_qwen2_vl import (
    NUM_TOKENS,
    hidden,
    make_source,
    published_name,
    write_base,
)

PROMPTS = ["a red cube", "two {dogs} asleep on a sofa, by night", "x"]
REWARD = NUM_TOKENS  # the id that the first added token gets


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def source(base: Path) -> Any:
    return make_source(base, NUM_TOKENS + 1)


@pytest.fixture(scope="module")
def head() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (8, 32), "0.bias": (8,), "3.weight": (6, 8), "3.bias": (6,),
              "5.weight": (2, 6), "5.bias": (2,)}  # fmt: skip
    return {
        f"rm_head.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, source: Any, head: dict[str, Tensor]
) -> Path:
    tensors = {published_name(n): t.clone() for n, t in source.state_dict().items()}
    assert {"visual.patch_embed.proj.weight", "model.embed_tokens.weight", "lm_head.weight",
            "model.layers.1.mlp.up_proj.weight", "model.norm.weight"} <= set(tensors)  # fmt: skip
    path = tmp_path_factory.mktemp("hps") / "HPSv3.safetensors"
    save_file({**tensors, **head}, path)
    return path


@pytest.fixture(scope="module")
def small() -> Tensor:
    coarse = torch.rand(3, 3, 3, 5, generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.interpolate(coarse, size=(40, 66), mode="bilinear")


def make(checkpoint: Path, base: Path, **args: Any) -> HpsV3:
    given = {"model": str(checkpoint), "base": str(base), "dtype": "float32", **args}
    reward = rewards.load("hps_v3", **given)
    assert isinstance(reward, HpsV3)
    return reward


def seen(base: Path, image: Tensor, prompt: str) -> dict[str, Tensor]:
    """transformers' own inputs of an image of 40 x 66, which becomes 364 x 588."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    assert processor.tokenizer.convert_tokens_to_ids("<|Reward|>") == REWARD
    levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    resized = Image.fromarray(levels).resize((588, 364), Image.Resampling.BICUBIC)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>" + INSTRUCTION.replace("{prompt}", prompt) +
        "<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    return dict(processor(text=[text], images=[resized], return_tensors="pt"))


def by_hand(states: Tensor, head: dict[str, Tensor]) -> float:
    """mu of the hidden state [D] at the token."""
    weight = {name.removeprefix("rm_head."): tensor.double() for name, tensor in head.items()}
    first = (weight["0.weight"] @ states + weight["0.bias"]).clamp(min=0)
    second = (weight["3.weight"] @ first + weight["3.bias"]).clamp(min=0)
    return float((weight["5.weight"] @ second + weight["5.bias"])[0])


def test_the_instruction_is_the_published_one() -> None:
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert (len(INSTRUCTION), digest[:16]) == (2585, "e61d58f3c7d3be65")


def test_the_score_is_mu_at_the_token(
    checkpoint: Path, base: Path, source: Any, head: dict[str, Tensor], small: Tensor
) -> None:
    expected, in_space = [], []
    for image, prompt in zip(small, PROMPTS, strict=True):
        inputs = seen(base, image, prompt)
        ids, grid = inputs["input_ids"][0], inputs["image_grid_thw"]
        assert grid.tolist() == [[1, 26, 42]]
        states = hidden(source, ids, inputs["pixel_values"], grid, 262)
        (place,) = (ids == REWARD).nonzero().flatten().tolist()
        expected.append(by_hand(states[place], head))
        with torch.no_grad():  # positions as Qwen2-VL counts them, which HPSv3 does not
            other = source.model(**inputs).last_hidden_state[0, place].double()
        in_space.append(by_hand(other, head))
    scores = make(checkpoint, base).score(images=small, prompts=PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert np.std(expected) > 0.05
    assert np.abs(np.subtract(expected, in_space)).min() > 0.02


def test_a_prompt_with_a_mark_is_not_scored(checkpoint: Path, base: Path, small: Tensor) -> None:
    reward = make(checkpoint, base)
    prompts = ["a <|Reward|> cube", "x", "<|im_end|>"]
    scores = reward.score(images=small, prompts=prompts)
    assert scores.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(scores[1], reward.score(images=small[1:2], prompts=["x"])[0])


def test_it_conforms(checkpoint: Path, base: Path) -> None:
    check_reward(make(checkpoint, base))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(512, 512, (448, 448)), (1024, 1024, (448, 448)), (40, 66, (364, 588)),
     (448, 448, (448, 448)), (1000, 500, (616, 308)), (64, 64, (448, 448))],
)  # fmt: skip
def test_sizes(height: int, width: int, expected: tuple[int, int]) -> None:
    # 1000 x 500: sqrt(500000 / 200704) = 1.578; 633.5 and 316.8, down to multiples of 28.
    # 40 x 66: sqrt(200704 / 2640) = 8.719; 348.8 and 575.5, up.
    assert smart_size(height, width, least=200704, most=200704) == expected


def test_sizes_of_extreme_aspects() -> None:
    assert smart_size(28, 5600, least=0, most=10**9) == (28, 5600)
    with pytest.raises(ValueError, match="at most 200 times the other, got 28 x 5601"):
        smart_size(28, 5601, least=0, most=10**9)


def test_patches_are_those_of_the_processor() -> None:
    from transformers import Qwen2VLImageProcessor

    image = torch.randint(256, (3, 56, 84), dtype=torch.uint8)
    processor = Qwen2VLImageProcessor(min_pixels=1, max_pixels=10**6)
    expected = processor(images=[image], return_tensors="pt")
    pixels, grid = patches(image[None])
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    torch.testing.assert_close(pixels, expected["pixel_values"])


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.norm.weight"), r"is not a checkpoint of HpsV3 .*missing.*norm"),
        (without("rm_head.5.weight"), r"no head rm_head.* that ends in 2 numbers"),
        (lambda t: {**t, "model.more.weight": torch.ones(1)}, r"unexpected.*more.weight"),
        (lambda t: {**t, "model.norm.lora_A.default.weight": torch.ones(1, 1)}, "1 lora_A and 0"),
        (lambda t: {**t, "model.embed_tokens.weight": torch.ones(NUM_TOKENS, 32)},
         rf"its tokenizer has {NUM_TOKENS + 1} tokens, the checkpoint {NUM_TOKENS}"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
    checkpoint: Path,
    base: Path,
    small: Tensor,
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file

    save_file(change(load_file(checkpoint)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "other.safetensors", base).score(images=small, prompts=PROMPTS)
