"""Noise belongs to its sample, and seeds to their purpose.

Kills, among others: one generator for all rows (a row then depends on those before it); a stream or
seed left out of the counter; a hash of the parts without separators.
"""

import time

import pytest
import torch

from flowrl.data.noise import sample_noise, sample_uniform
from flowrl.data.seeds import derive_seed
from flowrl.errors import ShapeError

IDS = torch.tensor([7, 0, 123_456_789_012, 3, 7])


def test_a_row_depends_on_nothing_but_seed_id_and_stream() -> None:
    together = sample_noise(5, IDS, (3, 4), stream=2)
    for row, number in zip(together, IDS, strict=True):
        assert torch.equal(row, sample_noise(5, number[None], (3, 4), stream=2)[0])
    assert torch.equal(together[0], together[4])


def test_noise_is_the_same_whatever_was_drawn_before_and_leaves_torch_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sample_noise(5, IDS, (4,), stream=0)
    sample_noise(6, IDS, (9,), stream=1)
    assert torch.equal(first, sample_noise(5, IDS, (4,), stream=0))
    assert torch.equal(state, torch.get_rng_state())


def test_another_seed_id_or_stream_gives_other_noise() -> None:
    ids = torch.arange(4)
    rows = [
        *sample_noise(1, ids, (64,), stream=0),
        *sample_noise(1, ids, (64,), stream=1),
        *sample_noise(2, ids, (64,), stream=0),
    ]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_noise_is_standard_normal_and_rows_streams_and_seeds_are_uncorrelated() -> None:
    ids = torch.arange(200)
    rows = torch.cat(
        [sample_noise(seed, ids, (2000,), stream=stream) for seed in (0, 1) for stream in (0, 1)]
    ).double()
    num = rows.numel()  # 1.6 M, so the mean's standard error is 8e-4
    assert abs(rows.mean()) < 4 * num**-0.5
    assert abs(rows.var() - 1) < 4 * (2 / num) ** 0.5
    assert abs((rows**4).mean() - 3) < 4 * (96 / num) ** 0.5
    correlation = rows @ rows.T / rows.shape[1] - torch.eye(len(rows))
    # 319,600 pairs of standard error 0.0224: the largest is about 4.7 of them.
    assert correlation.fill_diagonal_(0).abs().max() < 6 * rows.shape[1] ** -0.5


def test_uniform_numbers_fill_the_unit_interval() -> None:
    values = sample_uniform(3, torch.arange(100), (1000,), stream=0)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * (1 / 12 / values.numel()) ** 0.5
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert ((counts - 10_000).abs() < 5 * 95).all()  # standard deviation 95


def test_dtype_and_shape_are_as_asked() -> None:
    half = sample_noise(0, IDS, (2, 3), stream=0, dtype=torch.bfloat16)
    assert half.shape == (5, 2, 3) and half.dtype == torch.bfloat16
    assert torch.equal(half, sample_noise(0, IDS, (2, 3), stream=0).bfloat16())
    assert sample_noise(0, IDS[:0], (2,), stream=0).shape == (0, 2)


@pytest.mark.parametrize("ids", [torch.tensor([1.0]), torch.zeros(1, 1).long(), torch.tensor([-1])])
def test_ids_that_are_not_indices_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ShapeError):
        sample_noise(0, ids, (1,), stream=0)


def test_a_training_step_of_noise_is_drawn_in_under_50_ms() -> None:
    ids = torch.arange(600)
    times = []
    for _ in range(3):
        start = time.process_time()
        sample_noise(0, ids, (1024,), stream=0)
        times.append(time.process_time() - start)
    assert min(times) < 0.05  # measured: 0.012


def test_derived_seeds_differ_by_value_order_type_and_grouping() -> None:
    parts: list[tuple[int | str, ...]] = [
        (0, 1), (1, 0), ("0", 1), ("01",), (1,), ("a", "b"), ("ab",), ("a\x00str:1:b",),
        ("a\x00str:b",), (),
    ]  # fmt: skip
    seeds = [derive_seed(*each) for each in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "rollout", 3) == derive_seed(0, "rollout", 3)


def test_derived_seeds_stay_the_same_between_versions() -> None:
    # A stored run resumes only if this never changes.
    assert derive_seed(0, "rollout", 3) == 3389621969075537398
