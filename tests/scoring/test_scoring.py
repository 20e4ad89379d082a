"""Rewards at the border: declared inputs in, checked scores out, and nothing invalid becomes zero.

The rewards here are small but real: none stands in for code of ours. Kills, among others:
nan_to_num in place of invalid; a monitor that masks samples; chunks that forget their offset.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.errors import ConfigError, RewardError, ShapeError
from flowrl.toys import SymbolReward, TargetReward, ToyFlowPipeline, ToyTokenPipeline, token_prompts
from flowrl.train.attempts import Patience
from flowrl.train.collect import reward_metrics
from flowrl.train.scoring import RewardSet
from flowrl.train.workers import Worker
from flowrl.types import Prompt, PromptBatch

IMAGES = torch.linspace(0, 1, 5)[:, None, None, None].expand(5, 3, 2, 2).contiguous()


def batch(num: int = 5, group_id: list[int] | None = None) -> PromptBatch:
    return PromptBatch(
        prompts=tuple(Prompt(f"prompt {i}", {"bonus": i}) for i in range(num)),
        group_id=torch.tensor(group_id or [0] * num),
        sample_id=torch.arange(num),
        member=torch.arange(num),
        update=torch.zeros(num, dtype=torch.int64),
        seed=0,
    )


class Brightness:
    """Mean of the image, recording with what it was called."""

    inputs: Any = ("images",)
    scope = "sample"
    range = (0.0, 1.0)

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def score(self, **inputs: Any) -> Tensor:
        self.calls.append(inputs)
        images: Tensor = inputs["images"]
        return images.mean(dim=(1, 2, 3))


class Returns(Brightness):
    """What a function makes of the right scores."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def score(self, **inputs: Any) -> Any:
        return self.change(super().score(**inputs))


class Bonus(Brightness):
    inputs = ("metadata", "prompts")
    range = (0.0, float("inf"))

    def score(self, **inputs: Any) -> Tensor:
        self.calls.append(inputs)
        return torch.tensor([float(row["bonus"]) for row in inputs["metadata"]])


class Spread(Brightness):
    """Distance from the mean brightness of the group."""

    scope = "group"

    def score(self, **inputs: Any) -> Tensor:
        values = super().score(**inputs)
        return (values - values.mean()).abs()


def only(reward: Brightness) -> RewardSet:
    return RewardSet([("mine", reward, 1.0)])


def test_each_reward_gets_exactly_what_it_declares() -> None:
    bright, bonus = Brightness(), Bonus()
    scores = RewardSet([("bright", bright, 1.0), ("bonus", bonus, 0.5)]).score(
        batch(), images=IMAGES
    )
    assert [set(call) for call in bright.calls] == [{"images"}]
    assert bonus.calls == [
        {"prompts": [f"prompt {i}" for i in range(5)], "metadata": [{"bonus": i} for i in range(5)]}
    ]
    assert scores.weights == {"bright": 1.0, "bonus": 0.5}
    torch.testing.assert_close(scores.rewards["bright"], torch.linspace(0, 1, 5))
    assert scores.rewards["bonus"].tolist() == [0, 1, 2, 3, 4]
    assert scores.valid.all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_chunks_do_not_change_scores(batch_size: int) -> None:
    bright = Brightness()
    rewards = RewardSet([("a", bright, 1.0), ("b", Bonus(), 1.0)], batch_size=batch_size)
    scores = rewards.score(batch(), images=IMAGES)
    torch.testing.assert_close(scores.rewards["a"], torch.linspace(0, 1, 5))
    assert scores.rewards["b"].tolist() == [0, 1, 2, 3, 4]
    assert max(len(call["images"]) for call in bright.calls) == min(batch_size, 5)


def test_a_group_reward_sees_each_group_whole_whatever_the_chunks() -> None:
    spread = Spread()
    rewards = RewardSet([("spread", spread, 1.0)], batch_size=1)
    scores = rewards.score(batch(group_id=[7, 3, 7, 3, 7]), images=IMAGES)
    # Groups {0, .5, 1} with mean .5 and {.25, .75} with mean .5.
    torch.testing.assert_close(scores.rewards["spread"], torch.tensor([0.5, 0.25, 0.0, 0.25, 0.5]))
    assert len(spread.calls) == 2 and rewards.group_scope == rewards.names


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_invalid_and_never_zero(bad: float) -> None:
    def spoil(values: Tensor) -> Tensor:
        values[2] = bad
        return values

    scores = only(Returns(spoil)).score(batch(), images=IMAGES)
    assert scores.rewards["mine"].isnan().tolist() == [False, False, True, False, False]
    assert scores.valid.tolist() == [True, True, False, True, True]


