"""SigLIP: the probability that an image and its prompt belong together.

Paper: SigLIP, arXiv:2303.15343, algorithm 1; SigLIP 2, arXiv:2502.14786. Unlike CLIP's, its score
has a meaning of its own: each pair is a yes-or-no question. Reading order: `Siglip.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from rewards.backbones import Placement, pretrained_model, pretrained_processor, score_in_batches
from rewards.base import Metadata
from rewards.cards import Card
from rewards.simple import pil_images

_NUM_TOKENS = 64  # trained with texts of exactly this length, padding included and not masked
OUTPUTS = ("probability", "logit")


class Siglip:
    """sigmoid(exp(logit_scale) * cos(image, text) + logit_bias) of every image and its prompt.

    The processor's own settings decide the image's preprocessing; the published ones are: 8 bit RGB
    in PIL, both sides to the network's size (384) bicubic without keeping the aspect, mean and std
    0.5. The prompt is in lower case, padded or cut to 64 tokens, and the padding is not masked.
    The logit tells apart what the sigmoid flattens.

    Args:
        model: Hub id, or a folder in transformers' format, of a SigLIP, or a SigLIP 2 of fixed
            resolution, with its processor; the first SigLIP's tokenizer needs the package
            sentencepiece. NaFlex checkpoints are another network and are refused.
        output: "probability" in [0, 1], or "logit" before the sigmoid.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of the model; scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown output or dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True
    card = Card(
        name="siglip",
        model="google/siglip2-so400m-patch14-384",
        licence="Apache-2.0",
        paper="SigLIP 2, arXiv:2502.14786; SigLIP, arXiv:2303.15343, algorithm 1",
        inputs=inputs,
        range=range,
        parameters=1_136_008_498,
        preprocessing="8 bit RGB; both sides to 384 bicubic (PIL), mean and std 0.5; lower case, "
        "64 tokens with the padding",
        verified="a random SigLIP of the published format against PIL and torch by hand; not run "
        "on the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "google/siglip2-so400m-patch14-384",
        output: str = "probability",
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
        if output == "logit":
            self.range = (-float("inf"), float("inf"))
        self.model, self.output = model, output
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind, not one prompt per image, or a NaFlex
                checkpoint.
            OSError: the weights are neither on this machine nor to be had.
        """
        size = self._placement.batch_size
        return score_in_batches(self._score, images, prompts, batch_size=size)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of one forward."""
        model, processor = self._loaded
        pixels = processor(images=pil_images(images), return_tensors="pt")["pixel_values"]
        ids = processor(
            text=[prompt.lower() for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=_NUM_TOKENS,
            return_tensors="pt",
        )["input_ids"]
        placed = pixels.to(model.device, model.dtype)
        image = model.get_image_features(pixel_values=placed).pooler_output.float()
        text = model.get_text_features(input_ids=ids.to(model.device)).pooler_output.float()
        scale, bias = model.logit_scale.float().exp(), model.logit_bias.float()
        logit: Tensor = scale * cosine_similarity(image, text) + bias
        return logit if self.output == "logit" else logit.sigmoid()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The frozen model and its processor."""
        from transformers import AutoConfig, SiglipModel, SiglipProcessor

        processor = pretrained_processor(
            SiglipProcessor, self.model, reward="Siglip", backend="pil"
        )
        config = pretrained_processor(AutoConfig, self.model, reward="Siglip")
        if config.model_type != "siglip":
            raise ValueError(
                f"Siglip's model {self.model!r} is of type {config.model_type!r}; expected a "
                "checkpoint of fixed resolution (type 'siglip'), such as "
                "google/siglip2-so400m-patch14-384"
            )
        return pretrained_model(
            SiglipModel, self.model, self._placement, reward="Siglip"
        ), processor
