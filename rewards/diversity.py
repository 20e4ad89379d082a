"""Diversity: how far a sample lies from the others of its group, in the eyes of a vision network.

Trained policies collapse onto one picture per prompt; this measures it, and as a reward resists it.
Reading order: `mean_distances`, `Diversity.score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rewards.backbones import Placement, pretrained_model, pretrained_processor, score_in_batches
from rewards.base import Metadata, check_images, check_one_prompt, finite_images
from rewards.cards import Card
from rewards.clip import load_clip
from rewards.simple import pil_images

FEATURES = ("dino", "clip")


def mean_distances(features: Tensor) -> Tensor:
    """Mean cosine distance of each row to the others, [G] in [0, 2]; NaN where there is none.

    The mean over the group is the usual diversity: the mean distance of all pairs.

    Args:
        features: float [G, D]; a row with NaN is not met by the others and gets NaN.
    """
    is_there = features.isfinite().all(1)
    unit = normalize(features[is_there], dim=1)
    # No entry above 1 and none with itself: no mean can step over the range by rounding.
    cosine = (unit @ unit.T).clamp(-1, 1).fill_diagonal_(0)
    distances = features.new_full((len(features),), torch.nan)
    if len(unit) > 1:
        distances[is_there] = 1 - cosine.sum(1) / (len(unit) - 1)
    return distances


class Diversity:
    """Mean cosine distance of a sample's features to those of the others of its group.

    A mean over a run's samples is the mean pairwise distance within groups. Features: the class
    token after the last layer norm of a DINO, or CLIP's projected image embedding.

    Args:
        features: "dino" or "clip".
        model: Hub id, or a folder in transformers' format, of the network with its processor;
            None = facebook/dinov2-base or openai/clip-vit-large-patch14. A DINOv3, such as
            facebook/dinov3-vitb16-pretrain-lvd1689m, is gated by its own licence.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of the model; scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: unknown features or dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "group"  # a call holds one group
    range = (0.0, 2.0)
    higher_is_better = True
    card = Card(
        name="diversity",
        model="facebook/dinov2-base",
        licence="Apache-2.0",
        paper="DINOv2, arXiv:2304.07193 (the features)",
        inputs=inputs,
        range=range,
        parameters=86_580_480,
        preprocessing="8 bit RGB; as the processor says: shorter side to 256 bicubic (PIL), centre "
        "crop of 224, ImageNet's mean and std",
        verified="a random DINOv2 and a random CLIP of the published formats against PIL and torch "
        "by hand; distances by hand; not run on the published weights",
    )

    def __init__(
        self,
        *,
        features: str = "dino",
        model: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {features!r}")
        default = "facebook/dinov2-base" if features == "dino" else "openai/clip-vit-large-patch14"
        self.features, self.model = features, model or default
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [G], of the images float [G, 3, H, W] in [0, 1] of ONE group.

        Returns:
            NaN for a broken image, and for one alone in its group.

        Raises:
            ValueError: several prompts, or images of another shape or kind.
            OSError: the weights are neither on this machine nor to be had.
        """
        check_images(images)
        check_one_prompt(prompts, "diversity")
        if finite_images(images).sum() < 2:
            return torch.full((len(images),), torch.nan, device=images.device)
        size = self._placement.batch_size
        return mean_distances(score_in_batches(self._embed, images, batch_size=size))

    @cached_property
    def _embed(self) -> Callable[[Tensor], Tensor]:
        """Images [B, 3, H, W] in [0, 1] -> features, float32 [B, D]."""
        if self.features == "clip":
            return load_clip(self.model, self._placement, reward="Diversity").embed_images

        from transformers import AutoImageProcessor, AutoModel

        # PIL's resize, as in `rewards.clip`; DINOv3's processor exists for torchvision only.
        processor = pretrained_processor(
            AutoImageProcessor, self.model, reward="Diversity", backend="pil"
        )
        model = pretrained_model(AutoModel, self.model, self._placement, reward="Diversity")

        def embed(images: Tensor) -> Tensor:
            pixels = processor(images=pil_images(images), return_tensors="pt")["pixel_values"]
            output = model(pixel_values=pixels.to(model.device, model.dtype))
            features: Tensor = output.pooler_output
            return features.float()

        return embed
