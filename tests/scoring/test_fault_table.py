"""The trainer's rows of docs/faults.md: a reward that misbehaves, and what becomes of its samples.

The cost in a row is made of the very numbers that its check asserts. Kills, among others: NaN or
infinity that becomes a number; a short answer that is padded; a sample that costs its neighbours
the score; a late answer that lands on the next batch; a monitor that masks what is trained on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rewards
from flowrl.errors import RewardError, ShapeError
from flowrl.train.attempts import Patience
from flowrl.train.collect import Breaker
from flowrl.train.scoring import RewardSet
from flowrl.types import Failures, Prompt
from tests.fault_table import Fault, page
from tests.reward_models.endpoint import Reply, body, completion, images_of, serve
from tests.scoring.test_faults import (
    IMAGES,
    NUM,
    QUICK,
    TRUTH,
    Numbered,
    batch,
    only_lost,
    raises,
    scored,
)

ALL = tuple(range(1, NUM + 1))
Make = Callable[[], Any]  # a fresh reward


class Changed(Numbered):
    """Scores right, then changes what it returns."""

    def __init__(self, change: Callable[[Tensor], Any], **attributes: Any) -> None:
        super().__init__(lambda *_: None)
        self.change = change
        vars(self).update(attributes)

    def score(self, **inputs: Any) -> Any:
        return self.change(super().score(**inputs))


# --------------------------------------------------------------------------- checks


def is_borne(make: Make, lost: tuple[int, ...], patience: Patience, reason: str) -> None:
    """Exactly these samples have no score, the others their own, and the reason is kept."""
    scores, failed = scored(make(), patience)
    assert only_lost(scores, *lost)
    assert failed.reason == reason and failed.samples == (len(lost) if reason else 0)


def ends_the_run(make: Make, reason: str) -> None:
    """All are lost, none is 0, and the run stops by itself with the reason."""
    scores, failed = scored(make())
    assert only_lost(scores, *ALL) and failed.samples == NUM
    with pytest.raises(RewardError, match=f"'mine' could not score {NUM} samples.*{reason}"):
        Breaker(max_share=0.05, window=10).observe(scores.rewards, {"mine": failed.reason})


def stops(make: Make, reason: str) -> None:
    """The promise is broken: an error at the first call, in a step as in the probe before it."""
    for call in (scored, lambda reward: only(reward).probe(Prompt("p"), images=IMAGES[:2])):
        with pytest.raises(RewardError, match=f"^reward 'mine' .*{reason}"):
            call(make())


def is_refused(make: Make, reason: str) -> None:
    """The run does not begin."""
    with pytest.raises(RewardError, match=f"^reward 'mine' .*{reason}"):
        only(make())


def only(reward: Any) -> RewardSet:
    return RewardSet([("mine", reward, 1.0)], patience=QUICK)


def borne(
    name: str,
    injected: str,
    expected: str,
    make: Make,
    *lost: int,
    patience: Patience = QUICK,
    reason: str = "",
) -> Fault:
    check = partial(is_borne, make, lost, patience, reason)
    return Fault(name, injected, expected, cost(lost), check)


def cost(lost: tuple[int, ...]) -> str:
    """Which samples have no score, in words."""
    if not lost:
        return "no sample"
    if len(lost) == NUM:
        return "all: none could be scored"
    return f"sample{'s' * (len(lost) > 1)} {' and '.join(map(str, lost))}, not to be scored"


# --------------------------------------------------------------------------- injections


def put(value: float, *numbers: int) -> Make:
    """A value in place of the scores of these samples."""
    chosen = torch.tensor(numbers)
    return lambda: Changed(lambda v: torch.where(torch.isin(v, chosen), value, v))


def out_of_memory(above: int) -> Make:
    def fault(numbers: Tensor, _: int) -> None:
        if len(numbers) > above:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    return lambda: Numbered(fault)


def failing(*args: Any, **options: Any) -> Make:
    return lambda: Numbered(raises(*args, **options))


def hangs_once() -> None:
    release = threading.Event()

    def hang(numbers: Tensor, call: int) -> None:
        if call == 1:
            release.wait(timeout=60)
            numbers += 50  # what it returns in the end

    once = Patience(retries=1, backoff_s=0, timeout_s=0.5)
    scores, failed = scored(Numbered(hang), once)
    release.set()
    assert only_lost(scores)
    assert failed == Failures(1, 0, "TimeoutError: no answer within 0.5 s")


def hangs_for_good() -> None:
    release = threading.Event()
    reward = Numbered(lambda numbers, call: release.wait(timeout=60) and None)
    scores, failed = scored(reward, Patience(retries=1, backoff_s=0, timeout_s=0.1))
    release.set()
    assert only_lost(scores, *ALL)
    assert reward.sizes == [NUM] * 2 and failed.calls == 2


def is_slow() -> None:
    """Every reward works beside the others, and its answer is waited for."""
    entered = threading.Event()

    def wait(numbers: Tensor, call: int) -> None:
        if not entered.wait(timeout=20):
            raise RuntimeError("the other reward was not asked meanwhile")

    slow, fast = Numbered(wait), Numbered(lambda numbers, call: entered.set())
    both = RewardSet([("mine", slow, 1.0), ("fast", fast, 1.0)], patience=QUICK)
    scores = both.start(batch(), images=IMAGES)()
    assert only_lost(scores) and not scores.failures


def a_group_is_lost() -> None:
    reward = Changed(lambda values: values, scope="group")
    reward.fault = raises(ValueError("no"), on=(2,))
    group_id = torch.tensor([3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3])
    assert only_lost(only(reward).score(batch(group_id=group_id), images=IMAGES), *EVEN)


EVEN = (2, 4, 6, 8, 10)


def a_monitor_fails() -> None:
    monitor = Numbered(raises(RuntimeError("not today")))
    both = RewardSet([("mine", Numbered(lambda *_: None), 1.0), ("m", monitor, 0.0)],
                     patience=QUICK)  # fmt: skip
    scores = both.score(batch(), images=IMAGES)
    assert only_lost(scores) and scores.rewards["m"].isnan().all()


def changes_its_images() -> None:
    class Spoils(Numbered):
        def score(self, **inputs: Any) -> Any:
            return inputs["images"].zero_().mean(dim=(1, 2, 3))

    first, images = Spoils(lambda *_: None), IMAGES.clone()
    both = [("first", first, 1.0), ("mine", Numbered(lambda *_: None), 1.0)]
    assert only_lost(RewardSet(both).score(batch(), images=images))
    assert images.equal(IMAGES)


def the_model_draws_nan() -> None:
    images = IMAGES.clone()
    images[4] = torch.nan
    with pytest.raises(ShapeError, match="the model has diverged"):
        only(Numbered(lambda *_: None)).score(batch(), images=images)


def lacks_metadata() -> None:
    class Counts(Numbered):
        inputs = ("metadata",)

        def score(self, **inputs: Any) -> Any:
            return torch.tensor([float(row["count"]) for row in inputs["metadata"]])

    with pytest.raises(RewardError, match=r"'mine' raised KeyError: 'count' .*prompts' metadata"):
        only(Counts(lambda *_: None)).probe(Prompt("p"), images=IMAGES[:2])


def judged(reply: Callable[[int, int], Reply], lost: tuple[int, ...]) -> None:
    """A judge behind an endpoint, which answers by (the image's number, how often it was seen)."""
    seen: list[int] = []
    lock = threading.Lock()

    def answer(request: dict[str, Any]) -> Reply:
        level = images_of(request)[0].getpixel((0, 0))[0]
        with lock:
            seen.append(number := round(level / 255 * 100))
            return reply(number, seen.count(number))

    with serve(answer) as served:
        judge = rewards.load(
            "vlm_judge", model="tiny", mode="score", low=0.0, high=20.0,
            endpoint={"base_url": served.url, "backoff_s": 0.0},
        )  # fmt: skip
        scores = only(judge).score(batch(), images=IMAGES)
    assert only_lost(scores, *lost)


def rambles(number: int, _: int) -> Reply:
    words = {5: "What a lovely picture!", 7: "Somewhere between 3 and 9", 9: "99"}
    return completion(words.get(number, str(number)))


def stumbles(number: int, tries: int) -> Reply:
    return completion(str(number)) if tries > 1 else body(b"busy", status=503)


HALVED = "asked again, then in halves"
STOPS = "an error at the first call, before the first step: whose score is whose cannot be told"
REFUSED = "an error at the first call, before the first step"
NO_STEP = "no sample: nothing is trained"
OOM = "OutOfMemoryError: tried to allocate 80 GiB"
FAULTS = (
    borne("NaN", "NaN for one sample", "masked and counted; never 0", put(torch.nan, 5), 5),
    borne("infinity", "infinity for one sample, minus infinity for another",
          "as NaN", lambda: Changed(lambda v: torch.where(
              v == 4, torch.inf, torch.where(v == 8, -torch.inf, v))), 4, 8),
    borne("one exception", "the first two calls raise", "asked again",
          failing(ConnectionError("reset"), calls=2), reason="ConnectionError: reset"),
    borne("exception for one sample", "any call that holds it raises", HALVED,
          failing(ValueError("bad"), on=(5,)), 5, reason="ValueError: bad"),
    borne("exception for several samples", "any call that holds one of them raises", HALVED,
          failing(ValueError("bad"), on=(2, 7)), 2, 7, reason="ValueError: bad"),
    Fault("exception for good", "every call raises", f"{HALVED}; the run stops with the reason",
          cost(ALL), partial(ends_the_run, failing(TypeError("bug")), "TypeError: bug")),
    Fault("service away", "every call finds nobody to connect to",
          "asked again, not in halves; the run stops with the reason", cost(ALL),
          partial(ends_the_run, failing(ConnectionError("refused")), "ConnectionError: refused")),
    borne("out of memory", "any call with more than three samples does not fit", HALVED,
          out_of_memory(3), reason=OOM),
    borne("out of memory but for one", "any call with more than one sample does not fit", HALVED,
          out_of_memory(1), reason=OOM),
    Fault("hang", "the first call returns late, with other numbers",
          "left behind at its time limit and asked again; what it returns is thrown away",
          cost(()), hangs_once),
    Fault("hang for good", "no call ever returns",
          "left behind at its time limit, asked again, given up", cost(ALL), hangs_for_good),
    Fault("slow", "a call returns long after that of another reward", "waited for", cost(()),
          is_slow),
    Fault("wrong length", "one score less", STOPS, NO_STEP,
          partial(stops, lambda: Changed(lambda v: v[:-1]), "one value per sample, got shape")),
    Fault("one score for all", "the mean over the batch", STOPS, NO_STEP,
          partial(stops, lambda: Changed(lambda v: v.mean()), "do not reduce over the batch")),
    Fault("wrong shape", "scores [B, 1]", REFUSED, NO_STEP,
          partial(stops, lambda: Changed(lambda v: v[:, None]), r"use .flatten\(\)")),
    Fault("wrong type", "a list of numbers", REFUSED, NO_STEP,
          partial(stops, lambda: Changed(lambda v: v.tolist()), "got list")),
    Fault("wrong dtype", "whole numbers", REFUSED, NO_STEP,
          partial(stops, lambda: Changed(lambda v: v.long()), "use .float()")),
    Fault("out of range", "a score outside what the reward declares", REFUSED, NO_STEP,
          partial(stops, lambda: Changed(lambda v: v + 1000), "but returned 100")),
    Fault("no score", "a mapping of components alone", REFUSED, NO_STEP,
          partial(stops, lambda: Changed(lambda v: {"part": v}), "must be called 'score'")),
    Fault("wrong component", "a component with one value less", REFUSED, NO_STEP,
          partial(stops, lambda: Changed(lambda v: {"score": v, "part": v[:-1]}), "as 'part'")),
    Fault("false declaration", "it reads videos, and the model makes images",
          "refused when the run is built", NO_STEP,
          partial(is_refused, lambda: Changed(lambda v: v, inputs=("videos",)), "reads videos")),
    Fault("missing metadata", "the reward reads a key that the prompts lack", REFUSED, NO_STEP,
          lacks_metadata),
    Fault("reward of groups fails", "it raises for the group of one sample",
          "the other group is scored", "samples " + ", ".join(map(str, EVEN)) + ": a group that "
          "cannot be compared", a_group_is_lost),
    Fault("monitor fails", "a reward without weight always raises",
          "no sample is masked for it; its curve has a gap", cost(()), a_monitor_fails),
    Fault("reward changes its images", "the first of two rewards writes zeros into its images",
          "each has a copy: the second scores what was drawn", cost(()), changes_its_images),
    Fault("model draws NaN", "an image that is not a number", "the run stops: the model has "
          "diverged, whatever a reward would say", NO_STEP, the_model_draws_nan),
    Fault("unparsable judge", "a VLM judge answers with praise, with two numbers, off its scale",
          "these have no score; no number is guessed", "samples 5, 7 and 9, not to be scored",
          partial(judged, rambles, (5, 7, 9))),
    Fault("busy judge", "the endpoint of a VLM judge answers every first question with a 503",
          "asked again", cost(()), partial(judged, stumbles, ())),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_no_wrong_number_is_trained_on_and_no_sample_is_lost_that_could_be_scored(
    fault: Fault,
) -> None:
    fault.check()


def test_the_check_itself_fails_where_a_wrong_number_or_a_loss_passes() -> None:
    right, failed = scored(Numbered(lambda *_: None))
    assert only_lost(right) and not only_lost(right, 5) and failed == Failures()
    for spoil in (0.0, torch.nan):
        scores, _ = scored(put(spoil, 5)())
        assert not only_lost(scores)
    with pytest.raises(AssertionError):
        is_borne(put(torch.nan, 5), (), QUICK, "")
    with pytest.raises(AssertionError):
        is_borne(lambda: Changed(lambda v: v.nan_to_num().where(v != 5, 0.0)), (5,), QUICK, "")
    assert TRUTH.tolist() == list(ALL)


def test_the_page_of_faults_is_made_of_the_tables() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
    assert file.read_text() == page(), "run python -m tests.fault_table > docs/faults.md"
