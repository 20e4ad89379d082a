"""Weights of sampler steps: the papers' constants, and a mean of exactly 1 where trained.

Kills, among others: a mean over all steps, g for g * sqrt(-dt), a factor 2 in lambda.
"""

import pytest
import torch

from flowrl.functional.weights import inverse_dt, inverse_sensitivity, mean_one, noise_aware
from flowrl.methods.flow import flow_grpo
from flowrl.methods.spec import transition_scales

# diffusers' schedule of SD3.5 with shift 3 and 10 steps.
SD3 = torch.tensor(
    [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0],
    dtype=torch.float64,
)
TRAINED = range(9)


def test_noise_aware_weights_are_the_codes_2_25_times_std() -> None:
    _, std = transition_scales(flow_grpo().plan(0), SD3)
    weights = noise_aware(std, TRAINED)
    assert weights[:9].mean().item() == pytest.approx(1)
    torch.testing.assert_close(weights, 2.2522 * std, rtol=2e-4, atol=0)


def test_sensitivity_is_flash_grpos_lambda() -> None:
    slope, std = transition_scales(flow_grpo().plan(0), SD3)
    sigma, delta = SD3[1:-1], SD3[1:-1] - SD3[2:]
    g = 0.7 * torch.sqrt(sigma / (1 - sigma))
    by_hand = delta.sqrt() / g + g * delta.sqrt() * (1 - sigma) / (2 * sigma)
    torch.testing.assert_close((slope.abs() / std)[1:], by_hand)
    weights = inverse_sensitivity(slope, std, (1, 2, 3))
    expected = (1 / by_hand) / (1 / by_hand[:3]).mean()
    torch.testing.assert_close(weights[1:], expected)


def test_inverse_dt() -> None:
    assert inverse_dt(torch.tensor([1.0, 0.75, 0.25, 0.0])).tolist() == [4, 2, 4]


def test_a_mean_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="one trained step at least"):
        mean_one(torch.ones(3), ())
    with pytest.raises(ValueError, match="must be positive"):
        mean_one(torch.zeros(3), (0, 1))
    weights = mean_one(torch.tensor([1.0, 3.0, 9.0], requires_grad=True), (0, 1))
    assert weights.tolist() == [0.5, 1.5, 4.5] and not weights.requires_grad