def test_a_monitor_is_measured_but_neither_weighs_nor_invalidates() -> None:
    monitor = Returns(lambda values: values * torch.nan)
    scores = RewardSet([("a", Brightness(), 2.0), ("m", monitor, 0.0)]).score(
        batch(), images=IMAGES
    )
    assert scores.rewards["m"].isnan().all()
    assert scores.weights == {"a": 2.0}
    assert scores.trained.keys() == {"a"} and scores.trained["a"] is scores.rewards["a"]
    assert scores.valid.all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v.tolist(), "got list; wrap it in torch.tensor"),
        (lambda v: v[:, None], r"float tensor \[5\].*got shape \(5, 1\); use .flatten\(\)"),
        (lambda v: v.mean(), r"got shape \(\); do not reduce over the batch"),
        (lambda v: v > 0.5, "got torch.bool; use .float()"),
        (lambda v: v.to("meta"), "on the device of its images, cpu, got meta"),
        (lambda v: v * 3, r"declares the range \[0, 1\] but returned 1.5"),
        (lambda v: v - 0.1, r"declares the range \[0, 1\] but returned -0.1"),
    ],
)
def test_an_output_that_breaks_the_promise_is_refused(
    change: Callable[[Tensor], Any], expected: str
) -> None:
    with pytest.raises(RewardError, match=f"^reward 'mine' .*{expected}"):
        only(Returns(change)).score(batch(), images=IMAGES)


def test_float_rounding_at_the_ends_of_the_range_is_accepted() -> None:
    scores = only(Returns(lambda values: values.double() + 1e-6)).score(batch(), images=IMAGES)
    assert scores.rewards["mine"].dtype == torch.float32


def test_scores_have_no_gradient_and_a_reward_cannot_change_the_images_of_the_next() -> None:
    images = IMAGES.clone()
    first = Returns(lambda values: values)
    first.score = lambda **inputs: inputs["images"].zero_().mean(dim=(1, 2, 3))  # type: ignore[method-assign]
    scores = RewardSet([("a", first, 1.0), ("b", Brightness(), 1.0)]).score(batch(), images=images)
    assert not scores.rewards["a"].any()
    torch.testing.assert_close(scores.rewards["b"], torch.linspace(0, 1, 5))
    assert torch.equal(images, IMAGES)
    weight = torch.ones((), requires_grad=True)
    scores = only(Returns(lambda values: values * weight)).score(batch(), images=IMAGES)
    assert not scores.rewards["mine"].requires_grad


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (IMAGES[:4], r"float32 \[5, 3, H, W\].*got shape \(4, 3, 2, 2\)"),
        (IMAGES.double(), "got torch.float64 on cpu"),
        (IMAGES * 2, r"got \[0, 2\]; the pipeline's decode must clamp"),
        (IMAGES * torch.nan, r"got \[nan, nan\].*diverged"),
    ],
)
def test_images_that_are_not_images_are_refused(images: Tensor, expected: str) -> None:
    with pytest.raises(ShapeError, match=expected):
        only(Brightness()).score(batch(), images=images)


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("inputs", ("image",), "declares the input 'image'.*did you mean 'images'"),
        ("inputs", "images", "must declare inputs as a tuple"),
        ("inputs", (), "must declare inputs as a tuple"),
        ("scope", "groups", "did you mean 'group'"),
        ("range", (1.0, 0.0), r"range \(1.0, 0.0\), which is empty"),
    ],
)
def test_a_declaration_of_what_does_not_exist_is_refused(
    attribute: str, value: object, expected: str
) -> None:
    reward = Brightness()
    setattr(reward, attribute, value)
    with pytest.raises(RewardError, match=f"^reward 'mine' .*{expected}"):
        only(reward)


def test_a_set_of_none_scores_nothing_and_invalidates_nobody() -> None:
    scores = RewardSet([]).score(batch(), images=IMAGES)
    assert scores.rewards == {} and scores.weights == {} and scores.valid.all()
    metrics = reward_metrics(scores, torch.ones(5), batch().group_id)
    assert not [key for key in metrics if "reward" in key]
    assert metrics["train/invalid_frac"] == 0 and metrics["train/advantage_abs_mean"] == 1


