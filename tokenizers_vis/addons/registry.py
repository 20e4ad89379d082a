"""Finds an add-on by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.lookup import check_arguments, find_class

# name -> module:class
ADDONS: dict[str, str] = {
    "prior": "tokenizers_vis.addons.prior:ARPrior",
    "adversarial": "tokenizers_vis.addons.adversarial:Adversarial",
    "perceptual": "tokenizers_vis.addons.perceptual:Perceptual",
    "semantic_teacher": "tokenizers_vis.addons.semantic_teacher:SemanticTeacher",
    "distill": "tokenizers_vis.addons.distill:Distill",
    "bit_prior": "tokenizers_vis.addons.bit_prior:BitPrior",
}


def make_addon(name: str, args: Mapping[str, Any] | None = None) -> AddOn:
    """The add-on of a name, one of `ADDONS` or "package.module:Class".

    Raises:
        LookupError: there is none.
        ValueError: an argument that it does not take, or that does not fit.
    """
    found: Any = find_class(name, ADDONS, AddOn, what="add-on")
    known = list(inspect.signature(found).parameters)
    check_arguments(args or {}, known, where=f"add-on '{name}'")
    try:
        return found(**(args or {}))
    except TypeError as error:
        raise ValueError(f"add-on '{name}': {error}") from error
