"""Classes by name, arguments by name, folders by name: with the closest match where there is none.

What the registries of tokenizers, add-ons and generators have in common. Errors are plain
LookupError, ValueError and FileNotFoundError.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def find_class(name: str, known: Mapping[str, str], base: type[T], *, what: str) -> type[T]:
    """The class of a name.

    Args:
        name: one of `known`, or "package.module:Class".
        known: name -> "module:class".
        base: that it derives from.
        what: it is called in errors, e.g. "tokenizer".

    Raises:
        LookupError: there is none.
    """
    target = known.get(name) or (name if ":" in name else None)
    if target is None:
        listed = [*known, "package.module:Class"]
        raise LookupError(f"there is no {what} '{name}'; {closest(name, known, listed)}")
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise LookupError(f"{what} '{name}': {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise LookupError(f"{what} '{name}': {target} is no {base.__name__}")
    return found


def check_arguments(args: Iterable[str], known: Sequence[str], *, where: str) -> None:
    """Refuses (ValueError) an argument that does not exist."""
    for key in args:
        if key not in known:
            raise ValueError(f"{where} has no argument '{key}'; {closest(key, known, known)}")


def closest(name: str, known: Iterable[str], listed: Iterable[str]) -> str:
    """A hint of what was meant, and what there is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(one of: {', '.join(listed) or 'none'})"


def local_folder(
    source: Path | str,
    *,
    revision: str | None,
    ours: Mapping[str, Path],
    files: Sequence[str] | None = None,
) -> Path:
    """The folder of a source, downloaded if it is a Hub id.

    Args:
        source: a folder, a name of `ours` or a Hub id.
        revision: on the Hub.
        ours: folders by the names that come with this repository.
        files: that are downloaded; None = all.

    Raises:
        FileNotFoundError: it is none of them.
    """
    folder, name = Path(source), str(source)
    if folder.is_dir():
        return folder
    if name in ours:
        return ours[name]
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        named = f", nor one of ours ({', '.join(ours)})" if ours else ""
        raise FileNotFoundError(f"{name}: there is no such folder, and it is no Hub id{named}")
    from huggingface_hub import snapshot_download

    allowed = None if files is None else list(files)
    return Path(snapshot_download(name, revision=revision, allow_patterns=allowed))
