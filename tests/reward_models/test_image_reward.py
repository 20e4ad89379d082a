"""ImageReward on a random checkpoint in BLIP's own layout, against a BLIP of plain torch.

Kills, among others: transformers' own epsilon and number of heads; query, key and value in another
order; cross attention left out, or before self attention; padding that is attended to; a prompt
of another length than 35; tanh GELU; a score that is not standardised.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import rewards
from flowrl.testing import check_reward
from rewards.clip import clip_pixels as our_clip_pixels
from rewards.image_reward import ImageReward

State = dict[str, Tensor]
MEAN = np.array((0.48145466, 0.4578275, 0.40821073))
STD = np.array((0.26862954, 0.26130258, 0.27577711))
WIDTH, SIZE = 128, 32  # two heads of 64; 2 x 2 patches of 16
LETTERS = "abcdefghijklmnopqrstuvwxyz!"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def attention(name: str) -> dict[str, tuple[int, ...]]:
    shapes = norm(f"{name}.output.LayerNorm")
    for part in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= linear(f"{name}.{part}", WIDTH, WIDTH)
    return shapes


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of BLIP's checkpoint: two layers in each tower."""
    see, read = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        see + "cls_token": (1, 1, WIDTH),
        see + "pos_embed": (1, 5, WIDTH),
        see + "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        see + "patch_embed.proj.bias": (WIDTH,),
        read + "embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
        read + "embeddings.position_embeddings.weight": (40, WIDTH),
        "blip.vision_proj.weight": (8, WIDTH),
        "blip.text_proj.weight": (8, WIDTH),
    }
    shapes |= norm(see + "norm") | norm(read + "embeddings.LayerNorm")
    for index in range(2):
        block, layer = f"{see}blocks.{index}.", f"{read}encoder.layer.{index}."
        shapes |= norm(block + "norm1") | norm(block + "norm2")
        shapes |= linear(block + "attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(block + "attn.proj", WIDTH, WIDTH)
        shapes |= linear(block + "mlp.fc1", 160, WIDTH) | linear(block + "mlp.fc2", WIDTH, 160)
        shapes |= attention(layer + "attention") | attention(layer + "crossattention")
        shapes |= linear(layer + "intermediate.dense", 192, WIDTH)
        shapes |= linear(layer + "output.dense", WIDTH, 192) | norm(layer + "output.LayerNorm")
    for index, (low, high) in {
        0: (WIDTH, 24),
        2: (24, 12),
        4: (12, 8),
        6: (8, 4),
        7: (4, 1),
    }.items():
        shapes |= linear(f"mlp.layers.{index}", high, low)
    return shapes


@pytest.fixture(scope="module")
def state() -> State:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in layout().items():
        tensor = torch.randn(shape, generator=generator)
        if name.startswith("blip.visual_encoder") and ("embed" in name or "cls" in name):
            tensor *= 1e-4 if "proj.weight" in name else 2e-3  # so small that an epsilon is seen
        elif "_embeddings." in name:
            tensor *= 1e-3  # the same
        elif name.endswith(".weight") and len(shape) == 2:
            tensor *= 1.5 / shape[1] ** 0.5
        elif name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "LayerNorm.weight")):
            tensor = 1 + 0.2 * tensor
        else:
            tensor *= 0.2
        found[name] = tensor
    positions = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    return found | positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, state: State) -> Path:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(state, folder / "ImageReward.pt")
    save_file(state, folder / "ImageReward.safetensors")
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


def make(folder: Path, model: str = "", **args: object) -> ImageReward:
    source = model or str(folder)
    reward = rewards.load("image_reward", model=source, tokenizer=str(folder), **args)
    assert isinstance(reward, ImageReward)
    return reward


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of 64, on [S, 128]."""
    parts = [slice(0, 64), slice(64, 128)]
    return torch.cat([(q[:, p] @ k[:, p].T / 8).softmax(1) @ v[:, p] for p in parts], 1)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def see(pixels: Tensor, state: State) -> Tensor:
    """BLIP's image tokens, float64 [5, 128], of pixels [3, 32, 32]."""
    w = {k.removeprefix("blip.visual_encoder."): t.double() for k, t in state.items()}
    patches = pixels.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(4, -1)
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"][0], x]) + w["pos_embed"][0]

    def lin(h: Tensor, name: str) -> Tensor:
        return h @ w[name + ".weight"].T + w[name + ".bias"]

    def ln(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (WIDTH,), w[name + ".weight"], w[name + ".bias"], eps=1e-6)

    for index in range(2):
        block = f"blocks.{index}."
        q, k, v = lin(ln(x, block + "norm1"), block + "attn.qkv").chunk(3, 1)
        x = x + lin(attend(q, k, v), block + "attn.proj")
        h = lin(ln(x, block + "norm2"), block + "mlp.fc1")
        x = x + lin(gelu(h), block + "mlp.fc2")
    return ln(x, "norm")


