"""Win rates: how often a sample is preferred to the others of its group, by a judge of pairs.

Scores of one prompt's samples often differ by less than their own error, and dividing by so small a
spread makes advantages of noise; win rates always spread over [0, 1]. A judge compares two images
and says how probably the first is the better; a reward of single images makes one, too. The mean of
a group is always one half: a win rate trains, but shows no progress; watch another reward for that.
Reading order: `Judge`, `win_rates`, `WinRate.score`, `PointwiseJudge`.

Paper: Pref-GRPO, arXiv:2508.20751, section 3.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from rewards.base import (
    Metadata,
    Reward,
    check_images,
    check_one_prompt,
    finite_images,
    score_of,
)
from rewards.registry import check_members, make

ORDERS = ("both", "single")


class Judge(Protocol):
    """Prefers one of two images of the same prompt.

    Attributes:
        inputs: which of "images", "prompts" and "metadata" it reads; the others may be empty.
    """

    @property
    def inputs(self) -> tuple[str, ...]: ...

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] = (),
    ) -> Tensor:
        """P(first wins), float32 [B] in [0, 1], of images float [B, 3, H, W]; NaN: cannot say."""
        ...


def win_rates(probability: Tensor, first: Tensor, second: Tensor, num: int) -> Tensor:
    """Mean over its judged pairs of the probability that a sample wins, [num]; NaN without any.

    Paper: Pref-GRPO, arXiv:2508.20751, eq. 5. Differs: a pair that was not judged is left out (the
    published code calls it a tie), and nothing is rounded (there, to three decimals).

    Args:
        probability: float [P], that `first` wins; 0.5 = a tie, NaN = not judged.
        first: int64 [P], index of a sample.
        second: int64 [P], of the sample that it met.
        num: samples in the group.
    """
    is_judged = ~probability.isnan()
    won, met = probability.new_zeros(num), probability.new_zeros(num)
    for index, share in ((first, probability), (second, 1 - probability)):
        won.index_add_(0, index[is_judged], share[is_judged])
        met.index_add_(0, index[is_judged], torch.ones_like(share[is_judged]))
    return won / met  # 0 / 0 is NaN


class PointwiseJudge:
    """A judge made from a reward: the image with the higher score wins.

    Args:
        reward: scores single images.
        margin: scores that differ by no more are a tie; only without a temperature.
        temperature: None = a winner or a tie; else P(first wins) is
            sigmoid((score of first - score of second) / temperature), Bradley-Terry.

    Raises:
        ValueError: a reward that compares groups itself or reads no images, a negative margin, a
            temperature that is not positive, or both of them.
    """

    def __init__(
        self, reward: Reward, *, margin: float = 0.0, temperature: float | None = None
    ) -> None:
        if reward.scope != "sample" or "images" not in reward.inputs:
            raise ValueError(
                "a judge needs a reward of scope 'sample' that reads images, got scope "
                f"{reward.scope!r} and inputs {reward.inputs}"
            )
        if margin < 0 or (temperature is not None and temperature <= 0):
            raise ValueError(
                f"margin must be at least 0 and temperature positive, got {margin}, {temperature}"
            )
        if margin and temperature is not None:
            raise ValueError(
                f"margin {margin} makes ties and temperature {temperature} probabilities; give one"
            )
        self.inputs = reward.inputs
        self._reward, self._margin, self._temperature = reward, margin, temperature

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] = (),
    ) -> Tensor:
        """P(first wins), float32 [B]; NaN where either image cannot be scored. See `Judge`."""
        one, other = (self.score(images, prompts, metadata) for images in (first, second))
        return self.prefer(one, other)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        """The reward's own scores, float32 [B]; NaN where not finite."""
        given: dict[str, Any] = {"images": images, "prompts": prompts, "metadata": metadata}
        output = self._reward.score(**{name: given[name] for name in self.inputs})
        scores = score_of(output).float()
        return scores.where(scores.isfinite(), torch.nan)

    def prefer(self, first: Tensor, second: Tensor) -> Tensor:
        """P(first wins) of two tensors of scores; NaN where either is."""
        difference = first - second
        if self._temperature is not None:
            return torch.sigmoid(difference / self._temperature)
        outcome = 0.5 + 0.5 * difference.sign() * (difference.abs() > self._margin)
        return outcome.where(~difference.isnan(), torch.nan)


