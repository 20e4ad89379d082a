"""Vision-language models (VLMs) as judges: what is asked, what comes back, and where they run.

A judge puts questions, each some images and a text, to a `Vlm`: a model of transformers in this
process (`rewards.vlm_local`), or one behind an OpenAI-compatible endpoint (`rewards.vlm_endpoint`).
What the answers mean is the judges' affair (`rewards.vlm_answers`, `rewards.vlm_judge`).
Reading order: `Vlm`, `make_vlm`, `about_images`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from rewards.backbones import Placement
from rewards.base import check_counts, check_images, finite_images
from rewards.simple import pil_images

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"  # the default of judges in general
NUM_PARAMETERS = 8_292_166_656  # of it and of what was made from it
PREPROCESSING = "8 bit RGB, then the model's own processor and chat template; PNG to an endpoint"


@dataclass(frozen=True)
class Question:
    """One message of the user.

    Attributes:
        images: 8 bit RGB; they come before the text.
        text: as the model sees it.
    """

    images: tuple[Image.Image, ...]
    text: str


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: without special tokens.
        is_cut: True = it had no room to end, so the last word or number may be half of one.
    """

    text: str
    is_cut: bool


class Vlm(Protocol):
    """A model that answers; always greedily, since a judge should not roll dice."""

    def answers(self, questions: Sequence[Question], *, max_tokens: int) -> list[Answer]:
        """Its answers, in the order of `questions`.

        Args:
            questions: any number of them.
            max_tokens: of each answer.
        """
        ...

    def first_words(
        self, questions: Sequence[Question], words: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """For each question, the probability of each word as the first token of the answer.

        Spaces around a token and upper case do not count: " yes", "Yes" and "YES" add up.

        Args:
            questions: any number of them.
            words: each the whole of a token; 0 where the model gives it no probability.
        """
        ...


def make_vlm(
    model: str, endpoint: Mapping[str, Any] | None, placement: Placement, *, reward: str
) -> Vlm:
    """The model where it runs: here, or behind `endpoint`. Nothing is loaded or called yet.

    Args:
        model: Hub id, or a folder in transformers' format; at an endpoint, the name it goes by.
        endpoint: None = here; else the fields of `rewards.vlm_endpoint.Endpoint`.
        placement: of a model here.
        reward: who asks, for the errors.

    Raises:
        ValueError: an endpoint that is not one.
    """
    if endpoint is None:
        from rewards.vlm_local import LocalVlm

        return LocalVlm(model, placement, reward=reward)

    from rewards.vlm_endpoint import EndpointVlm, read_endpoint

    return EndpointVlm(model, read_endpoint(endpoint, reward=reward), reward=reward)


def about_images(images: Tensor, texts: Sequence[str]) -> tuple[list[int], list[Question]]:
    """Which of the images can be looked at, and a question about each of those.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        texts: B questions, of a prompt each.

    Raises:
        ValueError: images of another shape or kind, or not one prompt per image.
    """
    check_images(images)
    check_counts({"images": images, "prompts": texts})
    index = finite_images(images).nonzero().flatten().tolist()
    pictures = pil_images(images[index])
    return index, [Question((pictures[k],), texts[i]) for k, i in enumerate(index)]
