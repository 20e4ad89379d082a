"""Methods and pipelines that are not ours: of other distributions, or by their path.

A distribution registers `name = "package.module:object"` in its entry points of the group
`flowrl.methods`, `flowrl.pipelines`, `flowrl.tokenizers` or `flowrl.rewards`; nothing is imported
before its name is asked for. `rewards.registry` and `tokenizers_vis.registry` do the same for
theirs, because those packages stand without flowrl.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, Literal

from flowrl.errors import ConfigError, closest

Kind = Literal["method", "pipeline"]


def find_plugin(name: str, kind: Kind, ours: Iterable[str], *, where: str) -> Any:
    """The object that a name stands for which is none of ours.

    Args:
        name: of an entry point of the kind's group, or "package.module:Name", or "./file.py:name".
        kind: what is looked for.
        ours: names that flowrl has itself, for the message.
        where: file, key and value in the user's words.

    Raises:
        ConfigError: there is no such name, module or attribute, or it cannot be imported.
    """
    from rewards.registry import attribute

    registered = {entry.name: entry for entry in entry_points(group=f"flowrl.{kind}s")}
    try:
        if ":" in name:
            return attribute(name)
        if name in registered:
            return registered[name].load()
    except (LookupError, ImportError, AttributeError) as error:
        raise ConfigError(f"{where}: {error.args[0] if error.args else error}") from error
    raise ConfigError(
        f"{where} is not a {kind}; {closest(name, (*ours, *registered))}, or 'package.module:Name'"
    )
