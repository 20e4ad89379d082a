"""VQAScore: the probability that a vision-language model answers "Yes" when asked for the prompt.

Paper: VQAScore, arXiv:2404.01291, eq. 1. Differs: the paper's best model, CLIP-FlanT5, is of a kind
(encoder and decoder) that transformers has no class for. Here any image-text-to-text model of
transformers with a chat template answers; scores of different models are not comparable. Reading
order: `VqaScore.score`, `rewards.vlm_local`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewards.backbones import Placement
from rewards.base import Metadata
from rewards.cards import Card
from rewards.vlm import MODEL, NUM_PARAMETERS, about_images
from rewards.vlm_local import LocalVlm

QUESTION = 'Does this figure show "{text}"? Please answer yes or no.'


class VqaScore:
    """P(answer | image, question about the prompt), at the first token of the reply.

    The question is a message of the user in the model's own chat template, after the image; the
    probability is over the whole vocabulary, not only over yes and no. The image goes to the
    processor as 8 bit RGB and is processed by its settings. Images of one prompt are asked together
    and have equally many tokens, so nothing is padded and a score does not depend on its batch.

    Args:
        model: Hub id, or a folder in transformers' format, of an image-text-to-text model with its
            processor and chat template.
        question: with "{text}" where the prompt goes.
        answer: one token of the model.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "bfloat16" (usual for these models), "float32" or "float16"; scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: a question without "{text}", an unknown dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True
    card = Card(
        name="vqa_score",
        model=f"{MODEL} (the paper's CLIP-FlanT5 cannot be loaded)",
        licence="Apache-2.0",
        paper="VQAScore, arXiv:2404.01291",
        inputs=inputs,
        range=range,
        parameters=NUM_PARAMETERS,
        preprocessing="8 bit RGB, then the model's own processor; question 'Does this figure show "
        '"..."? Please answer yes or no.\' in its chat template',
        verified="a random LLaVA of the published format against its own network with tokens and "
        "pixels by hand; not run on published weights",
    )

    def __init__(
        self,
        *,
        model: str = MODEL,
        question: str = QUESTION,
        answer: str = "Yes",
        device: str | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 8,
    ) -> None:
        if "{text}" not in question:
            raise ValueError(f'question must hold "{{text}}" for the prompt, got {question!r}')
        self.model, self.question, self.answer = model, question, answer
        self._vlm = LocalVlm(model, Placement(device, dtype, batch_size), reward="VqaScore")

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind, not one prompt per image, an answer of
                several tokens, or a model without chat template.
            OSError: the weights are neither on this machine nor to be had.
        """
        # Not str.format: braces of the prompt, or of the question, are text.
        texts = [self.question.replace("{text}", prompt) for prompt in prompts]
        index, questions = about_images(images, texts)
        scores = torch.full((len(images),), torch.nan)
        if questions:
            found = self._vlm.first_tokens(questions, [[self._vlm.token(self.answer)]])
            scores[index] = torch.tensor(found, dtype=torch.float32)[:, 0]
        return scores.to(images.device)
