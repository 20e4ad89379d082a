"""VideoReward on a tiny checkpoint of the published layout: peft, patches and forward by hand.

Kills, among others: a LoRA that is left out, or scaled by another alpha; another instruction; other
frames, or another size; patches that mix frames and rows; a mean or deviation of a neighbour; two
tokens that are swapped; weights that do not weigh.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewards
from rewards.qwen2_vl_reward import patches
from rewards.video_align import VideoAlign, frame_indices
from rewards.video_align_prompt import INSTRUCTION, TOKENS
from tests.reward_models.tiny_qwen2_vl import (
    NUM_TOKENS,
    hidden,
    make_source,
    published_name,
    write_base,
)

PROMPTS = ["a cube that {turns}", "x"]
MEAN = {"vq": 3.6757, "mq": 1.1646, "ta": 2.8105}
STD = {"vq": 2.2476, "mq": 1.3811, "ta": 2.5121}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def source(base: Path) -> Any:
    """A network with a head and, by peft, a LoRA on the linear layers of its text model."""
    from peft import LoraConfig, get_peft_model

    model = make_source(base, NUM_TOKENS + 3)
    torch.manual_seed(1)
    model.rm_head = nn.Linear(32, 1, bias=False)
    layers = r"model\.language_model\.layers\..*proj"
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=128, target_modules=layers))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
        model.rm_head.weight.mul_(20)
    return wrapped.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, source: Any) -> Path:
    prefix = "base_model.model."
    tensors = {
        prefix + published_name(name.removeprefix(prefix)): tensor
        for name, tensor in source.state_dict().items()
    }
    layer = prefix + "model.layers.0.self_attn.q_proj."
    assert {layer + "base_layer.weight", layer + "lora_A.default.weight",
            prefix + "visual.patch_embed.proj.weight", prefix + "rm_head.weight",
            prefix + "lm_head.weight"} <= set(tensors)  # fmt: skip
    folder = tmp_path_factory.mktemp("video") / "checkpoint-11352"
    folder.mkdir()
    torch.save(tensors, folder / "model.pth")
    return folder.parent


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """Two clips of 25 frames that differ, of a size that is kept: resizing has its own test."""
    coarse = torch.rand(2 * 25, 3, 2, 3, generator=torch.Generator().manual_seed(3))
    fine = torch.nn.functional.interpolate(coarse, size=(280, 420), mode="bilinear")
    return fine.unflatten(0, (2, 25))


def make(checkpoint: Path, base: Path, **args: Any) -> VideoAlign:
    given = {"model": str(checkpoint), "base": str(base), "dtype": "float32", "fps": 12, **args}
    reward = rewards.load("video_align", **given)
    assert isinstance(reward, VideoAlign)
    return reward


def patches_by_hand(frames: Tensor) -> Tensor:
    """Patches of two frames of 14 x 14, four to a token, one value after the other."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = (frames / 255 - mean) / std
    rows = []
    for time in range(0, len(frames), 2):
        for top in range(0, frames.shape[2], 28):
            for left in range(0, frames.shape[3], 28):
                for down in (0, 14):
                    for right in (0, 14):
                        y, x = top + down, left + right
                        patch = pixels[time : time + 2, :, y : y + 14, x : x + 14]
                        rows.append(patch.transpose(0, 1).flatten())
    return torch.stack(rows)


def expected_parts(source: Any, base: Path, clip: Tensor, prompt: str) -> dict[str, float]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    # 25 frames at 12 per second: 25 / 12 * 2 = 4.17, so 4, of 0 to 24.
    frames = (clip[[0, 8, 16, 24]] * 255).round()
    pixels = patches_by_hand(frames)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|video_pad|>" * (len(pixels) // 4) + "<|vision_end|>"
        + INSTRUCTION.replace("{prompt}", prompt) + "<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    inner = source.base_model.model
    states = hidden(inner, ids, pixels, torch.tensor([[2, 20, 30]]), 263)
    parts = {}
    for offset, name in enumerate(MEAN):
        (place,) = (ids == NUM_TOKENS + offset).nonzero().flatten().tolist()
        raw = float(inner.rm_head.weight[0].double() @ states[place])
        parts[name] = (raw - MEAN[name]) / STD[name]
    return parts


