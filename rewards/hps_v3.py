"""HPSv3: how well an image pleases people for its prompt, by a Qwen2-VL trained on their choices.

Paper: HPSv3, arXiv:2508.03789, section 4. The network reads the image, the prompt and a fixed
instruction, and a head of three layers says (mu, sigma) of the image's quality at a token of its
own; the score is mu. Layout of the checkpoint and what its forward does: `rewards.qwen2_vl_reward`.
Reading order: `HpsV3.score`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.backbones import Placement, score_in_batches
from rewards.base import Metadata
from rewards.cards import Card
from rewards.qwen2_vl_reward import QwenReward, load_reward, smart_size
from rewards.simple import pil_images

_PIXELS = 256 * 28 * 28  # least and most
_TOKEN = "<|Reward|>"
# As published, spaces at the ends of lines included: the network was trained with these tokens.
INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment "
    "and give a overall score to estimate the human preference. Please provide a rating from 0 to "
    "10, with 0 being the worst and 10 being the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be "
    "considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical "
    "errors, such as abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear "
    "and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and "
    "other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color "
    "scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene "
    "should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as "
    "political, violent, or adult material. If such content is present, the image quality and "
    "satisfaction score should be the lowest possible. \n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, "
    "animal, object) align with the textual description. The subject should match the description "
    "in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, "
    "evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding "
    "elements in the image logically fit the scenario described in the prompt. The environment "
    "should support and enhance the subject without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, "
    "clothing, accessories, expressions, actions) are faithfully represented in the image. Minor "
    "deviations may be acceptable, but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are "
    "captured in the image. The generated content should not introduce elements that conflict with "
    "or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n"
    f"\nPlease provide the overall ratings of this image: {_TOKEN}\n\nEND\n"
)


class HpsV3:
    """mu of every image and its prompt.

    The preprocessing is the published one: 8 bit RGB in PIL, bicubic to about 448 x 448 pixels of
    the image's own aspect (multiples of 28), CLIP's mean and std. A prompt that holds a mark of the
    tokenizer, such as "<|im_end|>", cannot be scored.

    Args:
        model: the checkpoint, or a folder or Hub id that holds it.
        file: its name there.
        base: Hub id, or a folder, of the Qwen2-VL it was made from: its configuration, tokenizer
            and chat template are read, its weights are not.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "bfloat16" (as published), "float32" or "float16", of the Qwen2-VL; head and scores
            are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (-float("inf"), float("inf"))
    higher_is_better = True
    card = Card(
        name="hps_v3",
        model="MizzenAI/HPSv3 HPSv3.safetensors, configuration and tokenizer of "
        "Qwen/Qwen2-VL-7B-Instruct",
        licence="Apache-2.0",
        paper="HPSv3, arXiv:2508.03789",
        inputs=inputs,
        range=range,
        parameters=7_748_610_610,
        preprocessing="8 bit RGB; bicubic (PIL) to about 448 x 448 pixels in the image's aspect, "
        "CLIP's mean and std; the published instruction in Qwen2-VL's chat template",
        verified="a random checkpoint of the published layout against transformers' processor and "
        "a forward by hand; not run on the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "MizzenAI/HPSv3",
        file: str = "HPSv3.safetensors",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
    ) -> None:
        self.model, self.file, self.base = model, file, base
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1].

        Returns:
            NaN for a broken image, and for a prompt that cannot be scored.

        Raises:
            ValueError: images of another shape or kind, not one prompt per image, or a checkpoint
                of another layout.
            OSError: the weights are neither on this machine nor to be had.
        """
        size = self._placement.batch_size
        return score_in_batches(self._score, images, prompts, batch_size=size)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of one forward."""
        scores = torch.full((len(images),), torch.nan)
        index = [i for i, prompt in enumerate(prompts) if self._reward.is_plain(prompt)]
        if index:
            high, wide = smart_size(*images.shape[2:], least=_PIXELS, most=_PIXELS)
            resized = [
                np.array(image.resize((wide, high), Image.Resampling.BICUBIC))
                for image in pil_images(images[index])
            ]
            clips = [torch.from_numpy(levels).permute(2, 0, 1)[None] for levels in resized]
            # Not str.format: braces of a prompt are text.
            texts = [INSTRUCTION.replace("{prompt}", prompts[i]) for i in index]
            scores[index] = self._reward("image", clips, texts)[:, 0, 0].cpu()
        return scores

    @cached_property
    def _reward(self) -> QwenReward:
        return load_reward(
            self.model, self.file, self.base, self._placement,
            tokens=(_TOKEN,), outputs=2, lora_alpha=None, reward="HpsV3",
        )  # fmt: skip
