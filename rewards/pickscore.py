"""PickScore: how well an image pleases people for its prompt, by a CLIP trained on their choices.

Paper: Pick-a-Pic, arXiv:2305.01569, section 4. The score is CLIP's own: the cosine of the two
embeddings times exp(logit_scale). Nothing is loaded before the first score. Reading order:
`PickScore.score`, then `rewards.clip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from rewards.backbones import Placement, score_in_batches
from rewards.base import Metadata
from rewards.cards import Card
from rewards.clip import Clip, load_clip

_SCALE = 26.0  # flow_grpo's divisor, which brings usual scores near 0 to 1


class PickScore:
    """exp(logit_scale) * cos(text, image) / 26 of every image and its prompt.

    The preprocessing is that of `rewards.clip`, by the settings of the processor.

    Args:
        model: Hub id, or a folder in transformers' format, of a CLIP model.
        processor: the same of its processor.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32" (as published), "bfloat16" or "float16", of the model; scores are float32.
        normalize: divide by 26, as flow_grpo reports it; False gives the raw score, near 22.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    # |score| is at most exp(logit_scale) / 26, which is not known before the model is loaded.
    range = (-float("inf"), float("inf"))
    higher_is_better = True
    card = Card(
        name="pickscore",
        model="yuvalkirstain/PickScore_v1, processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        licence="none stated on its model card",
        paper="Pick-a-Pic, arXiv:2305.01569, section 4",
        inputs=inputs,
        range=range,
        parameters=986_109_441,
        preprocessing="8 bit RGB; shorter side to 224 bicubic (PIL), centre crop, CLIP's mean and "
        "std; 77 tokens",
        verified="a random CLIP of the published format against PIL and torch by hand; not run on "
        "the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        dtype: str = "float32",
        normalize: bool = True,
        batch_size: int = 64,
    ) -> None:
        self.model, self.processor = model, processor
        self.normalize = normalize
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind, or not one prompt per image.
            OSError: the weights are neither on this machine nor to be had.
        """
        size = self._placement.batch_size
        return score_in_batches(self._score, images, prompts, batch_size=size)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of one forward."""
        scale = self._clip.model.logit_scale.float().exp()
        scores: Tensor = scale * self._clip.cosine(images, prompts)
        return scores / _SCALE if self.normalize else scores

    @cached_property
    def _clip(self) -> Clip:
        return load_clip(self.model, self._placement, reward="PickScore", processor=self.processor)
