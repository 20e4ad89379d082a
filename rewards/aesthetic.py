"""LAION's improved aesthetic predictor: how people would rate an image, from its CLIP embedding.

Source: christophschuhmann/improved-aesthetic-predictor, weights `sac+logos+ava1-l14-linearMSE`;
LAION-5B, arXiv:2210.08402, uses it. Reading order: `Aesthetic.score`, then `rewards.clip` and
`rewards.heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor, nn
from torch.nn.functional import normalize

from rewards.backbones import Placement, checkpoint_file, load_tensors, score_in_batches
from rewards.base import Metadata
from rewards.cards import Card
from rewards.clip import Clip, load_clip
from rewards.heads import linear_head


class Aesthetic:
    """Predicted rating of every image, about 1 to 10 and unbounded in principle.

    The CLIP ViT-L/14 image embedding, at unit length, through linear layers of 1024, 128, 64, 16
    and 1. The image is processed as in `rewards.clip`; the published script differs in half
    precision on a GPU only. flow_grpo, DDPO and trl use the same predictor.

    Args:
        model: Hub id, or a folder in transformers' format, of the CLIP; the predictor was trained
            on this one's embeddings and on no other's.
        predictor: the predictor's file, or a folder or Hub id that holds it.
        file: its name there; `sac+logos+ava1-l14-linearMSE.pth` in the original repository.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of the CLIP; predictor and scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown dtype, or a batch_size below 1.
    """

    inputs = ("images",)
    scope = "sample"
    range = (-float("inf"), float("inf"))
    higher_is_better = True
    card = Card(
        name="aesthetic",
        model="openai/clip-vit-large-patch14 with trl-lib/ddpo-aesthetic-predictor "
        "aesthetic-model.pth (sac+logos+ava1-l14-linearMSE)",
        licence="MIT (CLIP), Apache-2.0 (predictor)",
        paper="none of its own; LAION-5B, arXiv:2210.08402",
        inputs=inputs,
        range=range,
        parameters=427_616_513 + 927_969,
        preprocessing="8 bit RGB; shorter side to 224 bicubic (PIL), centre crop, CLIP's mean and "
        "std",
        verified="a random CLIP and predictor in the published formats against PIL and torch by "
        "hand; not run on the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-large-patch14",
        predictor: str = "trl-lib/ddpo-aesthetic-predictor",
        file: str = "aesthetic-model.pth",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        self.model, self.predictor, self.file = model, predictor, file
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self,
        *,
        images: Tensor,
        prompts: Sequence[str] = (),
        metadata: Sequence[Metadata] = (),
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind, or a predictor of other embeddings.
            OSError: the weights are neither on this machine nor to be had.
        """
        return score_in_batches(self._score, images, batch_size=self._placement.batch_size)

    def _score(self, images: Tensor) -> Tensor:
        """Scores of one forward."""
        embeddings = normalize(self._clip.embed_images(images), dim=-1)
        rating: Tensor = self._head(embeddings)
        return rating.squeeze(-1)

    @cached_property
    def _clip(self) -> Clip:
        return load_clip(self.model, self._placement, reward="Aesthetic")

    @cached_property
    def _head(self) -> nn.Sequential:
        path = checkpoint_file(self.predictor, self.file, reward="Aesthetic", argument="predictor")
        head = linear_head(load_tensors(path), source=str(path))
        width, given = head[0].in_features, self._clip.model.config.projection_dim
        if width != given:
            raise ValueError(
                f"the predictor {path} reads embeddings of {width} numbers, but {self.model} gives "
                f"{given}; the published one belongs to openai/clip-vit-large-patch14"
            )
        return head.to(self._placement.torch_device)
