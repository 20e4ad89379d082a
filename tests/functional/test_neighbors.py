"""neighbors.py: the distance softmax, its gradient, the neighbours' noise and the quasi-norm.

Kills, among others: a softmax over the batch; distances not squared, or their sign lost; a gradient
into the candidates; spread and its complement swapped; the root or the power left out.
"""

import math

import pytest
import torch
from torch import Tensor

from flowrl.functional.neighbors import neighbor_log_prob, neighbor_noise, quasi_norm_weighted


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_golden_neighbor_log_prob() -> None:
    # Squared distances of (1, 0), (0, 2) from the origin: 1 and 4; logits -1/2, -2.
    candidates = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    value = neighbor_log_prob(candidates, torch.zeros(1, 2).double(), temperature=2.0)
    odds = math.exp(1.5)
    assert value.exp()[0].tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])


def test_neighbor_gradient_leads_from_the_mean_of_all_to_the_candidate() -> None:
    # d log pi_i / d anchor = 2 (x_i - sum_j pi_j x_j) / temperature.
    candidates, anchor = random(3, 4, 5), random(3, 5, seed=1).requires_grad_()
    log_prob = neighbor_log_prob(candidates.requires_grad_(), anchor, temperature=3.0)
    (gradient,) = torch.autograd.grad(log_prob[:, 2].sum(), anchor, retain_graph=True)
    mean = (log_prob.exp()[:, :, None] * candidates).sum(dim=1)
    torch.testing.assert_close(gradient, 2 / 3 * (candidates[:, 2] - mean))
    torch.testing.assert_close(log_prob.exp().sum(dim=1), torch.ones(3).double())
    assert torch.autograd.grad(log_prob.sum(), candidates, allow_unused=True)[0] is None
    assert torch.autograd.gradcheck(
        lambda x: neighbor_log_prob(candidates, x, temperature=3.0), (anchor,)
    )


def test_the_order_of_a_group_and_the_other_groups_do_not_matter() -> None:
    candidates, anchor = random(2, 4, 3), random(2, 3, seed=1)
    order = torch.tensor([2, 0, 3, 1])
    expected = neighbor_log_prob(candidates, anchor)
    torch.testing.assert_close(neighbor_log_prob(candidates[:, order], anchor), expected[:, order])
    torch.testing.assert_close(neighbor_log_prob(candidates[1:], anchor[1:]), expected[1:])


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_neighbor_noise_is_standard_normal_and_correlates_by_what_is_shared(spread: float) -> None:
    shared, a, b = (random(200_000, seed=seed) for seed in range(3))
    one, other = neighbor_noise(shared, a, spread), neighbor_noise(shared, b, spread)
    assert one.var().item() == pytest.approx(1, abs=0.02)
    assert (one * other).mean().item() == pytest.approx(1 - spread**2, abs=0.02)


def test_golden_quasi_norm() -> None:
    # p = 1/2: group 5 = (1, -4): (1 + 2)^2 = 9; group 3 = (0, 9): 3^2 = 9; group 0 is silent.
    advantages = torch.tensor([1.0, 0.0, -4.0, 9.0, 0.0], dtype=torch.float64)
    group_id = torch.tensor([5, 3, 5, 3, 0])
    value = quasi_norm_weighted(advantages, group_id, power=0.5)
    assert value.tolist() == pytest.approx([1 / 9, 0, -4 / 9, 1, 0], rel=1e-15)


def test_quasi_norm_ignores_scale_and_favours_the_group_in_which_somebody_stands_out() -> None:
    flat, peaked = torch.tensor([1.0, -1, 1, -1]), torch.tensor([2.0, 0, 0, 0])  # equal energy
    group_id = torch.zeros(4, dtype=torch.int64)
    energy = [quasi_norm_weighted(a, group_id).norm().item() for a in (flat, peaked)]
    assert energy[0] < 0.5 * energy[1] == pytest.approx(0.5)
    torch.testing.assert_close(
        quasi_norm_weighted(7 * flat, group_id), quasi_norm_weighted(flat, group_id)
    )


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"candidates must be \[B, G, \.\.\.\]"):
        neighbor_log_prob(random(2, 3), random(2, 3))
    with pytest.raises(ValueError, match="temperature must be positive"):
        neighbor_log_prob(random(2, 3, 4), random(2, 4), temperature=0.0)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="spread must be in"):
            neighbor_noise(random(2), random(2), wrong)
        with pytest.raises(ValueError, match="power must be in"):
            quasi_norm_weighted(random(2), torch.zeros(2, dtype=torch.int64), power=wrong)
