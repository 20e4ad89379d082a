"""From plain data to a frozen record, refusing what does not fit.

pydantic does the checking, in strict JSON mode: a list becomes a tuple and an int a float, but
nothing else is converted. The work here is to say what is wrong in the user's own terms. Reading
order: `apply_overrides`, `interpolate`, `validate`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from flowrl import yamlio
from flowrl.errors import ConfigError, closest

Model = TypeVar("Model", bound=BaseModel)
Key = tuple[str, ...]

_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


class Record(BaseModel):
    """Base of every configuration record: frozen, strict, finite, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )


# --------------------------------------------------------------------------- overrides


def apply_overrides(
    data: dict[str, Any], overrides: Iterable[str], where: str
) -> tuple[dict[str, Any], dict[Key, str]]:
    """`data` with dotted `key=value` texts laid over it.

    A value is YAML and replaces what was there, mappings and lists as a whole. An entry of a list
    is `rewards.0.weight` or `rewards[0].weight`. A text that is a JSON object stands for many
    overrides and is laid over `data` as another file would be: its mappings merge key by key. That
    is what a sweep's agent writes for `${args_json}`. Whether a key exists is for `validate` to
    say.

    Args:
        data: the files' content; not changed.
        overrides: texts such as "optim.lr=1e-4" or '{"optim.lr": 1e-4, "model": {"id": "a"}}'.
        where: names the file in errors.

    Returns:
        The new content, and for each key set the words that name its override in errors.

    Raises:
        ConfigError: for a text without '=', an empty value, a key given twice, or a key that
            leads through something that has no keys.
    """
    merged: dict[str, Any] = yamlio.merge({}, data)
    sources: dict[Key, str] = {}
    for text in overrides:
        read = _read_json if text.lstrip().startswith("{") else _read_pair
        for name, value, source in read(text, where):
            key = tuple(re.sub(r"\[(\d+)\]", r".\1", name).split("."))
            if not all(key):
                raise ConfigError(f"{source}: expected key=value, such as optim.lr=1e-4")
            for earlier in sources:
                if earlier[: len(key)] == key:
                    raise ConfigError(
                        f"{source}: {'.'.join(earlier)} was already set by an earlier override, "
                        "which would do nothing; keep one of them"
                    )
            _assign(merged, key, value, source)
            sources[key] = source
    return merged, sources


def _read_pair(text: str, where: str) -> list[tuple[str, Any, str]]:
    """(dotted key, value, words for errors) of one "key=value"."""
    source = f"{where}, override '{text}'"
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise ConfigError(f"{source}: expected key=value, such as optim.lr=1e-4")
    if not value.strip():
        raise ConfigError(
            f"{source}: {name} has no value; write {name}=null for none, {name}='\"\"' for an "
            "empty text"
        )
    return [(name, yamlio.parse_yaml(value, source), source)]


