"""Early termination: bands and thresholds worked out by hand.

Kills, among others: the goal's sign; a band that counts one value too many; a strict judgement by
the best value; the best of a few runs being ended.
"""

from __future__ import annotations

import pytest

from flowrl.sweep.hyperband import bands_from_first, bands_to_last, is_left_behind


def test_bands_are_powers_from_the_first_or_to_the_last() -> None:
    assert bands_from_first(3, 3.0)[:4] == [3, 9, 27, 81]
    assert bands_from_first(1, 1.5)[:5] == [1, 1, 2, 3, 5]  # 1, 1.5, 2.25, 3.375, 5.06 cut
    # 27 / 3, 27 / 9; the last value itself is no band.
    assert bands_to_last(27, 2, 3.0) == [3, 9]
    assert bands_to_last(27, 9, 3.0) == [1, 3, 9]
    assert bands_to_last(2, 1, 3.0) == []


RUNS = {  # five losses over two values; the third belongs to no band
    "a": [10.0, 5.0],
    "b": [10.0, 4.0],
    "c": [10.0, 3.0, 9.0],
    "d": [10.0, 2.0],
    "e": [10.0, 1.0],
    "f": [10.0],
}


def left(name: str, *, strict: bool = True, goal: str = "minimize", eta: float = 2.0) -> bool:
    sign = 1.0 if goal == "minimize" else -1.0
    runs = {key: [sign * value for value in values] for key, values in RUNS.items()}
    return is_left_behind(
        runs[name], list(runs.values()), bands=[2, 4], eta=eta, goal=goal, strict=strict  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_beyond_a_band_one_in_eta_goes_on(goal: str) -> None:
    # Sorted at band 2: 1 2 3 4 5; rank floor(5 / 2) = 2 is 3, which may stay.
    assert [name for name in RUNS if left(name, goal=goal)] == ["a", "b"]
    # floor(5 / 5) = 1: 2 is the threshold.
    assert [name for name in RUNS if left(name, goal=goal, eta=5.0)] == ["a", "b", "c"]


def test_a_run_before_its_first_band_or_alone_goes_on() -> None:
    assert not left("f")
    alone = [[3.0, 4.0]]
    assert not is_left_behind(alone[0], alone, bands=[1, 2], eta=3, goal="minimize", strict=True)


def test_only_strict_judges_by_the_value_at_the_band() -> None:
    histories = [[1.0, 9.0], [5.0, 5.0], [6.0, 6.0]]
    options = {"bands": [2], "eta": 2.0, "goal": "minimize"}
    # At the band: 5 6 9, of which rank 1 is 6; the first run's best, 1, is below it.
    assert is_left_behind(histories[0], histories, strict=True, **options)  # type: ignore[arg-type]
    assert not is_left_behind(histories[0], histories, strict=False, **options)  # type: ignore[arg-type]


def test_the_last_band_that_was_reached_counts() -> None:
    histories = [[1.0, 9.0, 9.0], [2.0, 3.0], [3.0, 2.0]]
    options = {"eta": 2.0, "goal": "minimize", "strict": True}
    assert not is_left_behind(histories[0], histories, bands=[1], **options)  # type: ignore[arg-type]
    assert is_left_behind(histories[0], histories, bands=[1, 2, 4], **options)  # type: ignore[arg-type]
