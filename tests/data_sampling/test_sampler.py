"""The group sampler: stateless, fair, and independent of the world size.

Kills, among others: a permutation per step (prompts no longer equally often); ranks cut over the
whole step instead of each update; group ids that repeat within a step.
"""

from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from flowrl.data.sampler import GroupSampler, eval_batch
from flowrl.errors import ConfigError
from flowrl.types import Prompt, PromptBatch


def prompts(num: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"prompt {index}", {"index": index}) for index in range(num))


def sampler(
    num_prompts: int = 10,
    num_groups: int = 6,
    group_size: int = 4,
    updates: int = 2,
    seed: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> GroupSampler:
    return GroupSampler(
        prompts(num_prompts),
        num_groups=num_groups,
        group_size=group_size,
        updates_per_rollout=updates,
        seed=seed,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
    )


Row = tuple[int, int, int, str]


def rows(batch: PromptBatch) -> list[Row]:
    ids = (batch.sample_id.tolist(), batch.group_id.tolist(), batch.update.tolist())
    texts = [prompt.text for prompt in batch.prompts]
    return list(zip(*ids, texts, strict=True))


def test_one_group_numbers_its_samples_and_is_one_rank_s_whole_step() -> None:
    batch = PromptBatch.one_group(prompts(3), seed=7)
    assert rows(batch) == [(i, 0, 0, f"prompt {i}") for i in range(3)]
    assert (batch.member.tolist(), batch.seed) == ([0, 1, 2], 7)
    assert PromptBatch.one_group([]).member.dtype == torch.int64


def test_a_step_in_full() -> None:
    # 3 groups of 2 in 3 updates, prompts in order; step 1 starts at position 3 of 4 prompts.
    batch = sampler(4, 3, 2, 3, shuffle=False)(1)
    assert rows(batch) == [
        (0, 3, 0, "prompt 3"),
        (1, 3, 0, "prompt 3"),
        (2, 4, 1, "prompt 0"),
        (3, 4, 1, "prompt 0"),
        (4, 5, 2, "prompt 1"),
        (5, 5, 2, "prompt 1"),
    ]


def test_a_rank_has_its_part_of_every_update() -> None:
    # An update is 3 groups x 4 = 12 samples, a rank's part 6: one group and a half.
    second = sampler(rank=1, world_size=2)(0)
    assert second.sample_id.tolist() == [*range(6, 12), *range(18, 24)]
    assert second.update.tolist() == [0] * 6 + [1] * 6
    assert second.group_id.tolist() == [1, 1, 2, 2, 2, 2, 4, 4, 5, 5, 5, 5]


@given(
    num_prompts=st.integers(1, 12),
    groups_per_update=st.integers(1, 6),
    group_size=st.integers(1, 6),
    updates=st.integers(1, 3),
    world_size=st.integers(1, 6),
    step=st.integers(0, 1000),
)
def test_ranks_together_have_the_step_of_a_single_rank(
    num_prompts: int, groups_per_update: int, group_size: int, updates: int, world_size: int,
    step: int,
) -> None:  # fmt: skip
    assume(groups_per_update * group_size % world_size == 0)
    args = (num_prompts, groups_per_update * updates, group_size, updates)
    alone = sampler(*args)(step)
    parts = [sampler(*args, rank=rank, world_size=world_size)(step) for rank in range(world_size)]
    assert sorted(row for part in parts for row in rows(part)) == rows(alone)
    assert {part.seed for part in parts} == {alone.seed}
    for update in range(updates):
        sizes = [int((part.update == update).sum()) for part in parts]
        assert sizes == [groups_per_update * group_size // world_size] * world_size


def test_every_prompt_is_seen_once_per_epoch_across_step_borders() -> None:
    drawn = sampler(num_prompts=10, num_groups=6, group_size=1)
    sequence = [prompt.text for step in range(10) for prompt in drawn(step).prompts]
    for epoch in range(6):
        assert len(set(sequence[10 * epoch : 10 * epoch + 10])) == 10
    assert set(Counter(sequence).values()) == {6}
    assert sequence[:10] != sequence[10:20]  # each epoch has its own order


def test_more_groups_than_prompts_make_separate_groups_of_one_prompt() -> None:
    batch = sampler(num_prompts=2, num_groups=6, group_size=2)(0)
    assert batch.group_id.unique().tolist() == list(range(6))
    assert Counter(prompt.text for prompt in batch.prompts) == {"prompt 0": 6, "prompt 1": 6}


def test_batches_are_a_function_of_seed_and_step() -> None:
    walked = sampler()
    for step in range(5):
        walked(step)
    fresh = sampler()
    assert rows(walked(7)) == rows(fresh(7)) and walked(7).seed == fresh(7).seed
    assert rows(fresh(7)) != rows(sampler(seed=1)(7))
    seeds = {sampler(seed=seed)(step).seed for seed in range(3) for step in range(50)}
    assert len(seeds) == 150


@pytest.mark.parametrize(
    ("num_groups", "group_size", "updates", "world_size", "expected"),
    [
        # 50 x 24 = 1200 = 37.5 x 32. 32 / gcd(24, 32) = 4 groups make whole ranks.
        (50, 24, 1, 32, "50 groups x group_size 24 = 1200 samples of an update do not divide into "
         "32 ranks; use data.num_groups=48 or 52"),
        (7, 4, 2, 1, "data.num_groups=7 groups do not divide into optim.updates_per_rollout=2 "
         "updates; use 6 or 8 groups"),
        (2, 3, 1, 4, "use data.num_groups=4"),
        (0, 4, 1, 1, "data.num_groups must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_arithmetic_that_does_not_divide_is_refused_with_what_does(
    num_groups: int, group_size: int, updates: int, world_size: int, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sampler(10, num_groups, group_size, updates, world_size=world_size)
    assert expected in str(caught.value)


@given(
    num_groups=st.integers(1, 40), group_size=st.integers(1, 12), updates=st.integers(1, 4),
    world_size=st.integers(1, 12),
)  # fmt: skip
def test_the_remedy_of_a_refusal_works(
    num_groups: int, group_size: int, updates: int, world_size: int
) -> None:
    try:
        sampler(3, num_groups, group_size, updates, world_size=world_size)
    except ConfigError as error:
        remedy = str(error).split("use ")[1].removeprefix("data.num_groups=")
        for number in remedy.removesuffix(" groups").split(" or "):
            accepted = sampler(3, int(number), group_size, updates, world_size=world_size)
            assert accepted.num_groups == int(number)


def test_no_prompts_or_a_rank_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="prompts are empty"):
        sampler(num_prompts=0)
    with pytest.raises(ConfigError, match=r"rank must be in \[0, 2\)"):
        sampler(rank=2, world_size=2)


def test_whole_groups_are_recognised() -> None:
    assert sampler(num_groups=4, group_size=4, updates=1, world_size=2).has_whole_groups
    assert not sampler(num_groups=3, group_size=4, updates=1, world_size=2).has_whole_groups


def test_describe_shows_the_arithmetic() -> None:
    assert sampler(world_size=2).describe() == [
        ("samples per step", "6 groups x 4 = 24"),
        ("updates per step", "2, each on 3 groups"),
        ("samples per rank", "24 / 2 ranks = 12 per step, 6 per update"),
        ("prompts", "10, shuffled; an epoch takes 1.667 steps"),
    ]


def evaluation(rank: int = 0, world_size: int = 1, num_prompts: int = 5) -> PromptBatch:
    return eval_batch(
        prompts(num_prompts), samples_per_prompt=2, seed=1, rank=rank, world_size=world_size
    )


def test_evaluation_has_every_prompt_equally_often_with_its_own_noise() -> None:
    batch = evaluation()
    assert batch.sample_id.tolist() == list(range(10))
    assert batch.group_id.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    texts = [prompt.text for prompt in batch.prompts]
    assert texts == [f"prompt {index}" for index in batch.group_id]
    assert not batch.update.any()
    # Fewer prompts leave the samples of the others as they are.
    assert rows(evaluation(num_prompts=3)) == rows(batch)[:6]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 10])
def test_evaluation_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    parts = [evaluation(rank, world_size) for rank in range(world_size)]
    assert [row for part in parts for row in rows(part)] == rows(evaluation())
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_evaluation_does_not_share_its_seed_with_training() -> None:
    assert evaluation().seed not in {sampler(seed=1)(step).seed for step in range(100)}


def test_evaluation_with_fewer_samples_than_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 samples cannot be evaluated on 11 ranks"):
        evaluation(0, 11)
    with pytest.raises(ConfigError, match="0 samples"):
        evaluation(num_prompts=0)


def test_batches_hold_int64() -> None:
    batch = sampler()(0)
    for ids in (batch.group_id, batch.sample_id, batch.update):
        assert ids.dtype == torch.int64
