"""Judges by a tiny LLaVA in this process, against its own network with tokens and pixels by hand.

Kills, among others: another question, or braces of a prompt that are formatted; logits of another
place; spellings of yes that are left out, or "Yesno" counted; answers mixed up when questions are
grouped; the second image shown first; an answer that ended taken for one that was cut.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rewards
from rewards.backbones import Placement
from rewards.simple import pil_images
from rewards.vlm import Question
from rewards.vlm_judge import VlmJudge, VlmPairJudge
from rewards.vlm_local import LocalVlm
from tests.reward_models.tiny_llava import ByHand, write_llava

PROMPTS = ["a red cube", "two dogs", "a red cube", 'braces {prompt} and "quotes"']


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> ByHand:
    return ByHand(folder)


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Four images of the network's own size: what a processor does to others is its own affair."""
    return torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(4))


def test_yes_or_no(folder: Path, by_hand: ByHand, small: Tensor) -> None:
    reward = rewards.load("vlm_judge", model=str(folder), dtype="float32", batch_size=2)
    out = reward.score(images=small, prompts=PROMPTS)
    expected = [
        by_hand.yes_share([image], f'Does this image show "{prompt}"? Answer yes or no.')
        for image, prompt in zip(small, PROMPTS, strict=True)
    ]
    assert torch.tensor(expected).std() > 0.01
    assert out["score"].dtype == torch.float32 and out["parsed"].tolist() == [1] * 4
    assert out["score"].tolist() == pytest.approx(expected, rel=1e-3)


def test_a_number_of_the_answer(folder: Path, by_hand: ByHand, small: Tensor) -> None:
    reward = VlmJudge(
        model=str(folder), dtype="float32", mode="score", question="Rate {prompt}",
        pattern=r"^(\d\d)\d*$", high=60, max_tokens=4,
    )  # fmt: skip
    assert reward.range == (0, 60)
    images, prompts = small.repeat(2, 1, 1, 1), [*PROMPTS, "a", "b", "c", "d"]
    images[2] = torch.inf
    out = reward.score(images=images, prompts=prompts)
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        text, _ = by_hand.answer([image.clamp(0, 1)], f"Rate {prompt}", 4)
        states = re.fullmatch(r"(\d\d)\d*", text)
        expected.append(int(states[1]) if states and int(states[1]) <= 60 else None)
    expected[2] = None
    found = [None if value.isnan() else value.item() for value in out["score"]]
    assert found == expected
    assert len({*expected} - {None}) > 1 and expected.count(None) > 1
    parsed = [float(value is not None) for value in expected]
    assert out["parsed"][2].isnan() and out["parsed"][3:].tolist() == parsed[3:]


def test_answers_and_their_ends(folder: Path, by_hand: ByHand, small: Tensor) -> None:
    texts = [f"question {letter}" for letter in "abcdef"]
    vlm = LocalVlm(str(folder), Placement(None, "float32", 3), reward="test")
    pictures = pil_images(small)
    asked = [(text, image) for text in texts for image in range(4)]
    questions = [Question((pictures[image],), text) for text, image in asked]
    answers = vlm.answers(questions, max_tokens=6)
    expected = [by_hand.answer([small[image]], text, 6) for text, image in asked]
    assert [(answer.text, answer.is_cut) for answer in answers] == expected
    cut = [answer.is_cut for answer in answers]
    assert any(cut) and not all(cut), "the tiny model should end some answers, and not all"


def test_pairs(folder: Path, by_hand: ByHand, small: Tensor) -> None:
    names = {str(digit): digit / 9 for digit in range(9)}
    judge = VlmPairJudge(
        model=str(folder), dtype="float32", pattern=r"^(\d)\d*$", verdicts=names, max_tokens=2
    )
    first, second = small, small.flip(0)
    wins = judge.compare(first, second, PROMPTS)
    expected = []
    for one, other, prompt in zip(first, second, PROMPTS, strict=True):
        question = (
            f'Both images were made for the caption "{prompt}". Which one fits the caption and '
            "looks better? Answer with Image 1, Image 2 or Tie and nothing else."
        )
        text, _ = by_hand.answer([one, other], question, 2)
        expected.append(names.get(text[:1]))
    assert [None if win.isnan() else win.item() for win in wins] == pytest.approx(expected)
    assert len({*expected}) > 1


def test_what_cannot_judge_is_refused(folder: Path, small: Tensor, tmp_path: Path) -> None:
    given = {"images": small[:1], "prompts": ["x"]}
    with pytest.raises(ValueError, match="word 'maybe' is not one token of"):
        VlmJudge(model=str(folder), words=("yes", "maybe")).score(**given)
    with pytest.raises(OSError, match="VlmJudge's model 'nowhere' cannot be loaded"):
        VlmJudge(model="nowhere").score(**given)
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no chat template in its processor"):
        VlmJudge(model=str(tmp_path)).score(**given)