def _read_json(text: str, where: str) -> list[tuple[str, Any, str]]:
    """(dotted key, value, words for errors) of every leaf of a JSON object."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{where}, override '{text}': expected key=value or a JSON object ({error}); write it "
            """as {"optim.lr": 1e-4}"""
        ) from error
    rows = []
    for path in yamlio.leaves(data):
        value = data
        for part in path:
            value = value[part]
        name = ".".join(path)
        rows.append((name, value, f"{where}, override '{name}={json.dumps(value)}'"))
    return rows


def _assign(data: dict[str, Any], key: Key, value: Any, source: str) -> None:
    """Set one dotted key inside fresh plain data, making the sections on the way."""
    node: Any = data
    for depth, part in enumerate(key):
        above = ".".join(key[:depth])
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                indices = ", ".join(str(index) for index in range(len(node)))
                raise ConfigError(
                    f"{source}: {above}.{part} does not exist, the list has the entries "
                    f"[{indices}]; choose one of them or set the whole list"
                )
            slot: Any = int(part)
        elif isinstance(node, dict):
            slot = part
            following = key[depth + 1] if depth + 1 < len(key) else ""
            if node.get(part) is None and following:
                if following.isdecimal():
                    raise ConfigError(
                        f"{source}: {'.'.join(key[: depth + 1])} has no entries to override; "
                        "set the whole list"
                    )
                node[part] = {}
        else:
            raise ConfigError(
                f"{source}: {above} is {yamlio.show(node)}, which has no keys of its own"
            )
        if depth + 1 == len(key):
            node[slot] = value
        node = node[slot]


def interpolate(data: dict[str, Any], where: str, sources: Mapping[Key, str]) -> dict[str, Any]:
    r"""`data` with `${section.key}` replaced by what it names; `\${` stands for a plain `${`.

    Args:
        data: nested dicts, lists and scalars.
        where: names the file in errors.
        sources: as in `validate`.

    Raises:
        ConfigError: when an interpolation cannot be read, or names nothing or itself.
    """
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        key = re.sub(r"\[(\d+)\]", r".\1", getattr(error, "full_key", None) or "")
        reason = str(error).splitlines()[0] if str(error) else "it refers to itself"
        raise ConfigError(
            f"{_source(tuple(key.split('.')), where, sources)}: {key or 'an interpolation'}: "
            f"{reason}; name an existing key as "
            "${section.key}, or write \\${ for a plain ${"
        ) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def escape(data: Any) -> Any:
    r"""Plain data that `interpolate` turns back into `data`: `${` becomes `\${`."""
    if isinstance(data, dict):
        return {key: escape(value) for key, value in data.items()}
    if isinstance(data, list):
        return [escape(value) for value in data]
    if isinstance(data, str):  # OmegaConf halves the backslashes before ${ and no others
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", data)
    return data


# --------------------------------------------------------------------------- records


def validate(
    model: type[Model],
    data: dict[str, Any],
    *,
    where: str,
    sources: Mapping[Key, str],
    has_overrides: bool = True,
) -> Model:
    """The record that plain data describes.

    Args:
        model: the root record.
        data: nested dicts, lists and scalars.
        where: names the file in errors.
        sources: words for keys that came from elsewhere (a base file, an override); the longest
            prefix of a key counts.
        has_overrides: a missing key may also be given by an override.

    Raises:
        ConfigError: one for all problems, a line each.
    """
    try:
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        found = error.errors(include_url=False)
    # A list whose entries fail is also reported as too short; the entries say it better.
    inner = {problem["loc"][:length] for problem in found for length in range(len(problem["loc"]))}
    problems = [
        _explain(model, problem, where, sources, has_overrides)
        for problem in found
        if problem["loc"] not in inner or not problem["loc"]
    ]
    raise ConfigError("\n".join(dict.fromkeys(problems)))


def _source(parts: Key, where: str, sources: Mapping[Key, str]) -> str:
    """Where a key was set: the longest known prefix of it, else something below it."""
    for length in range(len(parts), 0, -1):
        if parts[:length] in sources:
            return sources[parts[:length]]
    return next((words for key, words in sources.items() if key[: len(parts)] == parts), where)


def _explain(
    model: type[BaseModel],
    problem: Any,
    where: str,
    sources: Mapping[Key, str],
    has_overrides: bool,
) -> str:
    """One of pydantic's findings as a sentence: place, key, expected, arrived, remedy."""
    parts = tuple(str(part) for part in problem["loc"])
    source = _source(parts, where, sources)
    kind, arrived = problem["type"], problem["input"]
    if kind == "value_error":  # raised by a validator of ours, which names its keys
        return f"{source}: {problem['ctx']['error']}"
    owner, field, known = _locate(model, parts)
    key = ".".join(parts)
    if kind == "extra_forbidden":
        hint = _hint(model, owner, parts[-1])
        return f"{source}: {key} is not a key of {_title(parts)}; {hint}"
    if field is None:
        return f"{source}: {problem['msg']}, got {yamlio.show(arrived)}; see configs/ for examples"
    expected = field_type(field)
    if kind == "missing" and parts == known:
        return (
            f"{source}: {key} is missing ({field.description}); "
            f"add '{known[-1]}: <{expected}>' to {_title(parts)}"
            + (f", or the override {key}=..." if has_overrides else "")
        )
    remedy = f"it is the {field.description}"
    if kind == "missing":  # an entry of a list of fixed length
        key, remedy = ".".join(known), "give every entry"
    elif kind == "literal_error" and isinstance(arrived, str):
        remedy = closest(arrived, [str(each) for each in _choices(field.annotation)])
    elif kind in ("model_type", "dict_type"):
        remedy = "indent its keys below it, or leave it out"
    elif kind == "finite_number":
        remedy = "it must be finite"
    elif kind == "string_type" and arrived is not None:
        remedy = "put it in quotes if it is meant as a text"
    elif kind == "bool_type":
        remedy = "write true or false"
    elif kind in ("too_short", "string_too_short"):
        remedy = "it must not be empty"
    elif kind.startswith(("int", "float")) and isinstance(arrived, str):
        remedy = "write a plain number such as 10 or 1e-4"
    if parts != known:  # an entry of a list
        expected = f"an entry of {expected}" if kind != "missing" else expected
    return f"{source}: {key} must be {expected}, got {yamlio.show(arrived)}; {remedy}"


