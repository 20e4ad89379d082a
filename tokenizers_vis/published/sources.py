"""Where the files of a published checkpoint lie: on this machine, or on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def find_file(source: Path | str, name: str, *, revision: str | None = None) -> Path:
    """A file of a checkpoint, downloaded if the source is on the Hub.

    Args:
        source: the file itself; a folder that holds `name`; "owner/name" on the Hub, which holds
            `name`; or "owner/name/path", a file there.
        name: of the file, where the source does not name one.
        revision: on the Hub.

    Raises:
        FileNotFoundError: there is no such file on this machine, and it is no Hub id.
    """
    local = Path(source).expanduser()
    if local.is_file():
        return local
    if (local / name).is_file():
        return local / name
    if local.is_dir():
        raise FileNotFoundError(f"{source} is a folder without {name}; give the file itself")
    repo, inside = split_hub_id(source)
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, inside or name, revision=revision))


def split_hub_id(source: Path | str) -> tuple[str, str]:
    """The repository and the rest ("" = none) of a Hub id "owner/name/rest".

    Raises:
        FileNotFoundError: it is none.
    """
    owner, _, rest = str(source).partition("/")
    name, _, inside = rest.partition("/")
    if owner in ("", ".", "..", "~") or not name:
        raise FileNotFoundError(f"{source}: there is no such file or folder, and it is no Hub id")
    return f"{owner}/{name}", inside


def count_of(keys: Iterable[str], prefix: str, *, where: str) -> int:
    """How many of prefix.0, prefix.1, ... there are among the names of weights.

    Raises:
        ValueError: none.
    """
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = {int(match[1]) for match in map(pattern.match, keys) if match}
    if not found:
        raise ValueError(f"{where} has no weights {prefix}.0.*; is it a checkpoint of this format?")
    return max(found) + 1
