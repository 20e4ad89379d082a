"""shapes.py: the batch is the first dim, and nothing broadcasts by accident.

Kills, among others: [B] kept as [B] (along the last dim); a value larger than what it is expanded
to; a cast down to bfloat16; a mean over the batch too.
"""

import pytest
import torch

from flowrl.functional.shapes import expand_to, mean_over_dims, require_mask, require_same_shape

LIKE = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (0.5, (1, 1, 1)),
        (torch.tensor(0.5), (1, 1, 1)),
        (torch.ones(1), (1, 1, 1)),
        (torch.ones(2), (2, 1, 1)),
        (torch.ones(2, 1, 1), (2, 1, 1)),
        (torch.ones(1, 3, 1), (1, 3, 1)),
        (torch.ones(2, 3, 4), (2, 3, 4)),
    ],
)
def test_a_value_expands_along_the_batch(
    value: float | torch.Tensor, shape: tuple[int, ...]
) -> None:
    assert expand_to(value, LIKE).shape == shape


@pytest.mark.parametrize(
    "shape", [(3,), (4,), (2, 3), (2, 1), (3, 1, 1), (1, 2, 3, 4), (2, 1, 1, 1)]
)
def test_anything_else_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"std must be a number.*\[2, 3, 4\].*one value per row"):
        expand_to(torch.ones(shape), LIKE, "std")


def test_a_value_never_enlarges_the_tensor() -> None:
    with pytest.raises(ValueError, match=r"broadcast to \[1, 3\]"):
        expand_to(torch.ones(2), torch.zeros(1, 3))


def test_one_dim_is_the_batch() -> None:
    assert expand_to(torch.ones(2), torch.zeros(2)).shape == (2,)
    assert expand_to(0.5, torch.zeros(2)).shape == (1,)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_value_takes_the_dtype_of_the_tensor_but_float32_at_least(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    for value in (0.9601, torch.tensor(0.9601, dtype=torch.float64)):
        expanded = expand_to(value, LIKE.to(dtype))
        assert expanded.dtype == expected
        assert expanded.item() == torch.tensor(0.9601, dtype=expected).item()


def test_mean_over_dims_keeps_the_batch() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    assert mean_over_dims(values).tolist() == [5.5, 17.5]
    assert torch.equal(mean_over_dims(values[:, 0, 0]), values[:, 0, 0])
    assert mean_over_dims(values[:0]).shape == (0,)


def test_shapes_and_masks_are_checked_by_name() -> None:
    require_same_shape(a=LIKE, b=LIKE, c=LIKE)
    require_mask(LIKE.bool(), a=LIKE)
    with pytest.raises(
        ValueError, match=r"c must have the shape of a, \[2, 3, 4\], but has \[1, 3, 4\]"
    ):
        require_same_shape(a=LIKE, b=LIKE, c=LIKE[:1])
    with pytest.raises(ValueError, match="mask must be bool"):
        require_mask(LIKE, a=LIKE)
    with pytest.raises(ValueError, match="a must have the shape of mask"):
        require_mask(LIKE.bool(), a=LIKE[:1])
