"""Diversity: distances by hand; a tiny DINOv2 and a tiny CLIP against pixels by hand.

Kills, among others: a sample that is compared with itself; features that keep their length; patch
tokens instead of the class token; a broken image that drags the others down or gets a number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from rewards.diversity import Diversity, mean_distances

Oracle = Callable[[Path, Tensor, list[str]], tuple[Tensor, Tensor]]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
nan = float("nan")


def distances(features: np.ndarray) -> np.ndarray:
    """Mean cosine distance of each row to the others, pair by pair."""
    rows = []
    for i, one in enumerate(features):
        others = [other for j, other in enumerate(features) if j != i]
        rows.append(np.mean([1 - one @ o / np.sqrt((one @ one) * (o @ o)) for o in others]))
    return np.array(rows)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of width 32 and its processor, as published: resized above the crop."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=28,
            patch_size=14,
            layerscale_value=1.0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        resample=Image.Resampling.BICUBIC,
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(folder)
    return folder


def test_distances_by_hand() -> None:
    rows = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    # 0-1 and 1-2 are square (1), 0-2 opposite (2).
    torch.testing.assert_close(mean_distances(rows), torch.tensor([1.5, 1.0, 1.5]))
    torch.testing.assert_close(mean_distances(rows[[0, 0, 0]]), torch.zeros(3))
    broken = torch.tensor([[2.0, 0.0], [nan, 1.0], [0.0, 3.0]])
    expected = torch.tensor([1.0, nan, 1.0])
    torch.testing.assert_close(mean_distances(broken), expected, equal_nan=True)
    assert mean_distances(rows[:1]).isnan().all()


def test_distances_never_leave_their_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for num in range(2, 40):
        same = torch.rand(1, 300, generator=generator).expand(num, -1)
        assert mean_distances(same).min() >= 0
        assert mean_distances(torch.cat([same[:1], -same[:1]])).max() <= 2


def test_dino_s_class_token(dino: Path, images: Tensor) -> None:
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(dino)
    features = []
    for image in images:
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        resized = Image.fromarray(levels).resize((48, 32), Image.Resampling.BICUBIC)
        crop = (np.asarray(resized)[2:30, 10:38] / 255 - MEAN) / STD
        with torch.no_grad():
            pixels = torch.from_numpy(crop).float().permute(2, 0, 1)[None]
            features.append(model(pixels).last_hidden_state[0, 0].double().numpy())
    expected = distances(np.stack(features))
    assert expected.std() > 0.01
    reward = rewards.load("diversity", model=str(dino), batch_size=2)
    assert isinstance(reward, Diversity) and reward.scope == "group"
    scores = reward.score(images=images, prompts=["same"] * 3)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_clip_s_embedding(clip_folder: Path, images: Tensor, clip_embeddings: Oracle) -> None:
    embeddings, _ = clip_embeddings(clip_folder, images, ["x"] * 3)
    reward = rewards.load("diversity", features="clip", model=str(clip_folder))
    scores = reward.score(images=images, prompts=["same"] * 3)
    np.testing.assert_allclose(scores.numpy(), distances(embeddings.numpy()), rtol=1e-3, atol=1e-5)


def test_it_conforms(dino: Path) -> None:
    check_reward(rewards.load("diversity", model=str(dino)))


def test_one_alone_has_no_distance_and_needs_no_network(images: Tensor) -> None:
    reward = rewards.load("diversity", model="nobody/nothing")
    assert reward.score(images=images[:1], prompts=["x"]).isnan().all()
    broken = images.clone()
    broken[1:] = nan
    assert reward.score(images=broken, prompts=["x"] * 3).isnan().all()


def test_what_does_not_fit_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="dino, clip, got 'lpips'"):
        Diversity(features="lpips")
    with pytest.raises(ValueError, match=r"of one prompt, got 2: 'a', 'b'.*once per group"):
        Diversity().score(images=images, prompts=["a", "b", "a"])
    assert Diversity().model == "facebook/dinov2-base"
    assert Diversity(features="clip").model == "openai/clip-vit-large-patch14"
