"""CLIPScore: the cosine of an image and its prompt, as the paper scales it or as torchmetrics does.

Reading order: `VARIANTS`, `ClipScore.score`, then `rewards.clip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from rewards.backbones import Placement, score_in_batches
from rewards.base import Metadata
from rewards.cards import Card
from rewards.clip import Clip, load_clip


@dataclass(frozen=True)
class Variant:
    """How a cosine becomes a score.

    Attributes:
        prefix: put before each prompt.
        weight: times the cosine.
        floor: cosines below it count as it.
    """

    prefix: str
    weight: float
    floor: float


VARIANTS = {
    "paper": Variant("A photo depicts ", 2.5, 0.0),
    "torchmetrics": Variant("", 100.0, -1.0),
}


class ClipScore:
    """2.5 * max(cos(image, "A photo depicts " + prompt), 0) of every image and its prompt.

    Paper: CLIPScore, arXiv:2104.08718, section 3 (equation and prefix). Differs: ViT-L/14 instead
    of the paper's ViT-B/32 (`model="openai/clip-vit-base-patch32"`), in float32 instead of half
    precision. The variant "torchmetrics" is 100 * cos without prefix and below zero, too.
    The preprocessing is that of `rewards.clip`.

    Args:
        model: Hub id, or a folder in transformers' format, of a CLIP with its processor.
        variant: "paper" or "torchmetrics".
        prefix: put before each prompt; None = that of the variant.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of the model; scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown variant or dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (0.0, 2.5)
    higher_is_better = True
    card = Card(
        name="clip_score",
        model="openai/clip-vit-large-patch14",
        licence="MIT (its publisher's repository); deployment is called out of scope",
        paper="CLIPScore, arXiv:2104.08718",
        inputs=inputs,
        range=range,
        parameters=427_616_513,
        preprocessing="8 bit RGB; shorter side to 224 bicubic (PIL), centre crop, CLIP's mean and "
        "std; prefix 'A photo depicts ', 77 tokens",
        verified="a random CLIP of the published format against PIL and torch by hand; not run on "
        "the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-large-patch14",
        variant: str = "paper",
        prefix: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        chosen = VARIANTS[variant]
        self.range = (chosen.weight * chosen.floor, chosen.weight)
        self.model = model
        self._variant = chosen
        self._prefix = chosen.prefix if prefix is None else prefix
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
        cosine = self._clip.cosine(images, [self._prefix + prompt for prompt in prompts])
        return self._variant.weight * cosine.clamp(min=self._variant.floor)

    @cached_property
    def _clip(self) -> Clip:
        return load_clip(self.model, self._placement, reward="ClipScore")
