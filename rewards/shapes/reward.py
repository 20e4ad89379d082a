"""The verifiable reward of the Shapes world: detect the objects, score them as GenEval does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.base import Metadata, check_images, finite_images
from rewards.shapes.detect import detect
from rewards.shapes.score import ScoreDetail, score_detections
from rewards.shapes.vocabulary import IMAGE_SIZE


class ShapesReward:
    """Whether a 64 x 64 image shows what its metadata asks for.

    Paper: GenEval, arXiv:2310.11513, section 3, with the detector of `rewards.shapes.detect`.
    """

    inputs = ("images", "metadata")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True

    def __init__(self, *, graded: bool = False) -> None:
        """Strict (1 if all requirements hold, else 0), or graded (the share of them that hold)."""
        self._graded = graded

    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata]
    ) -> Tensor:
        """Scores, float32 [B]; NaN for an image that is not finite.

        Args:
            images: float [B, 3, 64, 64] in [0, 1].
            prompts: not read.
            metadata: B rows in GenEval's format.

        Raises:
            ValueError: for images of another size, or another number of rows.
        """
        details = self.judge(images=images, metadata=metadata)
        scores = [
            float("nan") if d is None else d.fraction if self._graded else float(d.correct)
            for d in details
        ]
        return torch.tensor(scores, dtype=torch.float32)

    def judge(self, *, images: Tensor, metadata: Sequence[Metadata]) -> list[ScoreDetail | None]:
        """The judgement of each image with its reasons, or None where an image is not finite.

        Args and Raises: as `score`.
        """
        check_canvases(images)
        if len(metadata) != len(images):
            raise ValueError(f"expected {len(images)} rows of metadata, got {len(metadata)}")
        arrays = images.detach().cpu().float().numpy()
        finite = finite_images(images).tolist()
        return [
            score_detections(detect(array), row) if usable else None
            for array, row, usable in zip(arrays, metadata, finite, strict=True)
        ]


def check_canvases(images: Tensor) -> None:
    """Raises ValueError unless `images` is a float tensor [B, 3, 64, 64]."""
    check_images(images)
    size = tuple(images.shape[2:])
    if size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"expected images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {size[0]} x {size[1]}"
            "; Shapes rewards read pictures of the Shapes world only: choose another reward"
        )
