"""From scores to advantages, for a rollout that is drawn, scored and learnt from part by part.

While a part is drawn, the one before is scored in the background. Where a method compares the
samples of a group only, a part is judged, and learnt from, as soon as it has its scores; otherwise
the first question waits for all. What is computed does not depend on when scores arrive.
Reading order: `cut`, `Judge.__call__`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowrl.methods.spec import Method
from flowrl.train.collect import Collector, reward_metrics, together
from flowrl.train.lessons import Judged, Part
from flowrl.types import PromptBatch, Scores, Tree


def cut(batch: PromptBatch, num_parts: int) -> list[Tensor]:
    """The samples of every part, int64 [n] each, ascending.

    A part has whole groups of one update, about as many as the others; an update has `num_parts`
    of them, or as many as it has groups. 1 = everything in one part, whatever the updates.
    """
    if num_parts == 1:
        return [torch.arange(len(batch))]
    parts = []
    for update in batch.update.unique().tolist():
        mine = (batch.update == update).nonzero().flatten()
        _, sizes = torch.unique_consecutive(batch.group_id[mine], return_counts=True)
        of_parts = sizes.tensor_split(min(num_parts, len(sizes)))
        parts += mine.split([int(each.sum()) for each in of_parts])
    return parts


class Judge:
    """The advantages of a step's parts.

    Args:
        method: gives advantages, and says what they compare.
        collect: gathers the scores of all ranks.
        rank: of this process.
        parts: of the rollout; every rank has as many, with as many samples each.
        answers: a part's scores, when they are there.
        by_part: judge a part without the others.
    """

    def __init__(
        self,
        method: Method,
        collect: Collector,
        rank: int,
        parts: Sequence[Part],
        answers: Sequence[Callable[[], Scores]],
        *,
        by_part: bool,
    ) -> None:
        self._method = method
        self._collect = collect
        self._rank = rank
        self._parts = parts
        self._answers = answers
        self._by_part = by_part
        self._judged: dict[int, Judged] = {}
        self._seen: list[tuple[Scores, Scores, Tensor, Tensor, Tensor | None]] = []
        self.wait_s = 0.0

    def __call__(self, number: int) -> Judged:
        """The advantages of a part; every rank must ask for the same."""
        if number not in self._judged:
            numbers = [number] if self._by_part else list(range(len(self._parts)))
            sizes = [len(self._parts[each].batch) for each in numbers]
            self._judged |= dict(zip(numbers, self._judge(numbers).split(sizes), strict=True))
        return self._judged[number]

    @property
    def scores(self) -> Scores:
        """Of this rank's samples, in the order of the batch, once all parts were asked for."""
        return together([own for own, *_ in self._seen])

    def settle(self) -> dict[str, float]:
        """Ends a step of which all parts were asked for: what is logged of its rewards.

        Raises:
            RewardError: a reward has failed too often.
        """
        _, everyone, advantages, group_id, negative = zip(*self._seen, strict=True)
        own, all_scores = self.scores, together(everyone)
        metrics = reward_metrics(
            all_scores,
            torch.cat(advantages),
            torch.cat(group_id),
            None if negative[0] is None else torch.cat(negative),
        )
        metrics |= self._collect.settle(own, all_scores)
        metrics["perf/reward_s"] = sum(own.seconds.values())
        metrics["perf/reward_wait_s"] = self.wait_s
        return metrics

    def _judge(self, numbers: Sequence[int]) -> Judged:
        """What is learnt from this rank's samples of some parts, one part after the other."""
        started = time.perf_counter()
        own = together([self._answers[number]() for number in numbers])
        self.wait_s += time.perf_counter() - started
        method, gather = self._method, self._collect.gather
        mine = torch.cat([self._parts[number].batch.group_id for number in numbers])
        everyone, group_id = self._collect(own, mine)
        forest = None
        trees = [self._parts[number].trajectory.tree for number in numbers]
        if trees[0] is not None:
            keys, log_prob = zip(*((t.keys, t.log_prob) for t in trees if t), strict=True)
            forest = Tree(gather(torch.cat(keys)), gather(torch.cat(log_prob)))
        advantages = method.advantage(everyone, group_id, forest)
        negative = None
        if method.negative_advantage is not None:
            negative = method.negative_advantage(everyone, group_id, forest)
        valid = everyone.valid
        if method.prune is not None:
            valid = valid & method.prune(advantages, group_id, forest)
        if forest is not None:
            valid = forest.any_below(valid)
        self._seen.append((own, everyone, advantages, group_id, negative))
        share = slice(self._rank * len(mine), (self._rank + 1) * len(mine))
        return Judged(
            advantages[share], valid[share], None if negative is None else negative[share]
        )
