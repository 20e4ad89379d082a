"""VQAScore on a tiny LLaVA with its processor and chat template, tokens and pixels by hand.

Kills, among others: another question, or braces of a prompt that are formatted; a probability over
yes and no only; logits of another place than the last; prompts that are mixed up when they are
grouped; scores that depend on the batch around them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rewards
from flowrl.testing import check_reward
from rewards.vqa_score import VqaScore
from tests.reward_models.tiny_llava import PLAIN, ByHand, spelt, write_llava

NAMES = [*PLAIN, "Ye", "Yes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with a token per byte, and "Yes", that may say all of them."""

    def speak(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)

    merges = [("Y", "e"), ("Ye", "s")]
    return write_llava(tmp_path_factory.mktemp("llava"), NAMES, merges, speak)


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Four images of the network's own size: what a processor does to others is its own affair."""
    return torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(4))


def oracle(folder: Path, image: Tensor, question: str, answer: str = "Yes") -> float:
    """P(answer) with pixels and tokens by hand, one image at a time."""
    logits = ByHand(folder, with_yes).logits([image], question, [])
    return float(logits.softmax(0)[NAMES.index(answer)])


def with_yes(text: str) -> list[int]:
    """A token per byte, and one for each "Yes"."""
    ids, *parts = [spelt(part) for part in text.split("Yes")]
    for part in parts:
        ids = [*ids, NAMES.index("Yes"), *part]
    return ids


def make(folder: Path, **args: object) -> VqaScore:
    reward = rewards.load("vqa_score", model=str(folder), **{"dtype": "float32", **args})
    assert isinstance(reward, VqaScore)
    return reward


def test_the_score_is_the_probability_of_yes(folder: Path, small: Tensor) -> None:
    prompts = ["a red cube", "two dogs", "a red cube", 'braces {text} and "quotes"']
    expected = [
        oracle(folder, image, f'Does this figure show "{prompt}"? Please answer yes or no.')
        for image, prompt in zip(small, prompts, strict=True)
    ]
    assert np.std(np.log(expected)) > 0.1
    scores = make(folder).score(images=small, prompts=prompts)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-3)


def test_another_question_and_answer(folder: Path, small: Tensor) -> None:
    reward = make(folder, question="{text}! Yes?", answer="n", batch_size=1)
    scores = reward.score(images=small[:2], prompts=["snow", "snow"])
    expected = [oracle(folder, image, "snow! Yes?", "n") for image in small[:2]]
    assert scores.tolist() == pytest.approx(expected, rel=1e-3)


def test_it_conforms(folder: Path) -> None:
    check_reward(make(folder))


def test_what_does_not_fit_is_refused(folder: Path, small: Tensor, tmp_path: Path) -> None:
    given = {"images": small, "prompts": ["x"] * 4}
    with pytest.raises(ValueError, match=r'must hold "\{text\}" for the prompt, got .Is it'):
        VqaScore(question="Is it?")
    with pytest.raises(ValueError, match=r"one token of .*, but 'no' is 2; choose another"):
        make(folder, answer="no").score(**given)
    with pytest.raises(ValueError, match="4 images and 1 prompts"):
        make(folder).score(images=small, prompts=["x"])
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no chat template in its processor"):
        make(tmp_path).score(**given)
