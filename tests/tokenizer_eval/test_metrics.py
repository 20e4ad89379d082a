"""Distortion against numbers by hand and against scikit-image; Frechet distance of Gaussians.

Kills, among others: an SSIM window of another width, or one that wraps; a PSNR of the mean error
instead of the images' own; an interval of the plain quantiles.
"""

import math

import pytest
import torch
from skimage.metrics import structural_similarity

from flowrl.errors import ShapeError
from flowrl.tokenizer.evaluation.distances import frechet
from flowrl.tokenizer.evaluation.metrics import (
    mean_interval,
    mse,
    psnr,
    share_interval,
    ssim,
    statistic_interval,
)


def test_psnr_by_hand():
    """An error of 0.1 everywhere: mse 0.01, 20 dB. 0.5 in half of the values: 0.125, 9.0309 dB."""
    originals = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    images = originals.clone()
    images[0] += 0.1
    images[1, :, :2] += 0.5
    assert mse(images, originals).tolist() == pytest.approx([0.01, 0.125, 0])
    assert psnr(images, originals).tolist() == pytest.approx([20.0, 10 * math.log10(8), 100.0])


def test_ssim_is_scikit_images():
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(4, 3, 17, 24, generator=generator, dtype=torch.float64)
    noise = torch.rand(originals.shape, generator=generator, dtype=torch.float64)
    amount = torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    images = (1 - amount) * originals + amount * noise
    expected = [
        structural_similarity(a.numpy(), b.numpy(), data_range=1.0, channel_axis=0,
                              gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for a, b in zip(images, originals, strict=True)
    ]  # fmt: skip
    assert ssim(images, originals).tolist() == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(1) and expected[3] < 0.1


def test_ssim_of_two_flat_images_by_hand():
    """Without variance only luminance counts: (2 * 0.2 * 0.4 + c1) / (0.04 + 0.16 + c1)."""
    images, originals = torch.full((1, 3, 11, 11), 0.2), torch.full((1, 3, 11, 11), 0.4)
    expected = (0.16 + 1e-4) / (0.2 + 1e-4)
    assert float(ssim(images.double(), originals.double())) == pytest.approx(expected, abs=1e-6)


def test_clips_are_measured_over_their_frames():
    generator = torch.Generator().manual_seed(0)
    originals, images = torch.rand(2, 2, 3, 3, 12, 12, generator=generator)
    frames = ssim(images.flatten(0, 1), originals.flatten(0, 1)).view(2, 3)
    assert ssim(images, originals).tolist() == pytest.approx(frames.mean(1).tolist(), abs=1e-6)
    assert mse(images, originals).shape == (2,)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="two equal shapes"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ShapeError, match="11 x 11 or more"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    """Of 200 samples of 50 normal numbers about 95 % of the intervals hold 0; 3 sd are 4.6 %."""
    drawn = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    found = [mean_interval(each, num=400) for each in drawn]
    assert 0.88 <= sum(each.low <= 0 <= each.high for each in found) / 200 <= 0.99
    assert found[0] == mean_interval(drawn[0], num=400)


def test_the_interval_of_a_share_by_hand():
    """8 of 10, Wilson with z = 1.96: centre 0.7168, half 0.2265. All of 10: from 0.7225 to 1."""
    some = share_interval(torch.tensor([True] * 8 + [False] * 2))
    assert (some.mean, some.low, some.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    every = share_interval(torch.ones(10, dtype=torch.bool))
    assert (every.mean, every.low, every.high) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)


def test_the_frechet_distance_of_equal_sets_is_zero():
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert frechet(rows, rows)["mean"] < 1e-9
    assert frechet(rows, rows.flip(0))["mean"] < 1e-9


def test_the_frechet_distance_of_two_gaussians_by_hand():
    """Means 3 apart; variances 4 and 1 in one of two independent axes, 1 and 1 in the other.

    |m|^2 + sum (s_a - s_b)^2 = 9 + (2 - 1)^2 + 0 = 10. The rows have these moments exactly.
    """
    corner = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    corner = corner * math.sqrt(3 / 4)  # variance 1 over N - 1
    wide = corner * torch.tensor([2.0, 1.0]) + torch.tensor([3.0, 0.0])
    assert frechet(wide, corner, resamples=2)["mean"] == pytest.approx(10.0)


def test_the_interval_of_a_frechet_distance_reflects_the_bias_of_resampling():
    """Resampled rows lie farther apart than all rows do: plain quantiles would miss the value."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 60, 8, generator=generator)
    found = frechet(first, second, resamples=60)
    assert found["low"] <= found["mean"]
    assert found["high"] - found["mean"] < found["mean"]
    constant = statistic_interval(lambda index: 2.0, 10, num=5)
    assert (constant.mean, constant.low, constant.high) == (2.0, 2.0, 2.0)


def test_the_bootstrap_of_clips_resamples_clips():
    """Frames of a clip are alike: as single samples they would make the interval too narrow."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(40, 1, 3, generator=generator)
    first, second = (each.expand(-1, 16, -1).flatten(0, 1) for each in (clips, clips * 1.5 + 0.5))
    once = frechet(clips[:, 0], clips[:, 0] * 1.5 + 0.5, resamples=60)
    found = frechet(first, second, frames=16, resamples=60)
    frames = frechet(first, second, resamples=60)
    assert found["mean"] == pytest.approx(frames["mean"])
    width, of_clips, of_frames = (each["high"] - each["low"] for each in (once, found, frames))
    assert of_clips == pytest.approx(width, rel=0.1) and of_frames < 0.5 * of_clips


def test_wide_features_get_no_interval():
    rows = torch.randn(6, 129, generator=torch.Generator().manual_seed(0))
    assert frechet(rows, rows + 1) == {"mean": pytest.approx(129, rel=1e-4),
                                       "low": None, "high": None}  # fmt: skip
