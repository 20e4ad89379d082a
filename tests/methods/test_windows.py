"""windows.py: positions by hand for every strategy, and what holds for thousands of steps.

Kills, among others: a window that shrinks or is empty at the right end (the published code); a move
one step early or late; an interval that decays to 0; a roll-back that was not asked for, or that
skips the last position; a random window that depends on the process, the order of calls or the
global generator.
"""

from __future__ import annotations

import random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.methods.windows import SlidingWindow, Strategy


def starts(window: SlidingWindow, steps: int) -> list[int]:
    return [window.start(step) for step in range(steps)]


def stays(*lengths: int) -> list[int]:
    """Position 0 lengths[0] times, position 1 lengths[1] times, ..."""
    return [position for position, length in enumerate(lengths) for _ in range(length)]


def test_progressive_moves_by_its_stride_and_stays_at_the_last_position() -> None:
    # 6 trainable steps, width 2: the last position is 4.
    assert starts(SlidingWindow(6, 2, stride=1, interval=2), 12) == stays(2, 2, 2, 2, 4)
    assert starts(SlidingWindow(6, 2, stride=3, interval=2), 7) == [0, 0, 3, 3, 4, 4, 4]
    assert SlidingWindow(6, 2, stride=3, interval=2).steps(3) == (3, 4)


def test_the_papers_schedule_on_25_steps() -> None:
    # l <- min(l + 1, last) every 25 steps, w = 4; steps 0 to 23 can be trained, so last = 20.
    window = SlidingWindow(24, 4)
    position = 0
    for step in range(700):
        if step and step % 25 == 0:
            position = min(position + 1, 20)
        assert window.steps(step) == tuple(range(position, position + 4))
    assert position == 20
    assert window.steps(100_000) == (20, 21, 22, 23)


def test_roll_back_returns_to_0_after_a_full_interval_at_the_last_position() -> None:
    window = SlidingWindow(6, 2, stride=3, interval=2, roll_back=True)
    assert starts(window, 14) == [0, 0, 3, 3, 4, 4] * 2 + [0, 0]


def test_linear_decay_shortens_the_interval_to_1_at_the_last_position() -> None:
    # last = 5; the interval is 11 * (1 - l / 5) + l / 5 = 11, 9, 7, 5, 3, 1.
    window = SlidingWindow(9, 4, interval=11, strategy="linear_decay")
    assert starts(window, 40) == stays(11, 9, 7, 5, 3, 5)
    rolling = SlidingWindow(9, 4, interval=11, strategy="linear_decay", roll_back=True)
    assert starts(rolling, 72) == stays(11, 9, 7, 5, 3, 1) * 2


def test_exp_decay_shortens_the_interval_beyond_its_threshold() -> None:
    # 10 * exp(-.1 * (l - 1)) rounded up: 10, 10, 9.05 -> 10, 8.19 -> 9, 7.41 -> 8.
    window = SlidingWindow(6, 2, interval=10, strategy="exp_decay", exp_threshold=1, roll_back=True)
    assert starts(window, 94) == stays(10, 10, 10, 9, 8) * 2


def test_frozen_never_moves() -> None:
    window = SlidingWindow(9, 4, interval=1, strategy="frozen")
    assert {window.steps(step) for step in (0, 1, 10, 9999)} == {(0, 1, 2, 3)}


def test_random_is_a_pure_function_of_seed_and_step() -> None:
    window = SlidingWindow(24, 4, strategy="random", seed=7)
    state = random.getstate()
    forward = starts(window, 300)
    assert random.getstate() == state
    random.seed(123)
    again = SlidingWindow(24, 4, strategy="random", seed=7)
    assert [again.start(step) for step in reversed(range(300))] == forward[::-1]
    assert forward[:8] == [1, 2, 8, 11, 13, 20, 19, 0]  # everywhere
    assert starts(SlidingWindow(24, 4, strategy="random", seed=8), 300) != forward


def test_random_is_uniform_over_all_positions() -> None:
    # 5 positions, 5000 draws: 1000 each, std 28; both ends included.
    drawn = starts(SlidingWindow(8, 4, strategy="random"), 5000)
    counts = [drawn.count(position) for position in range(5)]
    assert sum(counts) == 5000
    assert all(abs(count - 1000) < 5 * 28 for count in counts)


@settings(max_examples=60)
@given(
    num_trainable=st.integers(1, 30),
    width=st.integers(1, 30),
    stride=st.integers(1, 9),
    interval=st.integers(1, 40),
    strategy=st.sampled_from(get_args(Strategy)),
    roll_back=st.booleans(),
    exp_threshold=st.integers(0, 30),
    step=st.integers(0, 5000),
)
def test_the_window_never_shrinks_empties_or_leaves_the_trainable_steps(
    num_trainable: int,
    width: int,
    stride: int,
    interval: int,
    strategy: Strategy,
    roll_back: bool,
    exp_threshold: int,
    step: int,
) -> None:
    width = min(width, num_trainable)
    window = SlidingWindow(
        num_trainable, width, stride, interval, strategy, roll_back, exp_threshold
    )
    for at in (step, step + 1, step + 1000):
        steps = window.steps(at)
        assert len(steps) == width
        assert steps == tuple(range(steps[0], steps[0] + width))
        assert steps[0] >= 0 and steps[-1] < num_trainable
    if strategy != "random":
        here, after = window.start(step), window.start(step + 1)
        moved_on = after == min(here + stride, num_trainable - width)
        rolled = roll_back and here == num_trainable - width and after == 0
        assert after == here or moved_on or rolled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 5}, "window=5 does not fit into 4 trainable steps"),
        ({"width": 0}, "use 1 to 4"),
        ({"stride": 0}, "use strategy='frozen' for a window that does not move"),
        ({"interval": 0}, "interval=0 must be at least 1"),
    ],
)
def test_a_window_that_cannot_be_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingWindow(**{"num_trainable": 4, "width": 2, **arguments})
