"""PickScore: how well an image pleases people for its prompt, by a CLIP trained on their choices.

Paper: Pick-a-Pic, arXiv:2305.01569, section 4. The score is CLIP's own: the cosine of the two
embeddings times exp(logit_scale). Nothing is loaded before the first score. Reading order:
`PickScore.score`, `PickScore._score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rewards.base import Metadata, check_images
from rewards.simple import pil_images

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NUM_TOKENS = 77  # CLIP's context
_SCALE = 26.0  # flow_grpo's divisor, which brings usual scores near 0 to 1


class PickScore:
    """exp(logit_scale) * cos(text, image) / 26 of every image and its prompt.

    The processor's own settings decide the preprocessing; the published ones are: the image as
    8 bit RGB in PIL, shorter side to 224 bicubic, centre crop of 224 x 224, CLIP's mean and std;
    the text padded or cut to 77 tokens. Images are rounded to the nearest of 256 levels first, as
    in the published code; they never reach the processor as floats, which it would divide by 255
    once more.

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
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.processor = model, processor
        self.device = device
        self.dtype = _DTYPES[dtype]
        self.normalize = normalize
        self.batch_size = batch_size

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1].

        Raises:
            ValueError: images of another shape or kind, or not one prompt per image.
            OSError: the weights are neither on this machine nor to be had.
        """
        check_images(images)
        if len(prompts) != len(images):
            raise ValueError(f"got {len(images)} images and {len(prompts)} prompts; give one each")
        size = self.batch_size
        parts = [
            self._score(images[i : i + size], prompts[i : i + size])
            for i in range(0, len(images), size)
        ]
        return torch.cat(parts).to(images.device)

    @torch.no_grad()
    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of one forward."""
        model, processor = self._loaded
        # Padded to a fixed length, so that a score does not depend on the batch around it.
        inputs = processor(
            images=pil_images(images),
            text=list(prompts),
            padding="max_length",
            truncation=True,
            max_length=_NUM_TOKENS,
            return_tensors="pt",
        ).to(model.device)
        image = model.get_image_features(pixel_values=inputs["pixel_values"].to(self.dtype))
        text = model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        cosine = cosine_similarity(image.pooler_output.float(), text.pooler_output.float())
        scores = model.logit_scale.float().exp() * cosine
        return scores / _SCALE if self.normalize else scores

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The frozen model and its processor."""
        from transformers import CLIPModel, CLIPProcessor

        # PIL's resize, as in the published code; torchvision's may differ by a level.
        processor = _load(CLIPProcessor, self.processor, argument="processor", backend="pil")
        model = _load(CLIPModel, self.model, argument="model", dtype=self.dtype)
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval().requires_grad_(False).to(device), processor


def _load(kind: Any, source: str, *, argument: str, **options: Any) -> Any:
    """What transformers loads from `source`; an OSError with the remedy if it cannot."""
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OSError(
            f"PickScore's {argument} {source!r} cannot be loaded: {reason[0].rstrip('.')}. "
            f"Expected a Hub id or a folder in transformers' format. Run `hf download {source}` "
            "once where there is a network, or copy that folder here and give its path as the "
            f"reward's argument {argument!r}"
        ) from error