def test_a_set_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="'a' is given twice"):
        RewardSet([("a", Brightness(), 1.0), ("a", Bonus(), 1.0)])
    with pytest.raises(ConfigError, match="weight of reward 'a' must be finite, got nan"):
        RewardSet([("a", Brightness(), float("nan"))])
    with pytest.raises(ConfigError, match="batch_size"):
        RewardSet([("a", Brightness(), 1.0)], batch_size=0)


def test_probe_calls_every_reward_once_on_two_samples_of_a_group() -> None:
    bright = Brightness()
    values = RewardSet([("a", bright, 1.0), ("b", Bonus(), 0.0)]).probe(
        Prompt("p", {"bonus": 2}), images=IMAGES[1:3]
    )
    assert values["a"].tolist() == [0.25, 0.5] and values["b"].tolist() == [2, 2]
    (call,) = bright.calls
    assert call["images"].shape == (2, 3, 2, 2)


def test_probe_refuses_what_scoring_refuses_and_what_raises() -> None:
    two, quick = IMAGES[:2], Patience(backoff_s=0)
    with pytest.raises(RewardError, match="'mine' must return a float tensor"):
        only(Returns(lambda values: values[:1])).probe(Prompt("p"), images=two)
    with pytest.raises(
        RewardError, match=r"raised KeyError: 'bonus' .*prompts \[2\].*metadata"
    ) as caught:
        RewardSet([("b", Bonus(), 1.0)], patience=quick).probe(Prompt("bare"), images=two)
    assert isinstance(caught.value.__cause__, KeyError)
    nan = only(Returns(lambda values: values * torch.nan)).probe(Prompt("p"), images=two)
    assert nan["mine"].isnan().all()


def test_describe_names_weight_inputs_scope_and_range() -> None:
    rewards = RewardSet([("a", Brightness(), 0.5), ("b", Bonus(), 0.0)])
    assert rewards.describe() == [
        ("a", "weight 0.5; images, per sample, in [0, 1]"),
        ("b", "monitor; metadata + prompts, per sample, in [0, inf]"),
    ]


def test_the_toys_rewards_read_what_their_pipelines_draw() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.2, 0.3], [0.0, -1.0], [50.0, 0.0]])
    names = ["right", "up", "left", "down", "right"]
    toy_batch = PromptBatch(
        prompts=tuple(Prompt(name) for name in names),
        group_id=torch.arange(5),
        sample_id=torch.arange(5),
        member=torch.zeros(5, dtype=torch.int64),
        update=torch.zeros(5, dtype=torch.int64),
        seed=0,
    )
    images = ToyFlowPipeline().decode(points)
    values = RewardSet([("t", TargetReward(), 1.0)]).score(toy_batch, images=images).rewards["t"]
    # The dot of a point far outside is drawn at the edge, 1.5, where the
    # canvas cuts the dot's tail off.
    expected = -torch.tensor([0.0, 2**0.5, (0.2**2 + 0.3**2) ** 0.5, 0.0, 0.5])
    torch.testing.assert_close(values, expected, atol=0.015, rtol=0)
    black = RewardSet([("t", TargetReward(), 1.0)]).score(
        toy_batch, images=torch.zeros_like(images)
    )
    assert not black.valid.any()

    tokens = torch.arange(16).repeat(2, 1)
    tokens[1, :4] = 3
    chosen = tuple(token_prompts()[k] for k in (3, 3))
    symbol_batch = PromptBatch(
        prompts=chosen,
        group_id=torch.zeros(2, dtype=torch.int64),
        sample_id=torch.arange(2),
        member=torch.arange(2),
        update=torch.zeros(2, dtype=torch.int64),
        seed=0,
    )
    scores = RewardSet([("s", SymbolReward(), 1.0)]).score(
        symbol_batch, images=ToyTokenPipeline().decode(tokens)
    )
    assert scores.rewards["s"].tolist() == [1 / 16, 4 / 16]


def test_a_worker_computes_in_one_thread_and_leaves_the_callers_alone():
    """Mutation: no `torch.set_num_threads(num_threads)` in the caller."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        worker = Worker("test")
        assert worker.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
