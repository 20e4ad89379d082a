"""HPSv2 on a tiny CLIP of open_clip, saved like the published checkpoint, against plain torch.

Kills, among others: a crop instead of black bars, or bars at one side only; smoothing before the
resize, or the corner-aligned one; bars in CLIP's mean colour; a score times the logit scale; quick
GELU; text taken at the last instead of the end token; fp16 weights that stay fp16.
"""

from __future__ import annotations

import json
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
from rewards.hps_v2 import HpsV2, fit_square

open_clip = pytest.importorskip("open_clip")

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073), dtype=torch.float64)[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711), dtype=torch.float64)[:, None, None]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture as open_clip writes it, and the checkpoint as its authors did: half."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    save_file(state, folder / "hps.safetensors")
    return folder


def make(folder: Path, **args: object) -> HpsV2:
    architecture = f"local-dir:{folder}"
    reward = rewards.load("hps_v2", model=str(folder), architecture=architecture, **args)
    assert isinstance(reward, HpsV2)
    return reward


def cubic(values: np.ndarray, num: int) -> np.ndarray:
    """Bicubic along the first axis by definition: Keys' kernel, a = -0.75, edges repeated."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x, a = np.abs(x), -0.75
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.where(x <= 1, near, np.where(x < 2, far, 0))

    centres = (np.arange(num) + 0.5) * len(values) / num - 0.5
    first = np.floor(centres).astype(int)
    result = np.zeros((num, *values.shape[1:]))
    for offset in range(-1, 3):
        weight = kernel(centres - (first + offset))
        rows = values[np.clip(first + offset, 0, len(values) - 1)]
        result += weight[:, None, None] * rows
    return result


def fitted(image: Tensor) -> Tensor:
    """An image of 96 x 144 in 32 x 32: 21 rows, 5 black ones above and 6 below."""
    levels = np.rint(image.permute(1, 2, 0).numpy().astype(np.float64) * 255) / 255
    rows = cubic(levels, 21)
    wide = cubic(rows.transpose(1, 0, 2), 32).transpose(1, 0, 2)
    square = np.zeros((32, 32, 3))
    square[5:26] = wide
    return torch.from_numpy(square).permute(2, 0, 1)


def blocks(x: Tensor, state: dict[str, Tensor], prefix: str, mask: Tensor | None) -> Tensor:
    """Two pre-norm transformer blocks of two heads on [S, D]."""
    for index in range(2):
        name = f"{prefix}.resblocks.{index}."
        w = {key[len(name) :]: tensor for key, tensor in state.items() if key.startswith(name)}
        h = F.layer_norm(x, x.shape[1:], w["ln_1.weight"], w["ln_1.bias"])
        q, k, v = (h @ w["attn.in_proj_weight"].T + w["attn.in_proj_bias"]).chunk(3, dim=1)
        heads = []
        for part in (slice(0, 16), slice(16, 32)):
            scores = q[:, part] @ k[:, part].T / 4
            if mask is not None:
                scores = scores + mask
            heads.append(scores.softmax(1) @ v[:, part])
        x = x + torch.cat(heads, 1) @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
        h = F.layer_norm(x, x.shape[1:], w["ln_2.weight"], w["ln_2.bias"])
        h = h @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        x = x + h @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
    return x


def oracle(folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    state = torch.load(folder / "HPS_v2.1_compressed.pt")["state_dict"]
    state = {name: tensor.double() for name, tensor in state.items()}
    causal = torch.full((77, 77), -torch.inf, dtype=torch.float64).triu(1)
    scores = []
    for image, ids in zip(images, open_clip.tokenize(prompts), strict=True):
        pixels = (fitted(image) - MEAN) / STD
        patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
        x = patches @ state["visual.conv1.weight"].flatten(1).T
        x = torch.cat([state["visual.class_embedding"][None], x])
        x = x + state["visual.positional_embedding"]
        x = F.layer_norm(x, (32,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
        x = blocks(x, state, "visual.transformer", None)[0]
        x = F.layer_norm(x, (32,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
        seen = x @ state["visual.proj"]
        y = state["token_embedding.weight"][ids] + state["positional_embedding"]
        y = blocks(y, state, "transformer", causal)
        y = F.layer_norm(y, (32,), state["ln_final.weight"], state["ln_final.bias"])
        read = y[ids.tolist().index(49407)] @ state["text_projection"]
        scores.append(seen @ read / seen.norm() / read.norm())
    return torch.stack(scores)


def test_the_score_is_the_cosine_of_the_bordered_image(
    folder: Path, images: Tensor, prompts: list[str]
) -> None:
    expected = oracle(folder, images, prompts)
    assert expected.std() > 0.05
    scores = make(folder).score(images=images, prompts=prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_safetensors_of_the_same_layout(folder: Path, images: Tensor, prompts: list[str]) -> None:
    given = {"images": images, "prompts": prompts}
    scores = make(folder, file="hps.safetensors").score(**given)
    assert torch.equal(scores, make(folder).score(**given))
    smooth = make(folder, antialias=True).score(**given)
    assert (smooth - scores).abs().max() > 1e-4
    rough = make(folder, dtype="bfloat16").score(**given)
    torch.testing.assert_close(rough, scores, rtol=0.1, atol=0.05)
    assert not torch.equal(rough, scores)


def test_it_conforms(folder: Path) -> None:
    check_reward(make(folder))


def test_fit_square_smooths_like_pil_and_centres() -> None:
    image = torch.rand(1, 3, 50, 20, generator=torch.Generator().manual_seed(0))
    square = fit_square(image, 25, antialias=True)[0]
    assert square.shape == (3, 25, 25)
    assert not square[:, :, :7].any() and not square[:, :, 17:].any()  # 10 columns of 25, 7 + 8
    for channel in range(3):
        grey = Image.fromarray(image[0, channel].numpy(), mode="F")
        expected = np.asarray(grey.resize((10, 25), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(square[channel, :, 7:17].numpy(), expected, atol=2e-5)
    small = torch.rand(1, 3, 25, 25, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fit_square(small, 25, antialias=False), small)


def test_what_does_not_fit_is_refused(folder: Path, images: Tensor, prompts: list[str]) -> None:
    given = {"images": images, "prompts": prompts}
    with pytest.raises(ValueError, match="'ViT-Z' is not one of open_clip's"):
        HpsV2(model=str(folder), architecture="ViT-Z").score(**given)
    wrong = folder / "wrong.pt"
    torch.save({"state_dict": {"visual.proj": torch.zeros(3, 3)}}, wrong)
    with pytest.raises(ValueError, match=r"wrong.pt is not one of local-dir"):
        make(folder, file="wrong.pt").score(**given)
