"""DDPO's two JPEG rewards: minus and plus the file's size in kB at quality 95."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import rewards
from flowrl.testing import check_reward


def test_the_score_is_the_size_of_the_file_in_kb(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (2, 3, 40, 56), generator=generator)
    levels[1] = 200  # flat: next to nothing is left of it
    # A third of a level off the grid: cutting instead of rounding would give other pixels.
    images = ((levels - 1 / 3) / 255).clamp(0, 1)
    sizes = []
    for each in levels:
        Image.fromarray(each.permute(1, 2, 0).to(torch.uint8).numpy()).save(
            tmp_path / "image.jpg", quality=95
        )
        sizes.append((tmp_path / "image.jpg").stat().st_size / 1000)
    large = rewards.load("jpeg_incompressibility")
    small = rewards.load("jpeg_compressibility")
    assert large.score(images=images).tolist() == pytest.approx(sizes)
    assert small.score(images=images).tolist() == pytest.approx([-size for size in sizes])
    assert sizes[0] > 3 * sizes[1] > 0
    assert large.range == (0, float("inf")) and small.range == (-float("inf"), 0)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="expected float images"):
        rewards.load("jpeg_compressibility").score(images=torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize("name", ["jpeg_compressibility", "jpeg_incompressibility"])
def test_it_conforms_so_an_image_of_nan_has_no_size(name: str) -> None:
    check_reward(rewards.load(name))
