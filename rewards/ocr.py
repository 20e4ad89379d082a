"""Text in an image: how near what an OCR engine reads comes to what the prompt puts in quotes.

Paper: Flow-GRPO, arXiv:2505.05470, its text rendering task, r = max(1 - N_e / N, 0): N letters are
wanted and N_e edits lead to them from what is read. The engine is RapidOCR (PP-OCR's networks on
ONNX Runtime), whose wheel carries its weights. Reading order: `Ocr.score`, `reading_score`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rewards.backbones import shared
from rewards.base import Metadata, check_counts, check_images, finite_images
from rewards.cards import Card
from rewards.simple import pil_images

TEXT = "text"  # the key of the metadata that goes before the prompt's quotes
_QUOTED = re.compile('"([^"]+)"|“([^”]+)”')
_PARAMS = {"Global.use_cls": False, "Global.log_level": "critical"}


class Ocr:
    """The share of the wanted letters that need no edit, in what is read off an image.

    Wanted is the metadata's `text` or else the first part of the prompt in double quotes. As
    published: whitespace and case do not matter, all lines are read as one, text that is contained
    in what is read counts as read, more edits than letters count as that many, lines below a
    confidence of 0.5 are not read, and lines are not turned by 180 degrees.
    Differs: PP-OCRv6 small in RapidOCR instead of PaddleOCR 2's English model; other whitespace
    than spaces is left out, too; curly quotes are understood; an engine that fails is an error, not
    a score of 0.

    Args:
        params: options of RapidOCR by their dotted names, above its and our defaults, such as
            {"Rec.model_path": "en.onnx", "EngineConfig.onnxruntime.use_cuda": True}; YAML keys with
            dots serve.

    Raises:
        ImportError: rapidocr or onnxruntime is not installed; at the first score.
    """

    inputs = ("images", "prompts", "metadata")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True
    card = Card(
        name="ocr",
        model="PP-OCRv6_det_small and PP-OCRv6_rec_small in ONNX, inside the wheel of rapidocr "
        "(published: PaddleOCR 2, English)",
        licence="Apache-2.0",
        paper="Flow-GRPO, arXiv:2505.05470 (the reward); PP-OCR, arXiv:2009.09941",
        inputs=inputs,
        range=range,
        parameters=2_453_416 + 5_267_734,
        preprocessing="8 bit RGB; the engine's own",
        verified="run on its weights: rendered words at several sizes, right and wrong; not "
        "compared with PaddleOCR",
    )

    def __init__(self, *, params: Mapping[str, Any] | None = None) -> None:
        self._params = {**_PARAMS, **(params or {})}

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            prompts: B strings.
            metadata: B rows, or none; `text` in a row is what is wanted.

        Raises:
            ValueError: images of another shape or kind, another number of prompts or rows, or a
                sample that wants no text.
            ImportError: the engine is not installed.
        """
        check_images(images)
        rows = metadata or [{}] * len(prompts)
        check_counts({"images": images, "prompts": prompts, "rows of metadata": rows})
        wanted = [wanted_text(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        scores = torch.full((len(images),), torch.nan)
        for i in finite_images(images).nonzero().flatten().tolist():
            scores[i] = reading_score(self.read(images[i]), wanted[i])
        return scores.to(images.device)

    def read(self, image: Tensor) -> str:
        """What the engine reads in an image, float [3, H, W] in [0, 1]: its lines, joined."""
        [picture] = pil_images(image[None])
        return "".join(self._engine(picture).txts or ())

    @cached_property
    def _engine(self) -> Any:
        try:
            import_module("onnxruntime")  # rapidocr itself asks for it only when it reads
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(
                f"reward 'ocr' needs rapidocr and onnxruntime, and {error.name!r} is not "
                "installed; run `pip install rapidocr onnxruntime`",
                name=error.name,
            ) from error
        key = ("RapidOCR", *sorted((name, repr(value)) for name, value in self._params.items()))
        return shared(key, lambda: RapidOCR(params=self._params))


def wanted_text(prompt: str, row: Metadata) -> str:
    """The text that an image should show: the row's `text`, else the prompt's first quoted part.

    Raises:
        ValueError: there is neither, or it is blank.
    """
    if TEXT in row:
        wanted = str(row[TEXT])
    else:
        quoted = _QUOTED.search(prompt)
        wanted = (quoted[1] or quoted[2]) if quoted else ""
    if not plain(wanted):
        raise ValueError(
            f"expected the wanted text in double quotes in the prompt, or as {TEXT!r} in the "
            f"metadata, got {prompt!r} and {dict(row)!r}"
        )
    return wanted


def reading_score(read: str, wanted: str) -> float:
    """1 - min(edits, letters) / letters of what is read and what is wanted; 1 if it is contained.

    Paper: Flow-GRPO, arXiv:2505.05470, its text rendering task, and its published code.

    Args:
        read: all that was read.
        wanted: not blank.

    Returns:
        In [0, 1].
    """
    read, wanted = plain(read), plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """A text in lower case, without whitespace."""
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of a letter that make `b` of `a`."""
    row = list(range(len(b) + 1))  # from nothing to each beginning of b
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
            diagonal, row[j] = row[j], best
    return row[-1]
