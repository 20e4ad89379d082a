"""A vision-language model of transformers, in this process.

Any image-text-to-text model with a chat template. Questions of the same text and image sizes have
equally many tokens and go through the model together, so nothing is padded and an answer does not
depend on its batch. Reading order: `LocalVlm.answers`, `LocalVlm.first_words`,
`LocalVlm.first_tokens`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch

from rewards.backbones import Placement, pretrained_model, pretrained_processor
from rewards.vlm import MODEL, Answer, Question

T = TypeVar("T")

_SPACES = "Ġ▁Ċ \n"  # as tokenizers of bytes, and sentencepiece, write spaces and a line break


class LocalVlm:
    """See `rewards.vlm.Vlm`.

    Args:
        model: Hub id, or a folder in transformers' format, with its processor and chat template.
        placement: where it runs; `batch_size` is questions per forward.
        reward: who asks, for the errors.
    """

    def __init__(self, model: str, placement: Placement, *, reward: str) -> None:
        self._name, self._placement, self._reward = model, placement, reward

    def answers(self, questions: Sequence[Question], *, max_tokens: int) -> list[Answer]:
        """Greedy answers, as `rewards.vlm.Vlm`.

        Raises:
            OSError: the model is neither on this machine nor to be had.
            ValueError: the model cannot chat.
        """

        def ask(batch: Sequence[Question]) -> list[Answer]:
            model, processor = self._loaded
            inputs = self._inputs(batch)
            tokens = model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False,
                temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            ended = torch.isin(tokens, self._ends).any(1).tolist()
            return [Answer(text, not end) for text, end in zip(texts, ended, strict=True)]

        return self._in_batches(ask, questions)

    def first_words(
        self, questions: Sequence[Question], words: Sequence[str]
    ) -> list[tuple[float, ...]]:
        """Probabilities over the whole vocabulary, as `rewards.vlm.Vlm`.

        Raises:
            OSError: the model is neither on this machine nor to be had.
            ValueError: the model cannot chat, or a word is no token of it.
        """
        return self.first_tokens(questions, [self._ids(word) for word in words])

    def first_tokens(
        self, questions: Sequence[Question], ids: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """For each question, the probability that the answer begins with a token of each set.

        Over the whole vocabulary, in float32.

        Args:
            questions: any number of them.
            ids: sets of tokens.

        Raises:
            OSError: the model is neither on this machine nor to be had.
            ValueError: the model cannot chat.
        """

        def ask(batch: Sequence[Question]) -> list[tuple[float, ...]]:
            model, _ = self._loaded
            logits = model(**self._inputs(batch), logits_to_keep=1).logits[:, -1]
            probability = logits.float().softmax(-1)
            columns = [probability[:, chosen].sum(1).tolist() for chosen in ids]
            return list(zip(*columns, strict=True))

        return self._in_batches(ask, questions)

    def token(self, answer: str) -> int:
        """The one token that is `answer` to the letter.

        Raises:
            OSError: the model is neither on this machine nor to be had.
            ValueError: the model cannot chat, or it spells `answer` with several tokens.
        """
        ids = self._loaded[1].tokenizer.encode(answer, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"the answer must be one token of {self._name}, but {answer!r} is {len(ids)}; "
                "choose another word"
            )
        return int(ids[0])

    @torch.no_grad()
    def _in_batches(
        self, ask: Callable[[Sequence[Question]], list[T]], questions: Sequence[Question]
    ) -> list[T]:
        """What `ask` says of questions that are alike, in the order of `questions`."""
        alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, question in enumerate(questions):
            key = (question.text, *(image.size for image in question.images))
            alike[key].append(index)
        found: dict[int, T] = {}
        size = self._placement.batch_size
        for indices in alike.values():
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                found.update(zip(batch, ask([questions[i] for i in batch]), strict=True))
        return [found[index] for index in range(len(questions))]

    def _inputs(self, questions: Sequence[Question]) -> Any:
        model, processor = self._loaded
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        *({"type": "image", "image": image} for image in question.images),
                        {"type": "text", "text": question.text},
                    ],
                }
            ]
            for question in questions
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs.to(model.device, model.dtype)

    def _ids(self, word: str) -> list[int]:
        """The tokens that are `word` but for spaces around it and upper case."""
        vocabulary = self._loaded[1].tokenizer.get_vocab()
        ids = [i for token, i in vocabulary.items() if token.strip(_SPACES).lower() == word.lower()]
        if not ids:
            raise ValueError(
                f"{self._reward}'s word {word!r} is not one token of {self._name}; choose one that "
                "is, such as 'yes'"
            )
        return ids

    @cached_property
    def _ends(self) -> torch.Tensor:
        """The tokens that end an answer, int64 [N]."""
        model, _ = self._loaded
        ids = model.generation_config.eos_token_id
        ends = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return torch.tensor(ends, dtype=torch.int64, device=model.device)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The frozen model and its processor."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = pretrained_processor(AutoProcessor, self._name, reward=self._reward)
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"{self._reward}'s model {self._name!r} has no chat template in its processor; "
                f"expected an instruction-tuned image-text-to-text model, such as {MODEL}"
            )
        model = pretrained_model(
            AutoModelForImageTextToText, self._name, self._placement, reward=self._reward
        )
        if model.config.get_text_config(decoder=True).is_encoder_decoder:
            raise ValueError(
                f"{self._reward}'s model {self._name!r} has an encoder and a decoder; expected a "
                f"model that continues its prompt, such as {MODEL}"
            )
        return model, processor
