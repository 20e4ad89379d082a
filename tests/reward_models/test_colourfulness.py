"""Colourfulness: numbers by hand, and numpy.

Kills, among others: absolute values of the axes (a widespread script takes them); the sample's
standard deviation instead of the population's; values of [0, 1] instead of 255.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rewards
from flowrl.testing import check_reward
from rewards.colourfulness import colourfulness


def test_numbers_by_hand() -> None:
    halves = torch.zeros(1, 3, 2, 4)
    halves[:, 0, :, :2] = 1  # half red
    halves[:, 1, :, 2:] = 1  # half green
    # rg is 255 and -255: mean 0, deviation 255. yb is 127.5 everywhere: 255 + 0.3 * 127.5.
    assert colourfulness(halves).item() == pytest.approx(293.25)
    blue = torch.zeros(1, 3, 5, 3)
    blue[:, 2] = 1
    assert colourfulness(blue).item() == pytest.approx(0.3 * 255)
    assert colourfulness(torch.full((1, 3, 8, 8), 0.3)).item() == pytest.approx(0, abs=1e-4)


def test_one_red_one_green_and_one_blue_pixel() -> None:
    pixels = torch.eye(3)[None, :, :, None]
    # rg: 255, -255, 0, variance 2 * 255^2 / 3; yb: 127.5, 127.5, -255, variance 255^2 / 2.
    expected = 255 * (2 / 3 + 1 / 2) ** 0.5
    assert colourfulness(pixels).item() == pytest.approx(expected)  # 275.4; absolute values: 206.5


def test_against_numpy() -> None:
    images = torch.rand(3, 3, 7, 11, generator=torch.Generator().manual_seed(0)) ** 2
    scores = rewards.load("colourfulness").score(images=images)
    for image, score in zip(images.numpy() * 255.0, scores, strict=True):
        red, green, blue = image
        rg, yb = red - green, 0.5 * (red + green) - blue
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert score.item() == pytest.approx(expected, rel=1e-5)


def test_it_conforms() -> None:
    check_reward(rewards.load("colourfulness"), tolerance=1e-3)
