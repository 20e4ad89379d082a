"""A terminal gets a live bar; a pipe gets few, whole lines; other processes get nothing."""

from __future__ import annotations

import io

import pytest

from flowrl.train import progress
from flowrl.train.progress import Progress, _duration

METRICS = {"train/reward_mean": 0.51234, "train/ratio_max_dev": 2e-6, "perf/step_time_s": 2.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_come_every_few_seconds_and_at_both_ends(clock):
    out = io.StringIO()
    with Progress(100, start=10, stream=out) as bar:
        for step in range(11, 101):
            clock[0] += 1.0
            bar.update(step, METRICS)
    lines = out.getvalue().splitlines()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == [11, *range(16, 100, 5), 100]
    assert lines[0] == "step 11/100  reward 0.512  |ratio-1| 2.0e-06  2.00 s/step  2:58 min left"


def test_evaluations_and_messages_always_come(clock):
    out = io.StringIO()
    bar = Progress(10, stream=out)
    scores = {"eval/score": 0.61, "eval/skill/counting": 0.4, "eval/shapes/mean": 0.6}
    bar.evaluated(0, scores)
    bar.message("saved [bold] step_000001")
    bar.update(1, METRICS)
    first, second, third = out.getvalue().splitlines()
    assert first == "eval at step 0/10  score 0.610  counting 0.400"
    assert second == "saved [bold] step_000001"
    assert "eval 0.610" in third
    bar.evaluated(1, {"eval/shapes/mean": 0.6})
    assert out.getvalue().endswith("eval at step 1/10  eval/shapes/mean 0.6\n")


def test_the_time_left_ends_at_the_minutes_limit(clock):
    out = io.StringIO()
    with Progress(1000, stream=out, max_minutes=6) as bar:
        clock[0] += 340
        bar.update(1, METRICS)
    assert out.getvalue().endswith("20 s left\n")


def test_a_terminal_gets_a_bar_that_ends_full(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Progress(3, stream=out) as bar:
        bar.message("built [1/2]")
        for step in (1, 2, 3):
            bar.update(step, METRICS)
        bar.evaluated(3, {"eval/score": 0.9})
    text = out.getvalue()
    assert "3/3" in text and "reward 0.512" in text and "eval at step 3/3  score 0.900" in text
    assert "built [1/2]" in text


def test_the_terminal_is_restored_after_an_error(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with pytest.raises(KeyError), Progress(3, stream=out):
        raise KeyError
    assert out.getvalue().rstrip("\\n").endswith("\x1b[?25h")  # the cursor is shown again


def test_quiet_writes_nothing():
    for out in (io.StringIO(), Terminal()):
        with Progress(3, quiet=True, stream=out) as bar:
            bar.update(1, METRICS)
            bar.evaluated(1, {"eval/score": 1.0})
            bar.message("text")
        assert out.getvalue() == ""


def test_values_that_are_not_finite_are_shown_as_they_are():
    out = io.StringIO()
    nan = float("nan")
    Progress(3, stream=out).update(1, {"train/reward_mean": nan, "perf/step_time_s": nan})
    assert out.getvalue() == "step 1/3  reward nan\n"


def test_durations_read_well():
    assert [_duration(s) for s in (0.4, 59.7, 185, 7620)] == [
        "0 s",
        "1:00 min",
        "3:05 min",
        "2:07 h",
    ]
