"""Any vision-language model as a judge: of single images, or of pairs.

The question is a text with the prompt in it; the answer is the probability of yes, a number, or a
verdict on two images. An answer that does not say what was asked for is never guessed at: that
sample's score is NaN, and the share of usable answers is logged beside the scores. Reading order:
`VlmJudge`, `VlmPairJudge`, then `rewards.vlm_answers` for what counts as an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewards.backbones import Placement
from rewards.base import Metadata, check_counts, check_images, finite_images
from rewards.cards import Card
from rewards.simple import pil_images
from rewards.vlm import (
    MODEL,
    NUM_PARAMETERS,
    PREPROCESSING,
    Question,
    about_images,
    make_vlm,
)
from rewards.vlm_answers import compile_pattern, number, share, verdict

MODES = ("yes_no", "score")
YES_NO = 'Does this image show "{prompt}"? Answer yes or no.'
SCORE = (
    'How well does this image show "{prompt}", and how good does it look? Answer with one number '
    "from 0 (not at all) to 10 (perfectly) and nothing else."
)
PAIR = (
    'Both images were made for the caption "{prompt}". Which one fits the caption and looks '
    "better? Answer with Image 1, Image 2 or Tie and nothing else."
)
NUMBER_ALONE = r"^\W*?(-?\d+(?:\.\d+)?)\W*$"
VERDICT_ALONE = r"^\W*(Image 1|Image 2|Tie)\W*$"
VERDICTS = {"Image 1": 1.0, "Image 2": 0.0, "Tie": 0.5}


class VlmJudge:
    """What a model says of each image when asked about its prompt.

    Mode "yes_no": P(yes) / (P(yes) + P(no)) at the first token of the answer. An endpoint tells
    only the 20 likeliest tokens; a word that is not among them counts as 0, and if both are
    missing the answer is unusable. Mode "score": the number that the answer states, by
    `rewards.vlm_answers`.

    Args:
        model: Hub id, or a folder in transformers' format, of an image-text-to-text model with a
            chat template; at an endpoint, the name it goes by.
        mode: "yes_no" or "score".
        question: asked about each image; "{prompt}" stands for its prompt. None: `YES_NO` or
            `SCORE`.
        words: for yes and for no, each one token of the model; mode "yes_no".
        pattern: a regular expression with one group, around the number; mode "score".
        low: the least number that counts; mode "score".
        high: the greatest.
        max_tokens: of an answer; mode "score".
        endpoint: None = the model runs here; else the fields of `rewards.vlm_endpoint.Endpoint`,
            base_url the only one that must be given.
        device: where a model here runs; None = the current GPU, or the CPU without one.
        dtype: of a model here: "bfloat16" (usual), "float32" or "float16".
        batch_size: images per forward of a model here.

    Raises:
        ValueError: an argument that is out of its range, or a pattern or question that is none.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True
    card = Card(
        name="vlm_judge",
        model=f"{MODEL}, or any other, or one behind an OpenAI-compatible endpoint",
        licence="Apache-2.0 (the default model)",
        paper="none; a judge in general",
        inputs=inputs,
        range=range,
        parameters=NUM_PARAMETERS,
        preprocessing=PREPROCESSING,
        verified="a random LLaVA of the published format, here and behind `transformers serve`, "
        "and an endpoint that misbehaves; not run on published weights",
    )

    def __init__(
        self,
        *,
        model: str = MODEL,
        mode: str = "yes_no",
        question: str | None = None,
        words: Sequence[str] = ("yes", "no"),
        pattern: str = NUMBER_ALONE,
        low: float = 0.0,
        high: float = 10.0,
        max_tokens: int = 64,
        endpoint: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if len(words) != 2 or isinstance(words, str):
            raise ValueError(f"words must be two, for yes and for no, got {words!r}")
        if not low < high or max_tokens < 1:
            raise ValueError(
                f"low must be below high and max_tokens at least 1, got {low:g}, {high:g}, "
                f"{max_tokens}"
            )
        if mode == "score":
            self.range = (float(low), float(high))
        self._question = check_question(question or (YES_NO if mode == "yes_no" else SCORE))
        self._words, self._pattern, self._max_tokens = words, compile_pattern(pattern), max_tokens
        self._read = self._yes_no if mode == "yes_no" else self._scored
        placement = Placement(device, dtype, batch_size)
        self._vlm = make_vlm(model, endpoint, placement, reward=type(self).__name__)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> dict[str, Tensor]:
        """What the answers say of images float [B, 3, H, W] in [0, 1].

        Returns:
            "score": float32 [B]; NaN for a broken image or an unusable answer. "parsed": float32
            [B], 1 = the answer could be used, 0 = it could not, NaN = nothing was asked.

        Raises:
            ValueError: images of another shape or kind, not one prompt per image, or a model that
                cannot chat.
            OSError: the weights are neither on this machine nor to be had.
            ConnectionError, TimeoutError: the endpoint failed for good.
        """
        index, questions = about_images(images, [ask(self._question, each) for each in prompts])
        scores, parsed = torch.full((2, len(images)), torch.nan)
        if questions:
            scores[index] = torch.tensor(self._read(questions), dtype=torch.float32)
            parsed[index] = scores[index].isfinite().float()
        return {"score": scores.to(images.device), "parsed": parsed.to(images.device)}

    def _yes_no(self, questions: Sequence[Question]) -> list[float]:
        return [share(yes, no) for yes, no in self._vlm.first_words(questions, self._words)]

    def _scored(self, questions: Sequence[Question]) -> list[float]:
        answers = self._vlm.answers(questions, max_tokens=self._max_tokens)
        return [number(answer, self._pattern, *self.range) for answer in answers]


class VlmPairJudge:
    """Which of two images a model prefers: a judge of pairs, as `win_rate` takes it.

    Args:
        model: as of `VlmJudge`.
        question: asked about two images, the first of which the model sees first; "{prompt}"
            stands for their prompt.
        pattern: a regular expression with one group, around the verdict.
        verdicts: P(first wins) of each verdict; case does not count.
        max_tokens: of an answer.
        endpoint: as of `VlmJudge`, and so on.
        device: as of `VlmJudge`.
        dtype: as of `VlmJudge`.
        batch_size: pairs per forward of a model here.

    Raises:
        ValueError: as `VlmJudge`, or a verdict outside [0, 1].
    """

    inputs = ("images", "prompts")
    range = (0.0, 1.0)  # of P(first wins)
    card = replace(
        VlmJudge.card,
        name="vlm_pair_judge",
        paper="none; a judge of pairs in general, for win_rate",
        range=range,
    )

    def __init__(
        self,
        *,
        model: str = MODEL,
        question: str = PAIR,
        pattern: str = VERDICT_ALONE,
        verdicts: Mapping[str, float] = VERDICTS,
        max_tokens: int = 64,
        endpoint: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 4,
    ) -> None:
        if not verdicts or not all(0 <= value <= 1 for value in verdicts.values()):
            raise ValueError(f"verdicts must give P(first wins), in [0, 1], got {dict(verdicts)}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self._question, self._pattern = check_question(question), compile_pattern(pattern)
        self._verdicts = {name.lower(): float(value) for name, value in verdicts.items()}
        self._max_tokens = max_tokens
        placement = Placement(device, dtype, batch_size)
        self._vlm = make_vlm(model, endpoint, placement, reward=type(self).__name__)

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] = (),
    ) -> Tensor:
        """P(first wins), float32 [B], of two times B images float [B, 3, H, W] in [0, 1].

        Returns:
            NaN where either image is broken or the answer is no verdict.

        Raises:
            ValueError: images of different number, another shape or kind, not one prompt per
                pair, or a model that cannot chat.
            OSError, ConnectionError, TimeoutError: as `VlmJudge.score`.
        """
        check_images(first)
        check_images(second)
        check_counts({"images": first, "prompts": prompts})
        check_counts({"images": second, "prompts": prompts})
        whole = finite_images(first) & finite_images(second).to(first.device)
        index = whole.nonzero().flatten().tolist()
        pairs = zip(index, pil_images(first[index]), pil_images(second[index]), strict=True)
        questions = [Question((a, b), ask(self._question, prompts[i])) for i, a, b in pairs]
        wins = torch.full((len(first),), torch.nan)
        if questions:
            answers = self._vlm.answers(questions, max_tokens=self._max_tokens)
            values = [verdict(answer, self._pattern, self._verdicts) for answer in answers]
            wins[index] = torch.tensor(values, dtype=torch.float32)
        return wins.to(first.device)


def check_question(template: str) -> str:
    """The template of a question.

    Raises:
        ValueError: it has a place for something other than the prompt, which is a slip.
    """
    wrong = [name for name in re.findall(r"\{(\w+)\}", template) if name != "prompt"]
    if wrong:
        raise ValueError(
            f"a question has '{{prompt}}' where the prompt goes, got {{{wrong[0]}}} in {template!r}"
        )
    return template


def ask(template: str, prompt: str) -> str:
    """The question about `prompt`. Not str.format: braces of a prompt are text."""
    return template.replace("{prompt}", prompt)
