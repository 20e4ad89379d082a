"""Captioned images as ids and words, in memory: what a generator trains on and is measured on.

Reading order: `Pairs`, `load_pairs`, `PairBatches`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl.ar.schema import DataSection
from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError, DataError
from flowrl.pretrain.batches import Batches, Cut
from rewards.shapes.captions import captioned
from rewards.shapes.vocabulary import IMAGE_SIZE
from tokenizers_vis.tokenizer import VisualTokenizer

_SHAPES_IMAGES = 20_000
_SPLIT_SEED = 0  # of what is held out: the same for every run, so that runs can be compared
_TOGETHER = 64  # images that are tokenised at once

Captioned = Iterable[tuple[str, Tensor]]  # prompts and images, float [3, H, W] in [0, 1]
Words = Callable[[list[str]], Tensor]  # prompts -> int64 [P, T]


@dataclass(frozen=True)
class Pairs:
    """N images as ids, and what is said of them.

    Attributes:
        ids: int32 [N, L].
        text: int32 [N, T], words of the prompts.
        prompts: N of them.
    """

    ids: Tensor
    text: Tensor
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def load_pairs(
    data: DataSection,
    tokenizer: VisualTokenizer,
    words: Words,
    *,
    seed: int,
    num_held_out: int,
    where: str,
) -> tuple[Pairs, Pairs]:
    """What is trained on, and other pairs that are not.

    Args:
        data: the config's section.
        tokenizer: of the images, on its device.
        words: of the prompts.
        seed: of the scenes that are rendered for training.
        num_held_out: pairs that are measured.
        where: names the config's file in errors.

    Raises:
        ConfigError: the source does not exist or holds too few images, or renders another size.
        DataError: a line or an image that cannot be read.
    """
    if data.source == "shapes":
        shape = tokenizer.sample_shape
        if shape != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ConfigError(
                f"{where}: data.source=shapes renders {IMAGE_SIZE} x {IMAGE_SIZE} images, but the "
                f"tokenizer takes {list(shape)}; name another tokenizer"
            )
        num = data.num_images or _SHAPES_IMAGES
        rng = np.random.default_rng(derive_seed(seed, "captioned scenes"))
        held_rng = np.random.default_rng(derive_seed(_SPLIT_SEED, "held-out scenes"))
        trained = captioned(num, rng, error_rate=data.error_rate)
        held_out = captioned(num_held_out, held_rng, held_out=True)
        sets = [((p, torch.from_numpy(x)) for p, _, x in drawn) for drawn in (trained, held_out)]
    else:
        sets = list(_of_file(data, tokenizer, num_held_out=num_held_out, where=where))
    first, second = (_tokenised(pairs, tokenizer, words) for pairs in sets)
    return first, second


class PairBatches(Batches):
    """Micro-batches {"ids": int64 [B, L], "text": int64 [B, T]}, some prompts left empty.

    Args:
        pairs: that are trained on.
        empty: int64 [T], the words of no prompt.
        cut: of a batch.
        seed: the run's.
        dropout: share of prompts that are left empty.
    """

    def __init__(self, pairs: Pairs, empty: Tensor, cut: Cut, *, seed: int, dropout: float) -> None:
        self.pairs = pairs
        self.empty = empty
        self.cut = cut
        self.seed = seed
        self.dropout = dropout

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        numbers, places = self.numbers(key)
        draws = np.random.default_rng(derive_seed(self.seed, "prompts", int(places[0])))
        is_left = torch.from_numpy(draws.random(len(numbers)) < self.dropout)
        index = torch.from_numpy(numbers)
        text = self.pairs.text[index].long()
        text = torch.where(is_left[:, None], self.empty, text)
        return {"ids": self.pairs.ids[index].long(), "text": text}


def _tokenised(pairs: Captioned, tokenizer: VisualTokenizer, words: Words) -> Pairs:
    device = next(tokenizer.parameters()).device
    ids, texts, prompts = [], [], []
    waiting = iter(pairs)
    while part := list(islice(waiting, _TOGETHER)):
        given = [prompt for prompt, _ in part]
        with torch.no_grad():
            tokens = tokenizer.encode(torch.stack([image for _, image in part]).to(device))
        assert tokens.ids is not None  # a generator was made for them
        ids.append(tokens.ids.to("cpu", torch.int32))
        texts.append(words(given).to(torch.int32))
        prompts += given
    return Pairs(torch.cat(ids), torch.cat(texts), tuple(prompts))


def _of_file(
    data: DataSection, tokenizer: VisualTokenizer, *, num_held_out: int, where: str
) -> Iterator[Captioned]:
    """The pairs of a JSONL file that are trained on, then those that are held out."""
    from flowrl.tokenizer.files import read_sample

    if num_held_out > data.held_out:
        raise ConfigError(
            f"{where}: eval.num_images={num_held_out}, but only data.held_out={data.held_out} "
            "images are held out; raise data.held_out"
        )
    file = Path(data.source)
    rows = read_rows(file, where=where)
    if len(rows) <= data.held_out:
        raise ConfigError(
            f"{where}: data.source={file} holds {len(rows)} images, and data.held_out="
            f"{data.held_out} of them are not trained on; lower data.held_out"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows))
    held_out = order[: data.held_out][:num_held_out]
    for chosen in (order[data.held_out :][: data.num_images], held_out):
        yield (
            (rows[i][0], read_sample(rows[i][1], tokenizer.sample_shape, (0.5, 0.5)).float() / 255)
            for i in chosen
        )


def read_rows(file: Path, *, where: str) -> list[tuple[str, Path]]:
    """Prompts and image files of a JSONL file.

    Raises:
        ConfigError: there is no such file.
        DataError: a line without a prompt or an image.
    """
    if not file.is_file():
        raise ConfigError(
            f"{where}: data.source={file}: there is no such file; give 'shapes' or a JSONL file of "
            '{"prompt": ..., "image": ...}'
        )
    rows: list[tuple[str, Path]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            rows.append((str(row["prompt"]), file.parent / row["image"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{file}, line {number}: expected {{"prompt": ..., "image": ...}}, got {line[:80]}'
            ) from error
    return rows
