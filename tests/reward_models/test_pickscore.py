"""PickScore on a tiny random CLIP in the published folder format, against plain PIL and torch.

Kills, among others: float images divided by 255 twice; images cut instead of rounded to 8 bit; a
softmax or a product without the norms; a logit_scale that is not exponentiated; scores that
depend on the batch around them; a broken image that gets a number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from rewards.pickscore import PickScore

Oracle = Callable[[Path, Tensor, list[str]], tuple[Tensor, Tensor]]


def make(folder: Path, **args: object) -> PickScore:
    reward = rewards.load("pickscore", model=str(folder), processor=str(folder), **args)
    assert isinstance(reward, PickScore)
    return reward


def test_the_score_is_the_scaled_cosine_over_26(
    clip_folder: Path, images: Tensor, prompts: list[str], clip_embeddings: Oracle
) -> None:
    image, text = clip_embeddings(clip_folder, images, prompts)
    cosine = (image * text).sum(1) / image.square().sum(1).sqrt() / text.square().sum(1).sqrt()
    expected = np.exp(3.0) * cosine
    assert expected.std() > 0.5  # or anything would agree
    scores = make(clip_folder).score(images=images, prompts=prompts)
    assert scores.dtype == torch.float32 and scores.shape == (3,)
    torch.testing.assert_close(scores.double(), expected / 26, rtol=1e-5, atol=1e-6)
    raw = make(clip_folder, normalize=False).score(images=images, prompts=prompts)
    torch.testing.assert_close(raw, 26 * scores)


def test_a_score_does_not_depend_on_the_batch_around_it(
    clip_folder: Path, images: Tensor, prompts: list[str]
) -> None:
    reward = make(clip_folder)
    together = reward.score(images=images, prompts=prompts)
    chunked = make(clip_folder, batch_size=2).score(images=images, prompts=prompts)
    torch.testing.assert_close(chunked, together, rtol=1e-5, atol=1e-6)
    alone = reward.score(images=images[1:2], prompts=prompts[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-6)


def test_it_conforms(clip_folder: Path) -> None:
    check_reward(make(clip_folder))


def test_a_long_prompt_is_cut_to_77_tokens(clip_folder: Path, images: Tensor) -> None:
    reward = make(clip_folder)
    # With start and end, 75 letters are left: 74 z and the first of the ending.
    scores = [
        reward.score(images=images[:1], prompts=["z" * 74 + ending]).item()
        for ending in ("a" * 2, "a" * 500, "ba")
    ]
    assert scores[0] == scores[1] != scores[2]


def test_half_precision_stays_near(clip_folder: Path, images: Tensor, prompts: list[str]) -> None:
    exact = make(clip_folder).score(images=images, prompts=prompts)
    rough = make(clip_folder, dtype="bfloat16").score(images=images, prompts=prompts)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.05)


def test_nothing_is_loaded_before_the_first_score_and_missing_weights_name_the_remedy(
    clip_folder: Path,
    images: Tensor,
    prompts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for argument in ("model", "processor"):
        for source in ("nobody/no-such-clip", str(tmp_path)):
            args = {"model": str(clip_folder), "processor": str(clip_folder), argument: source}
            reward = rewards.load("pickscore", **args)
            with pytest.raises(OSError, match=f"PickScore's {argument} '{source}'") as caught:
                reward.score(images=images, prompts=prompts)
            assert f"hf download {source}" in str(caught.value)
            assert f"argument '{argument}'" in str(caught.value)


def test_bad_arguments_and_inputs_are_refused(images: Tensor, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'fp16'"):
        PickScore(dtype="fp16")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PickScore(batch_size=0)
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        PickScore().score(images=images, prompts=prompts[:2])
    with pytest.raises(ValueError, match="expected float images"):
        PickScore().score(images=(images * 255).to(torch.uint8), prompts=prompts)
