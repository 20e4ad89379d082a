"""Does a picture show what its prompt asks for? GenEval's rules over any list of detections.

`include` demands at least `count` objects of a class, their colour, and their place relative to an
earlier item; `exclude` forbids reaching `count` objects of a class. The strict score is 1 when all
holds; the graded one is the share of the requirements that hold. GenEval's own rows and detections
of any detector work: a detection needs `shape`, `color`, `box` and `score`.

Paper: GenEval, arXiv:2310.11513, section 3. Differs: the published code stops looking at an item
at its first failure, which only shortens its messages; here every part is judged, for the grades.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

# Centres must differ by more than this share of the two sizes together (GenEval, section 3.2).
POSITION_THRESHOLD = 0.1
# The rest of the offset must point along the axis with at least this cosine (GenEval's code).
POSITION_COSINE = 0.5
_LEAST_OFFSET = 1e-3  # pixels; what is left of an offset below it is none (GenEval's code)

Box = tuple[float, float, float, float]


class Detected(Protocol):
    """What scoring reads of a detection: its class, colour, box (x0, y0, x1, y1) and confidence."""

    @property
    def shape(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def box(self) -> tuple[float, float, float, float]: ...
    @property
    def score(self) -> float: ...


@dataclass(frozen=True)
class ScoreDetail:
    """A judgement.

    Attributes:
        correct: whether all requirements hold: GenEval's score.
        fraction: the share of them that hold, in [0, 1]; 1 exactly when `correct`.
        reason: one line for each that does not hold; empty when `correct`.
    """

    correct: bool
    fraction: float
    reason: str


def score_detections(detections: Sequence[Detected], metadata: Mapping[str, Any]) -> ScoreDetail:
    """Judges the objects of one picture by one row of GenEval's metadata.

    The fraction is sum(parts) / (number of parts + number of violated `exclude` items). An include
    item with count n has a part for its count, min(found, n) / n; if it names a colour, one for the
    share of the n that has it; if it names a position, one for the share of the object pairs that
    stand so. As in GenEval, an item looks at the n most confident objects of its class. A blank
    canvas scores 0 wherever something is demanded.

    Args:
        detections: the objects found, in any order.
        metadata: `include` and optionally `exclude`, as in GenEval's evaluation_metadata.jsonl.

    Returns:
        The judgement.

    Raises:
        ValueError: if the row demands and forbids nothing, or a position names no earlier item.
    """
    include, exclude = metadata.get("include", []), metadata.get("exclude", [])
    if not include and not exclude:
        raise ValueError(f"expected 'include' or 'exclude' in the metadata, got {dict(metadata)!r}")
    by_class: dict[str, list[Detected]] = defaultdict(list)
    for detection in sorted(detections, key=lambda d: -d.score):
        by_class[detection.shape].append(detection)

    parts: list[float] = []
    reasons: list[str] = []
    chosen: list[list[Detected]] = []
    for item in include:
        chosen.append(by_class[item["class"]][: item["count"]])
        for part, reason in _judge(item, chosen):
            parts.append(part)
            reasons += [reason] if part < 1 else []
    violated = 0
    for item in exclude:
        found = len(by_class[item["class"]])
        if found >= item["count"]:
            violated += 1
            reasons.append(f"expected fewer than {item['count']} {item['class']}, found {found}")
    total = len(parts) + violated
    fraction = sum(parts) / total if total else 1.0
    return ScoreDetail(not reasons, fraction, "\n".join(reasons))


def _judge(item: Mapping[str, Any], chosen: list[list[Detected]]) -> list[tuple[float, str]]:
    """The parts of one include item: (share met, what is missing).

    Args:
        item: class, count, and optionally color and position.
        chosen: the objects of every item so far, this one last.
    """
    name, count, found = item["class"], item["count"], chosen[-1]
    parts = [(len(found) / count, f"expected {count} {name}, found {len(found)}")]
    if "color" in item:
        color = item["color"]
        painted = sum(detection.color == color for detection in found)
        parts.append((painted / count, f"expected {count} {color} {name}, found {painted}"))
    if "position" in item:
        relation, target = item["position"]
        if not 0 <= target < len(chosen) - 1:
            raise ValueError(f"{name}: position names item {target}; expected an earlier one")
        targets = chosen[target]
        standing = sum(relation in relative_position(a.box, b.box) for a in found for b in targets)
        # Objects that are missing leave their pairs unmet; what the target should have been is not
        # known here, so at least one of it is demanded.
        pairs = count * max(len(targets), 1)
        parts.append((standing / pairs, f"expected {name} {relation} its target, found "
                                        f"{standing} of {pairs} pairs so"))  # fmt: skip
    return parts


def relative_position(box: Box, other: Box) -> set[str]:
    """Where `box` stands relative to `other`: none, one or two of GenEval's four relations.

    The offset of the centres, shortened on each axis by `POSITION_THRESHOLD` times the two boxes'
    extents together, is divided by the unshortened distance; an axis counts above
    `POSITION_COSINE`.

    Args:
        box: (x0, y0, x1, y1), y downwards.
        other: the same.
    """
    corners = np.array([box, other], dtype=np.float64).reshape(2, 2, 2)
    offset = corners[0].mean(0) - corners[1].mean(0)
    extents = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * extents, 0) * np.sign(offset)
    if (np.abs(beyond) < _LEAST_OFFSET).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {
        "left of": dx < -POSITION_COSINE,
        "right of": dx > POSITION_COSINE,
        "above": dy < -POSITION_COSINE,
        "below": dy > POSITION_COSINE,
    }
    return {relation for relation, true in holds.items() if true}


def per_skill(tags: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """The mean of `values` (correct as 0/1, or fractions) for each tag, in order of appearance.

    Raises:
        ValueError: if the lengths differ.
    """
    groups: dict[str, list[float]] = {}
    for tag, value in zip(tags, values, strict=True):
        groups.setdefault(tag, []).append(float(value))
    return {tag: sum(group) / len(group) for tag, group in groups.items()}


def overall(tags: Sequence[str], values: Sequence[float]) -> float:
    """GenEval's overall score: the mean over skills of the mean within each.

    Raises:
        ValueError: if the lengths differ or there are no samples.
    """
    skills = per_skill(tags, values)
    if not skills:
        raise ValueError("expected at least one sample to average, got none")
    return sum(skills.values()) / len(skills)
