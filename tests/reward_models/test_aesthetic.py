"""LAION's aesthetic predictor on a tiny CLIP and a tiny head in the published file format.

Kills, among others: an embedding that keeps its length; an activation between the layers (the
published head has none); layers in the order of their names as text; a pickle that is executed; a
head for another CLIP that is broadcast into a score; a second copy of the CLIP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from rewards.aesthetic import Aesthetic
from rewards.clip_score import ClipScore
from rewards.heads import linear_head

Oracle = Callable[[Path, Tensor, list[str]], tuple[Tensor, Tensor]]


def tensors(width: int = 16) -> OrderedDict[str, Tensor]:
    """A head's weights, named as published: an nn.Sequential with dropout after three layers."""
    generator = torch.Generator().manual_seed(3)
    sizes = [width, 32, 12, 8, 4, 1]
    found = OrderedDict()
    for index, (low, high) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        found[f"layers.{index}.weight"] = torch.randn(high, low, generator=generator)
        found[f"layers.{index}.bias"] = torch.randn(high, generator=generator)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "aesthetic-model.pth"
    torch.save(tensors(), path)
    return path


def make(clip_folder: Path, predictor: Path, **args: object) -> Aesthetic:
    reward = rewards.load("aesthetic", model=str(clip_folder), predictor=str(predictor), **args)
    assert isinstance(reward, Aesthetic)
    return reward


def test_the_score_is_the_head_of_the_unit_embedding(
    clip_folder: Path, images: Tensor, clip_embeddings: Oracle, file: Path
) -> None:
    embeddings, _ = clip_embeddings(clip_folder, images, ["x"] * 3)
    values = embeddings.numpy()
    values = values / np.sqrt((values**2).sum(1, keepdims=True))
    for index in (0, 2, 4, 6, 7):
        weight, bias = (tensors()[f"layers.{index}.{part}"].numpy() for part in ("weight", "bias"))
        values = values @ weight.T.astype(np.float64) + bias
    assert values.std() > 1
    scores = make(clip_folder, file).score(images=images)
    assert scores.dtype == torch.float32 and scores.shape == (3,)
    np.testing.assert_allclose(scores.numpy(), values[:, 0], rtol=1e-4, atol=1e-4)


def test_file_folder_and_safetensors_are_the_same(
    clip_folder: Path, images: Tensor, file: Path, tmp_path: Path
) -> None:
    save_file(tensors(), tmp_path / "predictor.safetensors")
    scores = [
        make(clip_folder, source, **args).score(images=images)
        for source, args in [
            (file, {}),
            (file.parent, {}),
            (tmp_path, {"file": "predictor.safetensors"}),
        ]
    ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_it_conforms_and_shares_its_clip(clip_folder: Path, images: Tensor, file: Path) -> None:
    reward, other = make(clip_folder, file), ClipScore(model=str(clip_folder))
    check_reward(reward, tolerance=1e-3)
    other.score(images=images[:1], prompts=["x"])
    assert reward._clip.model is other._clip.model


def test_what_is_no_predictor_is_refused(
    clip_folder: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (tmp_path / "ran").touch, ()

    def refused(contents: object, error: type[Exception], match: str) -> None:
        path = tmp_path / "head.pth"
        torch.save(contents, path)
        with pytest.raises(error, match=match):
            make(clip_folder, path).score(images=images)

    refused({"layers.0.weight": Trap()}, OSError, "more than tensors")
    assert not (tmp_path / "ran").exists()
    refused(tensors(20), ValueError, "reads embeddings of 20 numbers, but .* gives 16")
    refused({"weight": torch.zeros(1, 16)}, ValueError, "does not hold a scoring head")
    with pytest.raises(OSError, match=r"folder without 'aesthetic-model.pth'"):
        make(clip_folder, tmp_path).score(images=images)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = rewards.load("aesthetic", model=str(clip_folder), predictor="nobody/no-such-head")
    with pytest.raises(OSError, match=r"hf download nobody/no-such-head aesthetic-model\.pth"):
        missing.score(images=images)


@pytest.mark.parametrize(
    "broken",
    [
        {"layers.0.weight": torch.zeros(1, 4)},  # no bias
        {"layers.0.weight": torch.zeros(2, 4), "layers.0.bias": torch.zeros(2)},  # two numbers
        {
            "layers.0.weight": torch.zeros(3, 4),
            "layers.0.bias": torch.zeros(3),
            "layers.1.weight": torch.zeros(1, 4),
            "layers.1.bias": torch.zeros(1),
        },
        {},
    ],
)
def test_layers_that_do_not_follow_each_other_are_refused(broken: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"head\.pth does not hold a scoring head"):
        linear_head(broken, source="head.pth")


def test_ten_layers_keep_their_order() -> None:
    named = {}
    for index in range(11):  # as text, layers.10 comes before layers.2
        named[f"layers.{index}.weight"] = torch.full((1, 1), 2.0 if index == 2 else 1.0)
        named[f"layers.{index}.bias"] = torch.full((1,), 1.0 if index == 10 else 0.0)
    named["layers.10.weight"] *= 10
    head = linear_head(dict(reversed(named.items())), source="x")
    assert head(torch.tensor([3.0])).item() == 61  # 3 * 2 * 10 + 1, and not (3 * 10 + 1) * 2 = 62