class WinRate:
    """The share of the other samples of its group that a sample beats; a tie counts half.

    Paper: Pref-GRPO, arXiv:2508.20751, section 3. Differs: each pair is judged in both orders and
    the two answers are averaged, so that a judge's liking for a position cancels; `orders="single"`
    is the published one order, the earlier sample first. A pair of which one answer is NaN is not
    judged at all, since the other answer would bring the liking back.

    Args:
        judge: a `Judge`, or the name of one or of a reward, as `rewards.load` takes it.
        judge_args: of the judge or reward, if given by name.
        orders: "both" or "single".
        margin: of `PointwiseJudge`, if `judge` names a reward.
        temperature: the same.
        batch_size: comparisons per call of the judge; None = all of a group at once.

    Raises:
        LookupError: no judge or reward of that name.
        ValueError: arguments that do not fit the judge or each other.
    """

    scope = "group"  # a call holds one group
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(
        self,
        *,
        judge: str | Judge,
        judge_args: Mapping[str, Any] | None = None,
        orders: str = "both",
        margin: float = 0.0,
        temperature: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        if orders not in ORDERS:
            raise ValueError(f"orders must be one of {', '.join(ORDERS)}, got {orders!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        made = make(judge, **(judge_args or {})) if isinstance(judge, str) else judge
        if isinstance(judge, str) and not hasattr(made, "compare"):
            check_members(judge, made)
            made = PointwiseJudge(cast("Reward", made), margin=margin, temperature=temperature)
        elif margin or temperature is not None or (judge_args and not isinstance(judge, str)):
            raise ValueError(
                "margin and temperature belong to a reward given by name, and judge_args to a "
                f"name; {type(made).__name__} is a judge already"
            )
        self.judge: Judge = made
        self.inputs = self.judge.inputs
        self._orders, self._batch_size = orders, batch_size

    def num_calls(self, group_size: int) -> int:
        """What one group costs: comparisons, or scores where the judge is made from a reward.

        G (G - 1) comparisons in both orders, half of it in one; a `PointwiseJudge` scores each of
        the G samples once and compares numbers.
        """
        if isinstance(self.judge, PointwiseJudge):
            return group_size
        return group_size * (group_size - 1) // (1 if self._orders == "both" else 2)

    @torch.no_grad()
    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Win rates, float32 [G], of the images float [G, 3, H, W] in [0, 1] of ONE group.

        Returns:
            NaN for a sample with no judged pair: one that is not finite, or alone in its group.

        Raises:
            ValueError: several prompts, or a judge that returns what is not [B] in [0, 1] or NaN.
        """
        check_images(images)
        check_one_prompt(prompts, "a win rate")
        num = len(images)
        first, second = torch.combinations(torch.arange(num)).unbind(1)
        if self._orders == "both":
            met, other = torch.cat([first, second]), torch.cat([second, first])
            forth, back = self._compare(images, prompts, metadata, met, other).chunk(2)
            probability = (forth + 1 - back) / 2
        else:
            probability = self._compare(images, prompts, metadata, first, second)
        finite = finite_images(images).cpu()
        probability[~(finite[first] & finite[second])] = torch.nan
        return win_rates(probability, first, second, num).to(images.device)

    def _compare(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        first: Tensor,
        second: Tensor,
    ) -> Tensor:
        """P(sample `first` wins against `second`), float32 [P] on the CPU."""
        if isinstance(self.judge, PointwiseJudge):
            scores = self.judge.score(images, prompts, metadata).cpu()
            return self.judge.prefer(scores[first], scores[second])
        size = self._batch_size or max(len(first), 1)
        parts = [torch.empty(0)]
        for one, other in zip(first.split(size), second.split(size), strict=True):
            chosen = [[values[i] for i in one.tolist()] if values else []
                      for values in (prompts, metadata)]  # fmt: skip
            answer = self.judge.compare(images[one], images[other], *chosen)
            parts.append(_checked(self.judge, answer, len(one)))
        return torch.cat(parts)


def _checked(judge: Judge, answer: Tensor, num: int) -> Tensor:
    """The answer as float32 [num] on the CPU.

    Raises:
        ValueError: another shape, or a value that is neither in [0, 1] nor NaN.
    """
    expected = f"{type(judge).__name__}.compare must return P(first wins), float [{num}]"
    if answer.shape != (num,):
        raise ValueError(f"{expected}, got shape {list(answer.shape)}")
    values = answer.detach().float().cpu()
    wrong = (values < 0) | (values > 1)  # False for NaN
    if wrong.any():
        raise ValueError(f"{expected}, in [0, 1] or NaN, got {values[wrong][0].item():g}")
    return values
