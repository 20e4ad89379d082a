"""CLIPScore in both variants, and one network for several rewards.

Kills, among others: a prefix that is forgotten, doubled or kept for torchmetrics; a floor at the
wrong place; a weight of the other variant; a network that is loaded once per reward, kept when
nobody needs it, or shared between two dtypes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from rewards import backbones
from rewards.clip_score import ClipScore
from rewards.pickscore import PickScore

Oracle = Callable[[Path, Tensor, list[str]], tuple[Tensor, Tensor]]


def cosines(oracle: Oracle, folder: Path, images: Tensor, prompts: list[str]) -> Tensor:
    image, text = oracle(folder, images, prompts)
    return (image * text).sum(1) / image.square().sum(1).sqrt() / text.square().sum(1).sqrt()


@pytest.fixture(scope="module")
def signed(
    clip_folder: Path, images: Tensor, prompts: list[str], clip_embeddings: Oracle
) -> tuple[Tensor, list[str]]:
    """The images with prompts of which some agree with them and some do not."""
    chosen = []
    words = ["a photo of it", "qqqq", "blue", "7 7 7", "no!", "zebra", *prompts]
    for index, wanted in enumerate((1, -1, 1)):
        for word in words:
            prefixed = ["A photo depicts " + word]
            cosine = cosines(clip_embeddings, clip_folder, images[index : index + 1], prefixed)
            if cosine.item() * wanted > 0.02:
                chosen.append(word)
                break
    assert len(chosen) == 3
    return images, chosen


def test_the_paper_s_score(
    clip_folder: Path, signed: tuple[Tensor, list[str]], clip_embeddings: Oracle
) -> None:
    images, prompts = signed
    prefixed = ["A photo depicts " + prompt for prompt in prompts]
    cosine = cosines(clip_embeddings, clip_folder, images, prefixed)
    assert cosine[1] < 0 < cosine[0]
    reward = rewards.load("clip_score", model=str(clip_folder))
    scores = reward.score(images=images, prompts=prompts)
    torch.testing.assert_close(scores.double(), 2.5 * cosine.clamp(min=0), rtol=1e-5, atol=1e-6)
    assert scores[1] == 0 and reward.range == (0, 2.5)
    bare = ClipScore(model=str(clip_folder), prefix="").score(images=images, prompts=prefixed)
    torch.testing.assert_close(bare, scores)


def test_torchmetrics_score(
    clip_folder: Path, images: Tensor, prompts: list[str], clip_embeddings: Oracle
) -> None:
    cosine = cosines(clip_embeddings, clip_folder, images, prompts)
    assert cosine.min() < 0
    reward = ClipScore(model=str(clip_folder), variant="torchmetrics")
    scores = reward.score(images=images, prompts=prompts)
    torch.testing.assert_close(scores.double(), 100 * cosine, rtol=1e-5, atol=1e-4)
    assert reward.range == (-100, 100)


def test_it_conforms(clip_folder: Path) -> None:
    check_reward(ClipScore(model=str(clip_folder), variant="torchmetrics"), tolerance=1e-3)
    check_reward(ClipScore(model=str(clip_folder), batch_size=2))


def test_a_broken_image_is_not_shown_to_the_network(
    clip_folder: Path, images: Tensor, prompts: list[str]
) -> None:
    reward = ClipScore(model=str(clip_folder), variant="torchmetrics", batch_size=2)
    whole = reward.score(images=images, prompts=prompts)
    broken = images.clone()
    broken[0, 1, 5, 5] = torch.inf
    scores = reward.score(images=broken, prompts=prompts)
    assert scores[0].isnan()
    torch.testing.assert_close(scores[1:], whole[1:], rtol=1e-5, atol=1e-4)
    assert reward.score(images=images[:0], prompts=[]).shape == (0,)


def test_rewards_of_one_network_share_it_while_they_live(
    clip_folder: Path, images: Tensor, prompts: list[str]
) -> None:
    source = str(clip_folder)
    gc.collect()
    before = len(backbones._LOADED)
    one = ClipScore(model=source)
    other = PickScore(model=source, processor=source, device="cpu")
    for reward in (one, other):
        reward.score(images=images, prompts=prompts)
    assert one._clip.model is other._clip.model
    assert one._clip.processor is other._clip.processor
    half = ClipScore(model=source, dtype="bfloat16")
    half.score(images=images, prompts=prompts)
    assert half._clip.model is not one._clip.model
    assert one._clip.model.dtype == torch.float32
    assert len(backbones._LOADED) > before
    del one, other, half, reward
    gc.collect()
    assert len(backbones._LOADED) == before


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="paper, torchmetrics, got 'hessel'"):
        ClipScore(variant="hessel")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        rewards.load("clip_score", batch_size=0)
