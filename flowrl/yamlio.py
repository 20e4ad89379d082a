"""Strict YAML: what a config file may hold, read and written without surprises.

YAML 1.2's core types only. `no` and `on` are texts (so `mixed_precision: no` means what it says),
`1e-4` is a number, and dates, octals and sexagesimals do not exist. A duplicate key, a key that is
not a text or a foreign tag is a `ConfigError` with its line. Read `parse_yaml`, then `merge`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flowrl.errors import ConfigError, closest

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
_MERGE_TAG = _TAG + "merge"

# (type, pattern, first characters); tried in this order.
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolvers above instead of YAML 1.1's."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - typed by the stubs of the base class


class _Dumper(yaml.SafeDumper):
    """Quotes whatever a YAML 1.1 or 1.2 reader would take for something other than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        """True: equal lists are written out twice rather than as anchors."""
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unless they are quoted, PyYAML folds odd line breaks (U+0085, U+2028) like newlines.
    is_odd = not text.isprintable() and not text.replace("\n", "").isprintable()
    return dumper.represent_scalar(_TAG + "str", text, style='"' if is_odd else None)


_Dumper.add_representer(str, _represent_str)
for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _kind,
            re.compile(rf"^(?:{_pattern})$"),
            ["" if char == "\0" else char for char in _first],
        )


def parse_yaml(text: str, where: str) -> Any:
    """The plain value that a YAML text holds: dicts with str keys, lists, scalars.

    Args:
        text: one YAML document.
        where: names the text in errors, e.g. the file.

    Raises:
        ConfigError: for bad syntax, a duplicate key, a key that is no text, a foreign tag or a
            value that contains itself; with line and dotted key.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, (), (), where)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = error.problem or error.context or "not YAML"
        raise ConfigError(f"{where}:{line} {problem}; correct the YAML there") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: {reason}; correct the YAML there") from error
    except ValueError as error:  # a number that Python refuses, such as one of 5000 digits
        raise ConfigError(f"{where}: {error}; correct the value") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_node(
    node: yaml.Node, path: tuple[str, ...], parents: tuple[int, ...], where: str
) -> None:
    """Raise `ConfigError` for what a config cannot mean, although it is YAML."""
    place = f"{where}: line {node.start_mark.line + 1}:"
    name = ".".join(path) or "the document"
    if id(node) in parents:
        raise ConfigError(f"{place} {name} contains itself; remove the alias")
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{place} {name} has the tag {node.tag}; write a plain YAML value")
    parents = (*parents, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_node(item, (*path, str(index)), parents, where)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE_TAG:
            _check_node(value, path, parents, where)
            continue
        if key.tag != _TAG + "str":
            shown = f"{key.value!r}" if isinstance(key, yaml.ScalarNode) else "a collection"
            raise ConfigError(
                f"{where}: line {line}: a key of {name} is {shown}, which is not a text; "
                "put it in quotes"
            )
        if key.value in lines:
            dotted = ".".join((*path, key.value))
            raise ConfigError(
                f"{where}: line {line}: {dotted} is given twice, first on line "
                f"{lines[key.value]}; keep one of them"
            )
        lines[key.value] = line
        _check_node(value, (*path, key.value), parents, where)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: when the file cannot be read, is not YAML or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; {files_beside(path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error}); save it as a UTF-8 text") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); give a readable file") from error
    data = parse_yaml(text, str(path))
    if data is None:
        raise ConfigError(f"{path}: the file is empty; see configs/ for examples")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections (run:, model:, ...), got {show(data)}"
        )
    return data


def files_beside(path: Path) -> str:
    """The hint for a file that is missing: the YAML files where it was looked for."""
    folder = path.parent
    names = sorted(each.name for each in folder.glob("*.y*ml")) if folder.is_dir() else []
    return closest(path.name, names) if names else f"{folder} holds no YAML file"


def write_yaml(data: dict[str, Any], path: Path) -> None:
    """Write a plain mapping so that `read_yaml` gives it back; the file appears at once or not."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def merge(base: Any, over: Any) -> Any:
    """`over` laid upon `base`: mappings merge key by key, all else (lists too) is replaced."""
    if isinstance(over, dict):
        below = base if isinstance(base, dict) else {}
        merged = {key: merge(None, value) for key, value in below.items() if key not in over}
        return merged | {key: merge(below.get(key), value) for key, value in over.items()}
    if isinstance(over, list):
        return [merge(None, value) for value in over]
    return over


def leaves(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value that is not itself a mapping with keys; lists count as one value."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    else:
        yield path


def show(value: Any) -> str:
    """A value as a message quotes it: YAML's words, its kind, at most some 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true (bool)" if value else "false (bool)"
    name = type(value).__name__
    kind = "mapping" if name == "dict" else name
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind})"
