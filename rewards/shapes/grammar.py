"""The prompts of the Shapes world: GenEval's six skills, in GenEval's JSONL metadata.

A `Request` is what a prompt asks for. Two requests are the same *combination* when they ask for the
same picture, whatever the words ("a circle left of a square" is "a square right of a circle");
train and held-out sets share no combination. Unlike GenEval's own file, every row also carries an
`exclude` list that forbids what was not asked for, so that a crowded canvas cannot score.

Source: GenEval, arXiv:2310.11513, section 3; its evaluation_metadata.jsonl.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.shapes.render import Object, Scene, lay_out
from rewards.shapes.vocabulary import COLORS, NUMBERS, PLURALS, RELATIONS, SHAPES

SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Request:
    """What one prompt asks for: a skill and its objects as (shape, color or None, count)."""

    skill: str
    objects: tuple[tuple[str, str | None, int], ...]
    relation: str | None = None

    @property
    def combination(self) -> str:
        """The same text for every wording of the same picture."""
        objects, relation = self.objects, self.relation
        if len(objects) == 2 and objects[1] < objects[0]:
            objects = objects[::-1]
            relation = _OPPOSITE[relation] if relation else None
        return repr((self.skill, objects, relation))

    @property
    def prompt(self) -> str:
        """The English sentence, in GenEval's wording."""
        nouns = [_noun(*item) for item in self.objects]
        return "a photo of " + f" {self.relation or 'and'} ".join(nouns)

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's record: tag, include, exclude, prompt.

        Position requests follow GenEval: the reference object comes first in `include`, and the
        other one says `"position": [relation, 0]`.
        """
        ordered = self.objects[::-1] if self.relation else self.objects
        include: list[dict[str, Any]] = []
        for shape, color, count in ordered:
            include.append({"class": shape, "count": count} | ({"color": color} if color else {}))
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        asked = {shape: count for shape, _, count in self.objects}
        exclude = [
            {"class": name, "count": asked.get(name, 0) + 1} for name in (*SHAPES, "unknown")
        ]
        return {"tag": self.skill, "include": include, "exclude": exclude, "prompt": self.prompt}


def _noun(shape: str, color: str | None, count: int) -> str:
    name = shape if count == 1 else PLURALS[shape]
    first = f"{color} {name}" if color else name
    if count > 1:
        return f"{NUMBERS[count]} {first}"
    return ("an " if first[0] in "aeiou" else "a ") + first


def requests(skill: str) -> Iterator[Request]:
    """All requests of one skill, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if skill == "single_object":
        yield from (Request(skill, ((s, None, 1),)) for s in SHAPES)
    elif skill == "two_object":
        yield from (Request(skill, ((a, None, 1), (b, None, 1))) for a, b in pairs)
    elif skill == "counting":
        yield from (Request(skill, ((s, None, n),)) for s in SHAPES for n in NUMBERS)
    elif skill == "colors":
        yield from (Request(skill, ((s, c, 1),)) for s in SHAPES for c in COLORS)
    elif skill == "position":
        for (a, b), relation in itertools.product(pairs, RELATIONS):
            yield Request(skill, ((a, None, 1), (b, None, 1)), relation)
    elif skill == "color_attr":
        for (a, b), (c, d) in itertools.product(pairs, itertools.permutations(COLORS, 2)):
            yield Request(skill, ((a, c, 1), (b, d, 1)))
    else:
        raise ValueError(f"unknown skill {skill!r}; expected one of {', '.join(SKILLS)}")


def is_held_out(request: Request) -> bool:
    """Whether a combination belongs to the held-out set: the lowest fifth of its skill by hash."""
    return request.combination in _HELD_OUT[request.skill]


def split(skill: str, *, held_out: bool) -> list[Request]:
    """The requests of one skill on one side of the split, in a fixed order."""
    return [r for r in requests(skill) if is_held_out(r) == held_out]


def sample_scene(request: Request, rng: np.random.Generator, *, error_rate: float = 0.0) -> Scene:
    """Draws a picture that a request describes, or, at `error_rate`, one that differs from it.

    A wrong picture differs in one thing that the request names (a shape, a colour, a count, a
    relation, or which object has which colour), as captions collected from the web do. Colours that
    the request leaves open are drawn uniformly, distinct between two kinds of object.
    """
    if rng.random() < error_rate:
        request = _wrong(request, rng)
    objects: list[tuple[str, str]] = []
    free = list(rng.permutation(list(COLORS)))
    for shape, color, count in request.objects:
        paint = color or str(free.pop())
        objects += [(shape, paint)] * count
    return lay_out(objects, rng, relation=request.relation)


def _wrong(request: Request, rng: np.random.Generator) -> Request:
    """A request for a different picture: one named attribute changed."""
    while True:
        changed = _change(request, rng)
        if changed.combination != request.combination:
            return changed


def _change(request: Request, rng: np.random.Generator) -> Request:
    which = int(rng.integers(len(request.objects)))
    kinds = {"counting": ("count", "count", "shape"), "colors": ("color", "color", "shape"),
             "position": ("relation", "relation", "shape"),
             "color_attr": ("swap", "color", "color", "shape")}  # fmt: skip
    kind = str(rng.choice(kinds.get(request.skill, ("shape", "shape", "count"))))
    return change(request, kind, which, rng)


def change(request: Request, kind: str, which: int, rng: np.random.Generator) -> Request:
    """The request with one thing replaced by another of its kind.

    Args:
        request: what to change.
        kind: "shape", "color" or "count" of object `which`; "swap" for the colours of two objects;
            "relation".
        which: index of the object.
        rng: draws the replacement.
    """
    items = [list(item) for item in request.objects]
    relation = request.relation
    if kind == "shape":
        others = [s for s in SHAPES if all(s != item[0] for item in items)]
        items[which][0] = str(rng.choice(others))
    elif kind == "color":
        others = [c for c in COLORS if all(c != item[1] for item in items)]
        items[which][1] = str(rng.choice(others))
    elif kind == "count":
        items[which][2] = int(rng.choice([n for n in (1, 2, 3, 4) if n != items[which][2]]))
    elif kind == "swap":
        items[0][1], items[1][1] = items[1][1], items[0][1]
    elif kind == "relation":
        relation = str(rng.choice([r for r in RELATIONS if r != relation]))
    else:
        raise ValueError(f"unknown change {kind!r}; expected shape, color, count, swap or relation")
    return Request(request.skill, tuple((s, c, n) for s, c, n in items), relation)  # type: ignore[misc]


def describe(scene: Scene) -> list[tuple[str, str]]:
    """The (shape, color) pairs on a canvas, sorted: what the detector should find."""
    return sorted((item.shape, item.color) for item in scene.objects)


def _lowest_fifth(skill: str) -> frozenset[str]:
    combinations = {request.combination for request in requests(skill)}
    ranked = sorted(combinations, key=lambda c: hashlib.sha256(c.encode()).hexdigest())
    return frozenset(ranked[: max(1, round(len(ranked) / 5))])


_HELD_OUT = {skill: _lowest_fifth(skill) for skill in SKILLS}

__all__ = ["SKILLS", "Object", "Request", "change", "describe", "is_held_out", "requests",
           "sample_scene", "split"]  # fmt: skip
