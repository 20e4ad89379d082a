"""The interface of every tokenizer, and how one is saved and loaded.

A tokenizer encodes images to tokens, decodes tokens to images, and returns named, weighted losses
for its training. `encode` is a pure function unless `sample` is asked for; whatever draws numbers
takes a generator. Reading order: `VisualTokenizer`, `TokenizerOutput`, `Solver`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokens import Codebook, TokenLayout, Tokens
from tokenizers_vis.usage import usage


@dataclass(frozen=True)
class Solver:
    """How a generative decoder samples.

    Attributes:
        num_steps: evaluations of its network (twice that with guidance).
        guidance_scale: uncond + scale * (cond - uncond); 1.0 = off.
    """

    num_steps: int = 20
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"a decoder needs at least 1 step, got {self.num_steps}")


@dataclass(frozen=True)
class TokenizerOutput:
    """What a training forward gives.

    Attributes:
        tokens: with gradient; the mask says what was kept.
        losses: name -> weight and scalar.
        reconstruction: [B, 3, H, W] (or clips) in about [0, 1], with gradient; None where the
            decoder is generative and its loss needs no sample.
        metrics: name -> scalar, detached.
    """

    tokens: Tokens
    losses: dict[str, LossTerm]
    reconstruction: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The weighted sum: the one place where weights are applied."""
        return torch.stack([term.weighted for term in self.losses.values()]).sum()

    def with_losses(self, losses: dict[str, LossTerm]) -> TokenizerOutput:
        """With further terms.

        Raises:
            ValueError: a name is there already.
        """
        if twice := self.losses.keys() & losses.keys():
            raise ValueError(f"two losses are called {sorted(twice)}")
        return replace(self, losses={**self.losses, **losses})


def pixel_losses(drawn: Tensor, images: Tensor, *, l1: float, l2: float) -> dict[str, LossTerm]:
    """Mean absolute and mean squared error of reconstructions, with their weights."""
    return {
        "pixel_l1": LossTerm(l1, (drawn - images).abs().mean()),
        "pixel_l2": LossTerm(l2, (drawn - images).square().mean()),
    }


