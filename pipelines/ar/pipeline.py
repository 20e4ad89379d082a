"""An autoregressive text-to-image model as plain callables: encode, logits, start, step, decode.

It conforms to `flowrl.protocols.TokenPipeline`; `network` is the generator, the visual tokenizer
and the words are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.ar.registry import Model, load_model, save_model

_ANY_LENGTH = 256  # the config's default, which says nothing


class Autoregressive:
    """A generator of `pipelines.ar` with its tokenizers.

    Args:
        source: Hub id or folder, as `save_model` writes it.
        revision: the Hub's branch, tag or commit.
        height, width: of the images, pixels; None, or what the visual tokenizer gives.
        max_sequence_length: of the prompts; what the model was trained with.
        dtype: of the generator.
        device: of all parts.

    Attributes:
        groups: the positions that each step draws, int64 [g] each.

    Raises:
        FileNotFoundError, LookupError, ValueError: see `load_model`; or a size that the model does
            not draw.
    """

    embeds_guidance = False

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int = _ANY_LENGTH,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._take(load_model(source, revision=revision), f"ar {source} {revision}")
        shape = self.model.tokenizer.sample_shape
        for name, asked, own in (("height", height, shape[-2]), ("width", width, shape[-1])):
            if asked not in (None, own):
                raise ValueError(f"{name}={asked}, but this model draws {own} pixels; leave it out")
        if max_sequence_length not in (_ANY_LENGTH, self.text_length):
            raise ValueError(
                f"max_sequence_length={max_sequence_length}, but this model was trained with "
                f"prompts of {self.text_length} words; leave it out"
            )
        self.network.to(device=device, dtype=dtype)
        self.model.tokenizer.to(device)

    @classmethod
    def of(cls, model: Model, *, fingerprint: str = "ar") -> Autoregressive:
        """Around a model that is there already, on its device."""
        pipeline = cls.__new__(cls)
        pipeline._take(model, fingerprint)
        return pipeline

    def _take(self, model: Model, fingerprint: str) -> None:
        self.model = model
        self.network: nn.Module = model.generator
        self.groups = model.generator.order.groups
        self.num_tokens = model.generator.order.num_tokens
        self.text_length: int = model.generator.config.text_length
        self.fingerprint = fingerprint

    def words(self, prompts: Sequence[str]) -> Tensor:
        """Int64 [P, T] of prompts, padded or cut to the model's length."""
        found = self.model.texts(
            list(prompts), padding="max_length", truncation=True, max_length=self.text_length,
            return_tensors="pt",
        )  # fmt: skip
        ids: Tensor = found["input_ids"]
        return ids

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"text": int64 [P, T]}, on the CPU."""
        return {"text": self.words(prompts)}

    def release_encoders(self) -> None:
        """Nothing: words weigh nothing."""

    def logits(
        self, network: nn.Module, tokens: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Teacher-forced logits [B, L, V] of whole sequences int64 [B, L]."""
        output: Tensor = network(tokens, conditioning["text"])
        return output

    def start(self, network: nn.Module, conditioning: Mapping[str, Tensor]) -> Any:
        """The state before the first group is drawn."""
        return network.start(conditioning["text"])  # type: ignore[operator]

    def step(self, network: nn.Module, state: Any, tokens: Tensor) -> Tensor:
        """Logits [B, g, V] of the next group; all groups before it are filled in."""
        output: Tensor = network.step(state, tokens)  # type: ignore[operator]
        return output

    def decode(self, tokens: Tensor) -> Tensor:
        """Images float32 [B, 3, H, W] in [0, 1] of int64 tokens [B, L]."""
        tokenizer = self.model.tokenizer
        with torch.no_grad():
            return tokenizer.decode(tokenizer.tokens_from_ids(tokens)).float().clamp(0, 1)

    def save_full(self, folder: Path) -> None:
        """Writes `folder/pipeline`, which this class loads."""
        save_model(self.model, folder / "pipeline")
