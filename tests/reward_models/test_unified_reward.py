"""UnifiedReward behind an endpoint: the published questions, and answers as its model writes them.

Kills, among others: a question with another word, or without the caption's brackets; the value of
an element taken for the score; a score out of 1 to 5; the loser taken for the winner.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

import rewards
from rewards.unified_reward import PAIR, POINT, UnifiedReward, UnifiedRewardPairs
from tests.reward_models.endpoint import Reply, completion, serve

ELEMENTS = "cat (animal): 1\nred (color): 0\n"


def test_the_questions_are_the_published_ones() -> None:
    assert [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (POINT, PAIR)] == [
        "f56f919ce3bc6aab",
        "0fd2f5c43a065165",
    ]


def test_scores_of_answers() -> None:
    answers = {
        f"{ELEMENTS}Final Score: 3.75": 3.75,
        f"{ELEMENTS}**Final Score:** 4": 4,
        "Final Score: 5": 5,
        "Final Score: 0": None,
        "Final Score: 6": None,
        ELEMENTS: None,
        "Final Score: 2 or Final Score: 3": None,
    }

    def reply(request: dict[str, Any]) -> Reply:
        asked = request["messages"][0]["content"][1]["text"]
        assert request["max_tokens"] == 512
        return completion(list(answers)[int(asked.removesuffix("]").rsplit("[", 1)[1])])

    images = torch.rand(len(answers), 3, 5, 4)
    with serve(reply) as served:
        reward = rewards.load("unified_reward", model="u", endpoint={"base_url": served.url})
        assert isinstance(reward, UnifiedReward) and reward.range == (1, 5)
        out = reward.score(images=images, prompts=[str(i) for i in range(len(answers))])
    expected = list(answers.values())
    assert [None if value.isnan() else value.item() for value in out["score"]] == expected
    assert out["parsed"].tolist() == [float(value is not None) for value in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image 2 shows no cat. Image 1 is better.", 1.0),
        ("Conclusion: **Image 2 is better.**", 0.0),
        ("Both images are equally good.", 0.5),
        ("Image 1 is better in colour, but Image 2 is better.", None),
        ("I like Image 1.", None),
    ],
)
def test_conclusions_of_answers(text: str, expected: float | None) -> None:
    image = torch.full((1, 3, 5, 4), 0.5)
    with serve(lambda _: completion(text)) as served:
        pairs = UnifiedRewardPairs(model="u", endpoint={"base_url": served.url})
        wins = pairs.compare(image, image, ["a cat"])
        asked = served.requests[0][2]["messages"][0]["content"][2]["text"]
    assert asked.endswith("\nText Caption: [a cat]") and "two generated images" in asked
    assert (None if wins.isnan().item() else wins.item()) == expected