class VisualTokenizer(nn.Module, ABC):
    """Base of all tokenizers. A tokenizer has a frozen record of its numbers, `Config`.

    Weights are float32; for speed use autocast, under which embeddings and images are float32 and
    codes are chosen in float32 all the same. Weights cast to half precision are not served.

    Args:
        config: of the tokenizer.
        layout: of all its tokens.
        codebooks: what a token of a segment can be. Those that segments name agree in `dim` and
            `groups`, because the tokens of an image are one tensor; vocabularies may differ.
        token_counts: the numbers of tokens that it can keep, ascending; the last is all.
        sample_shape: of one image (3, H, W), or of one clip (F, 3, H, W). Tokenizers that take
            other sizes, too, say so in `accepts`.
        is_generative: whether `decode` samples, and so takes a `Solver` and a generator.

    Raises:
        ValueError: a segment without its codebook, or codebooks that do not fit one tensor.
    """

    Config: ClassVar[type[Any]]
    name: ClassVar[str]
    is_decodable: ClassVar[bool] = True  # False: its tokens are for a language model to read

    def __init__(
        self,
        config: Any,
        *,
        layout: TokenLayout,
        codebooks: Sequence[Codebook],
        token_counts: Sequence[int] | None = None,
        sample_shape: Sequence[int],
        is_generative: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.codebooks = _checked(codebooks, layout)
        self.token_counts = tuple(token_counts or (layout.num_tokens,))
        self.sample_shape = tuple(sample_shape)
        self.is_generative = is_generative

    # ------------------------------------------------------------------ what a tokenizer writes

    @abstractmethod
    def _encode(
        self, images: Tensor, num_tokens: int, *, sample: bool, generator: torch.Generator | None
    ) -> Tokens:
        """The tokens of checked images in [0, 1]; at least the first `num_tokens` of them."""

    @abstractmethod
    def _decode(
        self, tokens: Tokens, *, solver: Solver | None, generator: torch.Generator | None
    ) -> Tensor:
        """Images in about [0, 1]; must not look at what lies beyond the mask."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [B, L, C] of ids, equal to those that `encode` gave with them.

        Ids stand at the layout's positions: `layout.codebook` says which codebook each is of.
        """

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        *,
        progress: float = 0.0,
        num_tokens: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenizerOutput:
        """One training forward.

        Args:
            images: as `encode`'s.
            progress: of the training, in [0, 1]; carries every schedule.
            num_tokens: int64 [B], tokens that each image keeps; None = all.
            generator: of everything that is drawn.
        """

    # ------------------------------------------------------------------ what a user calls

    def encode(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tokens:
        """The tokens of images; gradients reach the encoder unless they are off.

        Args:
            images: float [B, *sample_shape] in [0, 1].
            num_tokens: of `token_counts`; None = all.
            sample: draw where the choice of a code is stochastic; else the likeliest code.
            generator: of the draws.

        Raises:
            ValueError: images of another shape, or a number of tokens that it cannot keep.
        """
        self.check_samples(images)
        chosen = self.token_counts[-1] if num_tokens is None else num_tokens
        if chosen not in self.token_counts:
            raise ValueError(
                f"{self.name} keeps {_listed(self.token_counts)} tokens, not {num_tokens}"
            )
        tokens = self._encode(images, chosen, sample=sample, generator=generator)
        # All are all of the image: one of another size than `layout`'s may have more.
        return tokens if chosen == self.token_counts[-1] else tokens.keep(chosen)

    def decode(
        self,
        tokens: Tokens,
        *,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images float32 [B, *sample_shape] in [0, 1].

        Args:
            tokens: of this tokenizer.
            solver: of a generative decoder; None = its own default.
            generator: of a generative decoder's noise; None = a fixed seed.

        Raises:
            ValueError: a solver for a decoder that does not sample.
        """
        if solver is not None and not self.is_generative:
            raise ValueError(f"{self.name} decodes in one forward; it takes no solver")
        return self._decode(tokens, solver=solver, generator=generator).float().clamp(0, 1)

    def tokens_from_ids(self, ids: Tensor, length: Tensor | None = None) -> Tokens:
        """Tokens of ids that a model made.

        Args:
            ids: int64 [B, L] or [B, L, G]; fewer than all positions: the others are masked.
            length: int64 [B], how many of them count; None = all that are given.

        Raises:
            ValueError: ids of another shape, or outside the codebook.
        """
        groups = self.codebooks[self.layout.segments[0].codebook].groups
        expected = 3 if groups > 1 else 2
        total = self.layout.num_tokens
        if ids.dtype != torch.int64 or ids.ndim != expected or ids.shape[1] > total:
            shape = ["B", f"<= {total}", groups][:expected]
            raise ValueError(f"expected int64 ids {shape}, got {ids.dtype} {list(ids.shape)}")
        self._check_range(ids)
        given = ids.shape[1]
        padding = (0, total - given) if expected == 2 else (0, 0, 0, total - given)
        padded = nn.functional.pad(ids, padding)
        position = torch.arange(total, device=ids.device)
        kept = torch.full((len(ids),), given, device=ids.device) if length is None else length
        mask = position < kept.clamp(max=given)[:, None]
        return Tokens(self.embed(padded), mask, self.layout, padded)

    def usage(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, float]:
        """How the codes are used: see `usage.usage`. By codebook where there are several.

        Args:
            ids: int64 [B, L] or [B, L, G]; or of the first positions only.
            mask: bool [B, L]; None = all count.

        Returns:
            name -> number; with several codebooks "segment/name", after the first segment of each.
        """
        segments = self.layout.segments
        numbers = list(dict.fromkeys(segment.codebook for segment in segments))
        if len(numbers) == 1:
            return usage(ids, self.codebooks[numbers[0]], mask)
        found: dict[str, float] = {}
        owner = self.layout.codebook[: ids.shape[1]].to(ids.device)
        for number in numbers:
            name = next(segment.name for segment in segments if segment.codebook == number)
            own = owner == number
            if not own.any():  # ids of a prefix without this codebook
                continue
            cut = None if mask is None else mask[:, own]
            each = usage(ids[:, own], self.codebooks[number], cut)
            found |= {f"{name}/{key}": value for key, value in each.items()}
        return found

    @property
    def bits(self) -> float:
        """Of all tokens of an image; infinite where they are continuous."""
        return self.bits_of(self.layout.num_tokens)

    def bits_of(self, num_tokens: int) -> float:
        """Of the first tokens of an image."""
        codebooks = [
            self.codebooks[segment.codebook].bits
            for segment in self.layout.segments
            for _ in range(segment.num_tokens)
        ]
        return math.fsum(codebooks[:num_tokens])

    def check_samples(self, images: Tensor) -> None:
        """Raises ValueError unless these are samples that the tokenizer takes."""
        if not images.is_floating_point() or not self.accepts(tuple(images.shape[1:])):
            raise ValueError(
                f"{self.name} takes float images [B, {', '.join(map(str, self.sample_shape))}] in "
                f"[0, 1], got {images.dtype} {list(images.shape)}"
            )

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes samples of this shape."""
        return shape == self.sample_shape

    @classmethod
    def from_published(cls, source: Path | str, *, revision: str | None = None) -> VisualTokenizer:
        """The tokenizer of a checkpoint in the format of those who published the method.

        Adapters of `tokenizers_vis.published` say which; in evaluation mode, on the CPU.

        Raises:
            ValueError: it reads flowrl's own format alone.
        """
        raise ValueError(
            f"{cls.name} reads what save_pretrained wrote, and no published format; the names of "
            "those that do are in tokenizers_vis.registry.TOKENIZERS"
        )

    def config_dict(self) -> dict[str, Any]:
        """The numbers of the tokenizer as plain data."""
        return asdict(self.config)

    def _check_range(self, ids: Tensor) -> None:
        for number, segment in enumerate(self.layout.segments):
            vocab = self.codebooks[segment.codebook].vocab
            part = ids[:, self.layout.slice_of(number)]
            if vocab is None:
                raise ValueError(f"{self.name} has continuous tokens: they have no ids")
            if part.numel() and not 0 <= int(part.min()) <= int(part.max()) < vocab:
                raise ValueError(
                    f"ids of '{segment.name}' must lie in [0, {vocab}), got "
                    f"{int(part.min())} to {int(part.max())}"
                )


def _checked(codebooks: Sequence[Codebook], layout: TokenLayout) -> tuple[Codebook, ...]:
    """The codebooks, if a layout's tokens can be one tensor of embeddings and one of ids."""
    numbers = {segment.codebook for segment in layout.segments}
    if missing := sorted(number for number in numbers if not 0 <= number < len(codebooks)):
        raise ValueError(f"segments name codebooks {missing} of {len(codebooks)}")
    used = [codebooks[number] for number in sorted(numbers)]
    if len({(each.dim, each.groups) for each in used}) > 1:
        raise ValueError(f"codebooks of one layout must agree in dim and groups, got {used}")
    return tuple(codebooks)


def _listed(counts: Sequence[int]) -> str:
    if len(counts) > 8 and list(counts) == list(range(counts[0], counts[-1] + 1)):
        return f"{counts[0]} to {counts[-1]}"
    return ", ".join(map(str, counts[:-1])) + (" or " if counts[:-1] else "") + str(counts[-1])
