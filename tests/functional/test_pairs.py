"""pairs.py: DPO's loss and DGPO's weight, in closed form and by finite differences.

Kills, among others: winner and loser swapped; the reference ignored or added; the 1/2 of the scale;
a gradient through the reference or DGPO's weight; groups mixed; the sum not divided by the size.
"""

import math

import pytest
import torch
from torch import Tensor

from flowrl.functional.pairs import dgpo_weight, flow_dpo, preference_margin, unit_sum


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_flow_dpo() -> None:
    # The winner fell by .5, the loser rose by .25: margin .75, loss log(1 + exp(-.75 * 4 / 2)).
    errors = f64(0.5), f64(1.25), f64(1.0), f64(1.0)
    assert preference_margin(*errors).item() == 0.75
    assert flow_dpo(*errors, 4.0).item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-15)


def test_at_the_reference_the_loss_is_log_2_and_pulls_both_ways_alike() -> None:
    win, lose = f64(0.7, 0.2).requires_grad_(), f64(0.3, 0.9).requires_grad_()
    loss = flow_dpo(win, lose, win, lose, 6.0)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    grads = torch.autograd.grad(loss.sum(), (win, lose))
    # -d log sigmoid(z) at 0 is -1/2; dz = -scale / 2 per unit of the winner's error.
    assert grads[0].tolist() == [1.5, 1.5] and grads[1].tolist() == [-1.5, -1.5]


def test_flow_dpo_gradient_and_a_silent_reference() -> None:
    inputs = [f64(0.7, 0.2).requires_grad_(), f64(0.3, 0.9).requires_grad_()]
    reference = [f64(0.6, 0.4).requires_grad_(), f64(0.5, 0.5).requires_grad_()]
    assert torch.autograd.gradcheck(lambda win, lose: flow_dpo(win, lose, *reference, 3.0), inputs)
    constant = [each.detach() for each in inputs]
    assert not flow_dpo(*constant, *reference, 3.0).requires_grad


def test_a_shift_common_to_winner_and_loser_changes_nothing() -> None:
    errors = [f64(0.7, 0.2), f64(0.3, 0.9), f64(0.6, 0.4), f64(0.5, 0.5)]
    moved = [errors[0] + 0.2, errors[1] + 0.2, *errors[2:]]
    torch.testing.assert_close(flow_dpo(*moved, 3.0), flow_dpo(*errors, 3.0))


UNIT = torch.tensor([4, 4, 9, 9])


def test_golden_dgpo_weight() -> None:
    # Unit 4: (2 * .5 - 2 * (-.25)) * 10 / 2 = 7.5. Unit 9: (1 * .1 - 1 * .3) * 10 / 2 = -1.
    error, ref = f64(1.5, 0.75, 0.2, 0.5), f64(1.0, 1.0, 0.1, 0.2)
    weight = dgpo_weight(error, ref, f64(2, -2, 1, -1), UNIT, scale=10.0, group_size=2)
    high, low = 1 / (1 + math.exp(-7.5)), 1 / (1 + math.exp(1.0))
    assert weight.tolist() == pytest.approx([high, high, low, low], rel=1e-12)


def test_dgpo_weight_is_half_at_the_reference_and_carries_no_gradient() -> None:
    error = f64(1.5, 0.75, 0.2, 0.5).requires_grad_()
    weight = dgpo_weight(error, error, f64(2, -2, 1, -1), UNIT, scale=10.0, group_size=2)
    assert weight.tolist() == [0.5] * 4
    assert not weight.requires_grad


def test_dgpo_weight_falls_as_good_samples_become_likelier() -> None:
    def weight(error_of_good: float) -> float:
        error = f64(error_of_good, 1.0)
        ones = torch.ones_like(error)
        unit = torch.zeros(2, dtype=torch.int64)
        return dgpo_weight(error, ones, f64(1, -1), unit, scale=10.0, group_size=2)[0].item()

    assert weight(0.5) < weight(1.0) < weight(1.5)


def test_unit_sum_in_any_order() -> None:
    value = unit_sum(f64(1, 2, 4, 8), torch.tensor([9, 4, 9, 4]))
    assert value.tolist() == [5, 10, 5, 10]


def test_bad_inputs_are_refused() -> None:
    one, two = f64(1), f64(1, 2)
    with pytest.raises(ValueError, match="lose_error must have the shape of win_error"):
        flow_dpo(one, two, one, one, 1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        flow_dpo(one, one, one, one, 0.0)
    with pytest.raises(ValueError, match="unit must have the shape of error"):
        dgpo_weight(two, two, two, UNIT, scale=1.0, group_size=2)
    with pytest.raises(ValueError, match="must be positive"):
        dgpo_weight(two, two, two, UNIT[:2], scale=1.0, group_size=0)
