"""aggregate.py: the sum, its denominator and exact silence under the mask.

Kills, among others: dividing by the mask's own count; values * mask (nan * 0); a mean over the
chunk.
"""

import pytest
import torch

from flowrl.functional.aggregate import aggregate

VALUES = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False], [True, True]])


def test_golden_sum_over_the_given_denominator() -> None:
    # (1 + 4 + 8) / 5
    assert aggregate(VALUES, MASK, 5).item() == 2.6
    assert aggregate(VALUES, MASK, torch.tensor([5])).item() == 2.6
    assert (
        aggregate(VALUES, MASK, 5).shape == aggregate(VALUES, MASK, torch.tensor([5])).shape == ()
    )


def test_aggregates_of_chunks_add_up_to_the_aggregate() -> None:
    parts = [aggregate(VALUES[i], MASK[i], 3.0) for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], aggregate(VALUES, MASK, 3.0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_masked_values_are_silent_whatever_they_are(bad: float) -> None:
    values = torch.where(MASK, VALUES, bad).requires_grad_()
    total = aggregate(values, MASK, 4.0)
    total.backward()
    assert total.item() == 3.25
    assert values.grad is not None
    assert torch.equal(values.grad, MASK / 4.0)


def test_nothing_to_train_on_is_zero_with_zero_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    total = aggregate(values, torch.zeros_like(MASK), 4.0)
    total.backward()
    assert total.item() == 0
    assert values.grad is not None
    assert (values.grad == 0).all()


def test_bfloat16_is_summed_in_float32() -> None:
    # 256 + 1 is 256 in bfloat16.
    values = torch.tensor([256.0, 1.0]).bfloat16()
    assert aggregate(values, torch.ones(2, dtype=torch.bool), 1.0).item() == 257.0


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="mask must be bool"):
        aggregate(VALUES, MASK.long(), 4.0)
    with pytest.raises(ValueError, match="values must have the shape of mask"):
        aggregate(VALUES[:, :1], MASK, 4.0)
    with pytest.raises(ValueError, match="denominator must be positive, but is 0"):
        aggregate(VALUES, MASK, 0)
    with pytest.raises(ValueError, match="denominator must be one number"):
        aggregate(VALUES, MASK, torch.ones(2))