def read(ids: list[int], seen: Tensor, state: State) -> Tensor:
    """BLIP's first text token, float64 [128]."""
    w = {k.removeprefix("blip.text_encoder."): t.double() for k, t in state.items()}

    def lin(h: Tensor, name: str) -> Tensor:
        return h @ w[name + ".weight"].T + w[name + ".bias"]

    def ln(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, (WIDTH,), w[name + ".weight"], w[name + ".bias"], eps=1e-12)

    x = w["embeddings.word_embeddings.weight"][ids]
    x = ln(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    for index in range(2):
        layer = f"encoder.layer.{index}."
        for name, other in (("attention", x), ("crossattention", seen)):
            q = lin(x, f"{layer}{name}.self.query")
            k, v = (lin(x if name == "attention" else other, f"{layer}{name}.self.{part}")
                    for part in ("key", "value"))  # fmt: skip
            h = lin(attend(q, k, v), f"{layer}{name}.output.dense")
            x = ln(x + h, f"{layer}{name}.output.LayerNorm")
        h = lin(gelu(lin(x, layer + "intermediate.dense")), layer + "output.dense")
        x = ln(x + h, layer + "output.LayerNorm")
    return x[0]


def token_ids(prompt: str) -> list[int]:
    pieces = [c if i == 0 else "##" + c for word in prompt.split() for i, c in enumerate(word)]
    return [2, *(VOCABULARY.index(piece) for piece in pieces[:33]), 3]


def oracle(images: Tensor, prompts: list[str], state: State) -> Tensor:
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        resized = Image.fromarray(levels).resize((48, SIZE), Image.Resampling.BICUBIC)
        crop = (np.asarray(resized)[:, 8:40] / 255 - MEAN) / STD
        seen = see(torch.from_numpy(crop).permute(2, 0, 1), state)
        x = read(token_ids(prompt), seen, state)
        for index in (0, 2, 4, 6, 7):
            weight, bias = (state[f"mlp.layers.{index}.{part}"] for part in ("weight", "bias"))
            x = weight.double() @ x + bias.double()
        scores.append((x[0] - 0.16717362830052426) / 1.0333394966054072)
    return torch.stack(scores)


def test_the_score_is_blip_s(
    folder: Path, images: Tensor, prompts: list[str], state: State
) -> None:
    asked = [*prompts[:2], "a very long prompt that goes on and on until nobody reads it any more"]
    expected = oracle(images, asked, state)
    assert expected.std() > 0.1
    reward = make(folder)
    scores = reward.score(images=images, prompts=asked)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=5e-5)
    shouted = reward.score(images=images, prompts=[prompt.upper() for prompt in asked])
    assert torch.equal(shouted, scores)


def test_safetensors_and_half_precision(folder: Path, images: Tensor, prompts: list[str]) -> None:
    scores = make(folder).score(images=images, prompts=prompts)
    same = make(folder, file="ImageReward.safetensors").score(images=images, prompts=prompts)
    assert torch.equal(same, scores)
    rough = make(folder, dtype="bfloat16").score(images=images, prompts=prompts)
    assert rough.dtype == torch.float32 and not torch.equal(rough, scores)
    torch.testing.assert_close(rough, scores, rtol=0.2, atol=0.2)


def test_it_conforms_and_two_share_a_network(
    folder: Path, images: Tensor, prompts: list[str]
) -> None:
    one, two = make(folder), make(folder)
    check_reward(one)
    two.score(images=images, prompts=prompts)
    assert one._network is two._network


def test_another_layout_is_refused(
    folder: Path, images: Tensor, prompts: list[str], state: State, tmp_path: Path
) -> None:
    for broken in (
        {k: t for k, t in state.items() if not k.startswith("mlp.")},
        {**state, "extra.weight": torch.zeros(1)},
    ):
        torch.save(broken, tmp_path / "ImageReward.pt")
        with pytest.raises(ValueError, match="not an ImageReward checkpoint"):
            make(folder, model=str(tmp_path)).score(images=images, prompts=prompts)


def test_clip_pixels_are_clip_s(images: Tensor, clip_pixels: Callable[[Tensor], Tensor]) -> None:
    ours = our_clip_pixels(images, 224)
    torch.testing.assert_close(ours.double(), clip_pixels(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(40, 59), (61, 40), (33, 50)])
def test_clip_pixels_crop_like_torchvision(height: int, width: int) -> None:
    from torchvision import transforms

    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(2))
    levels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    published = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(tuple(MEAN), tuple(STD)),
        ]
    )
    torch.testing.assert_close(our_clip_pixels(image, 32)[0], published(Image.fromarray(levels)))