def test_the_instruction_is_the_published_one() -> None:
    digest = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert (len(INSTRUCTION), digest[:16]) == (3992, "fd7862ecb43bbe39")


def test_scores_of_the_three_qualities(
    checkpoint: Path, base: Path, source: Any, clips: Tensor
) -> None:
    expected = [
        expected_parts(source, base, clip, prompt)
        for clip, prompt in zip(clips, PROMPTS, strict=True)
    ]
    out = make(checkpoint, base).score(videos=clips, prompts=PROMPTS)
    assert set(out) == {"score", "vq", "mq", "ta"}
    for name in MEAN:
        values = [parts[name] for parts in expected]
        assert out[name].dtype == torch.float32
        assert out[name].tolist() == pytest.approx(values, rel=2e-3, abs=2e-3)
    sums = [sum(parts.values()) for parts in expected]
    assert out["score"].tolist() == pytest.approx(sums, rel=2e-3, abs=5e-3)
    assert min(abs(a - b) for a, b in zip(*(p.values() for p in expected), strict=True)) > 0.01
    weighed = make(checkpoint, base, weights={"mq": 2, "ta": -1}, batch_size=1)
    other = weighed.score(videos=clips, prompts=PROMPTS)
    torch.testing.assert_close(other["score"], 2 * out["mq"] - out["ta"], atol=5e-3, rtol=2e-3)


def test_what_cannot_be_scored_is_nan(checkpoint: Path, base: Path, clips: Tensor) -> None:
    broken = clips[:, :4].clone()
    broken[0, 1, 0, 0, 0] = torch.nan
    reward = make(checkpoint, base, fps=None)
    out = reward.score(videos=broken, prompts=["x", "<|TA_reward|>"])
    assert all(out[name].isnan().all() for name in out)
    out = reward.score(videos=broken, prompts=["x", "x"])
    assert out["score"].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("num", "fps", "expected"),
    [
        (25, 12, [0, 8, 16, 24]),
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (5, 16, [0, 1, 3, 4]),
        (3, 16, [0, 2]),
        (2, 16, [0, 1]),
        (6, None, [0, 1, 2, 3, 4, 5]),
        (7, None, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_which_frames_are_seen(num: int, fps: float | None, expected: list[int]) -> None:
    # 81 at 16 per second: 10.1, so 10, every 80 / 9 = 8.89 frames.
    assert frame_indices(num, fps) == expected


def test_patches_of_an_odd_clip_repeat_the_last_frame() -> None:
    frames = torch.randint(256, (3, 3, 28, 56), dtype=torch.uint8)
    pixels, grid = patches(frames)
    assert grid == (2, 2, 4)
    torch.testing.assert_close(pixels, patches_by_hand(torch.cat([frames, frames[-1:]]).float()))


def test_clips_are_brought_to_their_size() -> None:
    """Both bounds, 128 to 256 tokens a frame, and the published code's resizing of 8 bit."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    from rewards.video_align import _resized

    for given, size in (((64, 96), (280, 392)), ((720, 1280), (336, 588))):
        # 64 x 96: sqrt(100352 / 6144) = 4.04; 258.6 and 388.0, up.
        # 720 x 1280: sqrt(921600 / 200704) = 960 / 448; 336 exactly and 597.3, down.
        clip = torch.rand(2, 3, *given)
        levels = (clip * 255).round().to(torch.uint8)
        expected = resize(levels, list(size), InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(_resized(clip), expected.float())


def test_what_does_not_fit_is_refused() -> None:
    one = torch.zeros(1, 4, 3, 28, 28)
    with pytest.raises(ValueError, match="weights are of vq, mq, ta; got"):
        VideoAlign(weights={"motion": 1})
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        VideoAlign(fps=0)
    with pytest.raises(ValueError, match=r"\[B, F, 3, H, W\] in \[0, 1\], got .* \[4, 3, 28, 28\]"):
        VideoAlign().score(videos=one[0], prompts=["x"])
    with pytest.raises(ValueError, match="1 videos and 2 prompts"):
        VideoAlign().score(videos=one, prompts=["x", "y"])
    with pytest.raises(ValueError, match="two frames or more"):
        VideoAlign().score(videos=one[:, :1], prompts=["x"])
