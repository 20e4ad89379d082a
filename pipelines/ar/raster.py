"""One token after the other behind the words of the prompt, as LlamaGen draws images.

Paper: LlamaGen, arXiv:2406.06525, section 3.2. Differs: words have learned embeddings and see each
other (there: frozen T5 features), places of images are rotary on every axis that they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipelines.ar.generator import Generator
from pipelines.ar.orders import raster
from tokenizers_vis.blocks import KVCache, Transformer
from tokenizers_vis.tokens import Codebook, TokenLayout


@dataclass(frozen=True)
class RasterConfig:
    """Numbers of a `Raster`.

    Attributes:
        num_words: ids of the text's tokenizer.
        text_length: words that a prompt is padded or cut to.
        dim, depth, num_heads: of the transformer.
    """

    num_words: int
    text_length: int = 16
    dim: int = 192
    depth: int = 6
    num_heads: int = 6


@dataclass
class RasterState:
    """What has been read so far: a cache per block, and the number of tokens."""

    cache: list[KVCache]
    text: Tensor
    num_read: int = 0


class Raster(Generator):
    """[words | start, tokens]: the state at each position gives the law of the next token."""

    name: ClassVar[str] = "raster"
    Config = RasterConfig
    config: RasterConfig

    def __init__(self, config: RasterConfig, layout: TokenLayout, codebook: Codebook) -> None:
        super().__init__(config, layout, codebook)
        length, num_words = layout.num_tokens, config.text_length
        axes = (~layout.coords.isnan()).any(0)
        self.order = raster(length)
        self.words = nn.Embedding(config.num_words, config.dim)
        self.word_places = nn.Parameter(torch.randn(num_words, config.dim))
        self.codes = nn.Embedding(self.vocab, config.dim)
        self.first = nn.Parameter(torch.randn(config.dim))
        self.places = nn.Parameter(torch.randn(length, config.dim))
        num_axes = int(axes.sum())
        self.trunk = Transformer(
            config.dim, config.depth, num_heads=config.num_heads, rotary_axes=num_axes
        )
        self.out = nn.Linear(config.dim, self.vocab)
        for table in (self.words.weight, self.codes.weight, self.word_places, self.places):
            nn.init.normal_(table, std=0.02)
        nn.init.zeros_(self.out.bias)
        nn.init.normal_(self.out.weight, std=0.02)
        mask = torch.ones(num_words + length, num_words + length, dtype=torch.bool).tril()
        mask[:num_words, :num_words] = True
        nowhere = torch.full((num_words, num_axes), torch.nan)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer(
            "coords", torch.cat([nowhere, layout.coords[:, axes]]), persistent=False
        )

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        inputs = torch.cat([self._prompt(text), self._read(tokens[:, :-1], 1)], dim=1)
        states = self.trunk(inputs, mask=self.mask, coords=self.coords)
        return self.out(states[:, self.config.text_length :])

    def start(self, text: Tensor) -> RasterState:
        return RasterState(self.trunk.new_cache(), text)

    def step(self, state: RasterState, tokens: Tensor) -> Tensor:
        number, num_words = state.num_read, self.config.text_length
        if not number:
            inputs, here = self._prompt(state.text), slice(0, num_words + 1)
            mask = self.mask[here, here]
        else:
            inputs = self._read(tokens[:, number - 1 : number], number)
            here, mask = slice(num_words + number, num_words + number + 1), None
        states = self.trunk(inputs, mask=mask, coords=self.coords[here], cache=state.cache)
        state.num_read += 1
        return self.out(states[:, -1:])

    def _prompt(self, text: Tensor) -> Tensor:
        """[B, T + 1, D]: the words, and what the first token is drawn from."""
        first = (self.first + self.places[0]).expand(len(text), 1, -1)
        return torch.cat([self.words(text) + self.word_places, first], dim=1)

    def _read(self, tokens: Tensor, place: int) -> Tensor:
        """[B, n, D] of tokens [B, n], from each of which the one at `place` on is drawn."""
        return self.codes(tokens) + self.places[place : place + tokens.shape[1]]
