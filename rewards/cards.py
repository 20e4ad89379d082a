"""What to know before using a reward model: one record per name, for people and for the docs.

A reward class that has something to tell carries a `Card` as its attribute `card`; `cards` collects
those of the registry's table.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Card:
    """Facts about a reward with its default arguments.

    Attributes:
        name: in the registry.
        model: where the weights come from, Hub id and file; "none" without weights.
        licence: of the weights, as their publisher states it.
        paper: title and arXiv id or venue.
        inputs: as the reward's.
        range: as the reward's; infinite where unbounded.
        parameters: of all networks together.
        preprocessing: what happens to image and text before the network.
        verified: against what the scores were compared, and what was not.
    """

    name: str
    model: str
    licence: str
    paper: str
    inputs: tuple[str, ...]
    range: tuple[float, float]
    parameters: int
    preprocessing: str
    verified: str

    def gigabytes(self, dtype: str = "float32") -> float:
        """Memory of the weights alone, in GB of 1e9 bytes.

        Raises:
            KeyError: a dtype other than float32, bfloat16 and float16.
        """
        return self.parameters * _BYTES[dtype] / 1e9


def cards() -> dict[str, Card]:
    """The cards of our own rewards by name, in the table's order; imports their modules."""
    from rewards.registry import _TABLE

    found = {}
    for name, (path, _) in _TABLE.items():
        module, _, attribute = path.partition(":")
        card = getattr(getattr(importlib.import_module(module), attribute), "card", None)
        if isinstance(card, Card):
            found[name] = card
    return found
