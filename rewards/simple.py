"""Rewards of a line or two: the smallest examples, and handy for checking a training loop."""

from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, check_images, finite_images


class Brightness:
    """Mean intensity of an image, in [0, 1]."""

    inputs = ("images",)
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True
    differentiable = True

    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]."""
        check_images(images)
        return images.float().mean(dim=(1, 2, 3))


class JpegSize:
    """Size of an image as a JPEG file of quality 95, in kB of 1000 bytes.

    Paper: DDPO, arXiv:2305.13301, the tasks compressibility and incompressibility. Differs from
    flow_grpo, which divides the former by 500.

    Args:
        compress: True = the smaller the better: minus the size.
    """

    inputs = ("images",)
    scope = "sample"
    higher_is_better = True

    def __init__(self, *, compress: bool) -> None:
        self._sign = -1 if compress else 1
        self.range = (-float("inf"), 0.0) if compress else (0.0, float("inf"))

    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image."""
        check_images(images)
        sizes = [_jpeg_bytes(image) / 1000 for image in pil_images(images.nan_to_num())]
        scores = self._sign * torch.tensor(sizes, dtype=torch.float32, device=images.device)
        return scores.where(finite_images(images), torch.nan)


def pil_images(images: Tensor) -> list[Image.Image]:
    """Images float [B, 3, H, W] in [0, 1] as 8 bit RGB, each value at the nearest of 256 levels."""
    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return buffer.tell()
