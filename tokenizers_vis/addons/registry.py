"""Finds an add-on by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from tokenizers_vis.addons.base import AddOn

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
    target = ADDONS.get(name) or (name if ":" in name else None)
    if target is None:
        close = difflib.get_close_matches(name, ADDONS, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        known = ", ".join([*ADDONS, "package.module:Class"])
        raise LookupError(f"there is no add-on '{name}'; {hint}(one of: {known})")
    module, _, attribute = target.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise LookupError(f"add-on '{name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, AddOn)):
        raise LookupError(f"add-on '{name}': {target} is no AddOn")
    known_args = [each for each in inspect.signature(found).parameters]
    for key in args or {}:
        if key not in known_args:
            close = difflib.get_close_matches(key, known_args, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            listed = ", ".join(known_args) or "none"
            raise ValueError(f"add-on '{name}' has no argument '{key}'; {hint}(one of: {listed})")
    try:
        return found(**(args or {}))
    except TypeError as error:
        raise ValueError(f"add-on '{name}': {error}") from error
