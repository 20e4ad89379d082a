"""UnifiedReward: a vision-language model trained to judge, of single images and of pairs.

Paper: UnifiedReward, arXiv:2503.05236, section 3. Its authors fine-tuned chat models on human
judgements of several data sets; what they answer is read by `rewards.vlm_answers`. The questions
are the published ones of version 1 (inference scripts of CodeGoat24/UnifiedReward); version 2.0
answers others, too, which are not here. Reading order: `UnifiedReward`, `UnifiedRewardPairs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rewards.base import Metadata
from rewards.cards import Card
from rewards.vlm import NUM_PARAMETERS, PREPROCESSING
from rewards.vlm_judge import VlmJudge, VlmPairJudge

_MODEL = "CodeGoat24/UnifiedReward-qwen-7b"

POINT = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Extract key elements from the provided text caption, evaluate their presence in the generated "
    "image using the format: 'element (type): value' (where value=0 means not generated, and "
    "value=1 means generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
PAIR = (
    "You are given a text caption and two generated images based on that caption. Your task is to "
    "evaluate and compare these images based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well each image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of each image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Compare both images using the above criteria and select the one that better aligns with the "
    "caption while exhibiting superior visual quality.\n"
    'Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and "Both '
    'images are equally good."\n'
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
FINAL_SCORE = r"Final Score:[\s*]*(\d+(?:\.\d+)?)"
CONCLUSION = r"(Image 1 is better|Image 2 is better|Both images are equally good)"
CONCLUSIONS = {
    "Image 1 is better": 1.0,
    "Image 2 is better": 0.0,
    "Both images are equally good": 0.5,
}


class UnifiedReward:
    """The "Final Score", 1 to 5, that the model gives an image for its prompt.

    Differs from Flow-GRPO's use of it, which divides by 5.

    Args:
        model: Hub id, or a folder in transformers' format, of a version that transformers can
            load (the Qwen ones); at an endpoint, the name it goes by.
        max_tokens: of an answer, which names the elements of the caption first; 512 as published.
        endpoint: None = the model runs here; else the fields of `rewards.vlm_endpoint.Endpoint`.
        device: where a model here runs; None = the current GPU, or the CPU without one.
        dtype: of a model here: "bfloat16" (as published), "float32" or "float16".
        batch_size: images per forward of a model here.

    Raises:
        ValueError: an argument that is out of its range.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (1.0, 5.0)
    higher_is_better = True
    card = Card(
        name="unified_reward",
        model=f"{_MODEL}, here or behind an OpenAI-compatible endpoint",
        licence="MIT",
        paper="UnifiedReward, arXiv:2503.05236",
        inputs=inputs,
        range=range,
        parameters=NUM_PARAMETERS,
        preprocessing=PREPROCESSING,
        verified="question and reading of answers against the published script and its examples, "
        "behind an endpoint; the answering itself as vlm_judge; not run on the published weights",
    )

    def __init__(
        self,
        *,
        model: str = _MODEL,
        max_tokens: int = 512,
        endpoint: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
    ) -> None:
        low, high = self.range
        self._judge = VlmJudge(
            model=model,
            mode="score",
            question=POINT,
            pattern=FINAL_SCORE,
            low=low,
            high=high,
            max_tokens=max_tokens,
            endpoint=endpoint,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> dict[str, Tensor]:
        """As `VlmJudge.score`: "score" and "parsed" of images float [B, 3, H, W] in [0, 1].

        Raises:
            ValueError, OSError, ConnectionError, TimeoutError: as there.
        """
        return self._judge.score(images=images, prompts=prompts)


class UnifiedRewardPairs:
    """Which of two images the model prefers: a judge of pairs, as `win_rate` takes it.

    Args:
        model: as of `UnifiedReward`, and so on.
        max_tokens: as of `UnifiedReward`.
        endpoint: as of `UnifiedReward`.
        device: as of `UnifiedReward`.
        dtype: as of `UnifiedReward`.
        batch_size: pairs per forward of a model here.

    Raises:
        ValueError: an argument that is out of its range.
    """

    inputs = ("images", "prompts")
    range = (0.0, 1.0)  # of P(first wins)
    card = replace(
        UnifiedReward.card,
        name="unified_reward_pairs",
        paper="UnifiedReward, arXiv:2503.05236; a judge of pairs, for win_rate",
        range=range,
    )

    def __init__(
        self,
        *,
        model: str = _MODEL,
        max_tokens: int = 512,
        endpoint: Mapping[str, Any] | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 4,
    ) -> None:
        self._judge = VlmPairJudge(
            model=model,
            question=PAIR,
            pattern=CONCLUSION,
            verdicts=CONCLUSIONS,
            max_tokens=max_tokens,
            endpoint=endpoint,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
        )

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata] = (),
    ) -> Tensor:
        """As `VlmPairJudge.compare`: P(first wins), float32 [B]; NaN without a conclusion.

        Raises:
            ValueError, OSError, ConnectionError, TimeoutError: as there.
        """
        return self._judge.compare(first, second, prompts)
