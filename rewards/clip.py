"""CLIP, once: the embeddings and cosines that several rewards are made of.

Paper: CLIP, arXiv:2103.00020. The processor's own settings decide the preprocessing; the published
ones are: the image as 8 bit RGB in PIL, shorter side to 224 bicubic, centre crop of 224 x 224,
CLIP's mean and std; the text padded or cut to 77 tokens. Images are rounded to the nearest of 256
levels first, as if read from a file; they never reach the processor as floats, which it would
divide by 255 once more. Reading order: `Clip.cosine`, `load_clip`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rewards.backbones import Placement, pretrained_model, pretrained_processor
from rewards.simple import pil_images

NUM_TOKENS = 77  # CLIP's context
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A CLIP of transformers with its processor."""

    model: Any
    processor: Any

    def embed_images(self, images: Tensor) -> Tensor:
        """Projected embeddings, float32 [B, D], of unnormalised length; images in [0, 1]."""
        return self.embed_pictures(pil_images(images))

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """As `embed_images`, of B pictures that may differ in size."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        placed = pixels.to(self.model.device, self.model.dtype)
        return _float32(self.model.get_image_features(pixel_values=placed))

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Projected embeddings, float32 [B, D], of unnormalised length."""
        # Padded to a fixed length, so that a score does not depend on the batch around it.
        inputs = self.processor(
            text=list(prompts),
            padding="max_length",
            truncation=True,
            max_length=NUM_TOKENS,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        return _float32(features)

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each image and its prompt, float32 [B] in [-1, 1]."""
        cosine = cosine_similarity(self.embed_images(images), self.embed_texts(prompts))
        return cosine.clamp(-1, 1)  # rounding may step over


def load_clip(
    model: str,
    placement: Placement,
    *,
    reward: str,
    processor: str | None = None,
    argument: str = "model",
) -> Clip:
    """The CLIP of Hub id or folder `model`; processor None = it lies beside the model.

    `argument` is the argument of `reward` that `model` came from, for the error.

    Raises:
        OSError: either is neither on this machine nor to be had.
    """
    from transformers import CLIPModel, CLIPProcessor

    source, origin = (model, argument) if processor is None else (processor, "processor")
    # PIL's resize, as in the published code; torchvision's may differ by a level.
    processing = pretrained_processor(
        CLIPProcessor, source, reward=reward, argument=origin, backend="pil"
    )
    network = pretrained_model(CLIPModel, model, placement, reward=reward, argument=argument)
    return Clip(network, processing)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """Pixels, float32 [B, 3, size, size] on the CPU, as OpenAI's own CLIP code makes them.

    In PIL: shorter side to `size` bicubic, the longer one cut to whole pixels, centre crop (an odd
    remainder is rounded half to even, as torchvision does); then CLIP's mean and std.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        size: of the square.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    new_height, new_width = size * height // short, size * width // short
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    box = (left, top, left + size, top + size)
    resized = [
        image.resize((new_width, new_height), Image.Resampling.BICUBIC).crop(box)
        for image in pil_images(images)
    ]
    return normalized(torch.stack([_levels(image) for image in resized]) / 255)


def normalized(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1], less CLIP's mean and over its std."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def _levels(image: Image.Image) -> Tensor:
    """A PIL image as float32 [3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def _float32(output: Any) -> Tensor:
    features: Tensor = output.pooler_output
    return features.float()
