"""GenEval's choice of objects, and Flow-GRPO's grades: what `rewards.shapes.score` does not hold.

The rules of a row are there (`score_detections`), once for Shapes and for real images; here is what
a real detector needs before them (`strongest`), which objects are asked for a colour (`asked`), and
another reward by the same rows (`flow_grpo_reward`). Pure: lists of detections in, numbers out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.detector import Found
from rewards.shapes.score import Box, relative_position

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def strongest(
    found: Sequence[Found], *, threshold: float, max_objects: int, max_overlap: float
) -> list[Found]:
    """The objects of an image that GenEval counts, each class from the surest on.

    Paper: GenEval, arXiv:2310.11513, with the numbers of its published evaluate_images.py.

    Args:
        found: what a detector says.
        threshold: a confidence has to be above it.
        max_objects: of a class.
        max_overlap: an object that overlaps a surer one of its class by this intersection over
            union is dropped, after `max_objects` were taken; 1 = none is.
    """
    by_class: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: -each.score):
        if each.score > threshold:
            by_class.setdefault(each.shape, []).append(each)
    kept: list[Found] = []
    for group in by_class.values():
        chosen: list[Found] = []
        for each in group[:max_objects]:
            if max_overlap >= 1 or all(iou(each.box, c.box) < max_overlap for c in chosen):
                chosen.append(each)
        kept += chosen
    return kept


def iou(box: Box, other: Box) -> float:
    """Intersection over union as GenEval has it: both ends of a box belong to it."""
    common = (*map(max, box[:2], other[:2]), *map(min, box[2:], other[2:]))
    shared = _area(common)
    return shared / (_area(box) + _area(other) - shared)


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def asked(found: Sequence[Found], row: Mapping[str, Any]) -> list[int]:
    """Which of `strongest`'s objects a row judges by colour, as indices: its surest `count`."""
    chosen: list[int] = []
    for item in row.get("include", []):
        if "color" in item:
            of_class = [i for i, each in enumerate(found) if each.shape == item["class"]]
            chosen += of_class[: item["count"]]
    return list(dict.fromkeys(chosen))


def flow_grpo_reward(found: Sequence[Found], row: Mapping[str, Any]) -> float:
    """The reward that Flow-GRPO trains on: the mean of its parts, at most 1.

    Paper: Flow-GRPO, arXiv:2505.05470, its GenEval task, and its published reward server.

    Each include item has a part for its count, 1 - |found - count| / count, which is negative above
    2 * count. If the count is right, a demanded colour has a part made in the same way and a
    demanded position one; if it is not, either is 0. `exclude` is not read: the count says it.
    As published, unlike the paper's words: a position that does not hold gives two parts, 0 and 1,
    and so costs less than one that cannot be judged; a wrong colour leaves the position out.

    Args:
        found: the objects of an image, with colours where asked.
        row: of GenEval's metadata.

    Raises:
        ValueError: the row includes nothing, or a position names no earlier item.
    """
    parts: list[float] = []
    groups: list[list[Found] | None] = []
    for item in row.get("include", []):
        count = item["count"]
        group = [each for each in found if each.shape == item["class"]]
        item_parts = [1 - abs(count - len(group)) / count]
        if len(group) != count:
            item_parts += [0.0] if "color" in item or "position" in item else []
        elif "color" in item:
            painted = sum(each.color == item["color"] for each in group)
            item_parts.append(1 - abs(count - painted) / count)
        matched = min(item_parts) == 1
        if matched and "position" in item:
            standing = _stands(group, item, groups)
            item_parts += standing
            matched = min(standing) == 1
        parts += item_parts
        groups.append(group if matched else None)
    if not parts:
        raise ValueError(f"expected 'include' in the metadata, got {dict(row)!r}")
    return sum(parts) / len(parts)


def _stands(
    group: Sequence[Found], item: Mapping[str, Any], groups: Sequence[list[Found] | None]
) -> list[float]:
    """The parts of a position: [1] if it holds, [0, 1] if not, [0] if its target is not there."""
    relation, target = item["position"]
    if not 0 <= target < len(groups):
        raise ValueError(
            f"{item['class']}: position names item {target}; expected one of the {len(groups)} "
            "before it"
        )
    targets = groups[target]
    if targets is None:
        return [0.0]
    holds = all(relation in relative_position(a.box, b.box) for a in group for b in targets)
    return [1.0] if holds else [0.0, 1.0]
