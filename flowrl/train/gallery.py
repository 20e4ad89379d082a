"""The report's pictures: the same prompts and the same noise before and after training.

Images are put into the page itself; large ones are made smaller. None is chosen by its result.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from flowrl.train.runfiles import JSON, RunFiles

MAX_PAIRS = 24
MAX_PIXELS = 320
_SHOWN_PIXELS = 128


class View(NamedTuple):
    """An evaluation whose samples are shown, the run that made it, and what it is called."""

    label: str
    files: RunFiles
    evaluation: JSON


def samples(files: RunFiles) -> JSON:
    """What the template needs to show the samples of the first and the last evaluation."""
    evals = files.evals[:1] if len(files.evals) == 1 else [*files.evals[:1], *files.evals[-1:]]
    return side_by_side([View(_label(each), files, each) for each in evals])


def side_by_side(views: Sequence[View]) -> JSON:
    """What the template needs to show the same prompts and noise in several evaluations.

    Args:
        views: the evaluations, of one run or of several.

    Returns:
        `pairs`, each with prompt, tag and a cell per evaluation (source, value, width); `missing`
        says why there are none or fewer.
    """
    empty: JSON = {"pairs": [], "labels": [], "reward": "", "passed": [], "width": _SHOWN_PIXELS}
    if not views:
        return empty | {"missing": "There are no samples, because there is no evaluation."}
    reward = next(iter(views[0].evaluation.get("rewards") or {}), "")
    rows = [_by_identity(view.evaluation.get("samples") or []) for view in views]
    pairs = []
    lost = 0
    for identity, sample in rows[0].items():
        if not all(identity in each for each in rows):
            continue
        cells = [
            _cell(view.files, each[identity], reward)
            for view, each in zip(views, rows, strict=True)
        ]
        lost += sum(cell is None for cell in cells)
        if None not in cells:
            pairs.append({"prompt": identity[0], "tag": sample.get("tag") or "", "cells": cells})
    shown = pairs[:MAX_PAIRS]
    return {
        "pairs": shown,
        "labels": [view.label for view in views],
        "reward": reward,
        "passed": _passed(shown),
        "width": _width(shown),
        "missing": _missing(rows, lost, is_empty=not pairs),
    }


def _missing(rows: list[dict[Any, JSON]], lost: int, *, is_empty: bool) -> str:
    if lost:
        return f"{lost} images that the evaluations name are not in the run's folder."
    if not is_empty:
        return ""
    if all(rows):
        return "The evaluations kept images of different prompts or seeds."
    return "The evaluations kept no images; eval.num_samples_shown is their number."


def _label(evaluation: JSON) -> str:
    return "before" if evaluation["step"] == 0 else f"step {evaluation['step']}"


def _by_identity(rows: list[JSON]) -> dict[tuple[str, Any, int], JSON]:
    """Samples by (prompt, seed, how many of these came before)."""
    found: dict[tuple[str, Any, int], JSON] = {}
    for row in rows:
        count = 0
        while (str(row.get("prompt", "")), row.get("seed"), count) in found:
            count += 1
        found[str(row.get("prompt", "")), row.get("seed"), count] = row
    return found


def _cell(files: RunFiles, sample: JSON, reward: str) -> JSON | None:
    """An image with its reward, or None where the image is not there."""
    path = files.folder / "eval" / str(sample.get("file"))
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            width = image.width
            if max(image.size) > MAX_PIXELS:
                small = image.convert("RGB")
                small.thumbnail((MAX_PIXELS, MAX_PIXELS))
                stream = io.BytesIO()
                small.save(stream, "JPEG", quality=88)
                data, kind = stream.getvalue(), "jpeg"
    except OSError:
        return None
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "value": (sample.get("rewards") or {}).get(reward),
        "width": width,
    }


def _passed(pairs: list[JSON]) -> list[int]:
    """Samples that pass, per evaluation; empty where the reward is not a matter of pass or fail."""
    values = [[cell["value"] for cell in pair["cells"]] for pair in pairs]
    if not values or any(value not in (0, 1) for row in values for value in row):
        return []
    return [int(sum(column)) for column in zip(*values, strict=True)]


def _width(pairs: list[JSON]) -> int:
    """Width on the page: small images at a whole multiple, so that their pixels stay squares."""
    widest = max((cell["width"] for pair in pairs for cell in pair["cells"]), default=_SHOWN_PIXELS)
    return int(widest * (_SHOWN_PIXELS // widest)) if widest <= _SHOWN_PIXELS else 160