def _title(parts: Key) -> str:
    return f"section '{'.'.join(parts[:-1])}'" if len(parts) > 1 else "a config"


def _hint(root: type[BaseModel], owner: type[BaseModel], name: str) -> str:
    """The closest sibling, else the same key in another section, else the list of siblings."""
    siblings = list(owner.model_fields)
    if not difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        for key, _ in fields(root):
            if key.rpartition(".")[2] == name:
                return f"did you mean '{key}'? (keys here: {', '.join(siblings)})"
    return closest(name, siblings)


def _locate(model: type[BaseModel], parts: Key) -> tuple[type[BaseModel], FieldInfo | None, Key]:
    """The record and field that a location lies in, and the part of it that names the field."""
    owner, field, known = model, None, parts[:0]
    for depth, part in enumerate(parts):
        below = record_of(field.annotation) if field is not None else None
        if field is not None and below is None:
            break
        if below is not None:
            if part.isdecimal():
                continue
            owner = below
        if part not in owner.model_fields:
            return owner, None, parts[: depth + 1]
        field, known = owner.model_fields[part], parts[: depth + 1]
    return owner, field, known


def record_of(annotation: Any) -> type[BaseModel] | None:
    """The record inside an annotation such as `Record`, `tuple[Record, ...]` or `... | None`."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = record_of(inner)
        if found is not None:
            return found
    return None


def fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Every field below a record with its dotted key; `[]` marks the entries of a list."""
    rows: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        below, key = record_of(field.annotation), prefix + name
        is_section = below is field.annotation
        if not is_section:
            rows.append((key, field))
        if below is not None:
            rows += fields(below, f"{key}{'' if is_section else '[]'}.")
    return rows


# --------------------------------------------------------------------------- types in words


def field_type(field: FieldInfo) -> str:
    """A field's type with its bounds, e.g. "int >= 1 or null"."""
    bounds = " and ".join(_bounds(field.metadata))
    name = type_name(field.annotation)
    base, null, _ = name.partition(" or null")
    return f"{base} {bounds}{null}" if bounds else name


def _bounds(metadata: Iterable[Any]) -> list[str]:
    return [
        f"{sign} {getattr(each, attribute):g}"
        for each in metadata
        for attribute, sign in _BOUNDS
        if getattr(each, attribute, None) is not None
    ]


def type_name(annotation: Any) -> str:
    """An annotation in the words of a config file: "list of int", "'a' or 'b'", "mapping"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is type(None) or annotation is None:
        return "null"
    if annotation is Any:
        return "any"
    if origin is Annotated:
        return " ".join([type_name(inner[0]), " and ".join(_bounds(inner[1:]))]).strip()
    if origin is Literal:
        return " or ".join(repr(each) for each in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(each) for each in inner)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return f"list of {len(inner)} ({', '.join(type_name(each) for each in inner)})"
    if origin in (tuple, list):
        name = type_name(inner[0])
        return f"list of {name}s" if name == "section" else f"list of {name}"
    if origin is dict or annotation is dict:
        return "mapping"
    if record_of(annotation) is annotation:
        return "section"
    return getattr(annotation, "__name__", str(annotation))


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return sum((_choices(each) for each in get_args(annotation)), ())
