"""Arguments that a config gives to a function, checked against the function's own signature.

Methods, rewards and pipelines declare their options once, as keyword arguments with annotations;
`check_call` makes a misspelt or ill-typed one as clear an error as a misspelt config key.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from flowrl import yamlio
from flowrl.errors import ConfigError, closest
from flowrl.strict import type_name

_SIMPLE = (int, float, bool, str, type(None), Any)


def check_call(
    function: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    where: str,
    given: Iterable[str] = (),
) -> dict[str, Any]:
    """The keyword arguments that a config gives to a function, checked against its signature.

    Args:
        function: a function or a class; its annotations say what fits. Checked are int, float,
            bool, str, None, Literal, unions, and tuples, lists and dicts of these.
        args: names and plain values, e.g. `config.method.args`.
        where: what the arguments are in the user's words, e.g. "rl.yaml: method.args".
        given: names that the caller passes itself; a user may not give them.

    Returns:
        `args` with lists turned into tuples and ints into floats where the annotation says so;
        defaults are not filled in.

    Raises:
        ConfigError: for an unknown argument, a missing one or one whose type does not fit.
    """
    name = getattr(function, "__name__", type(function).__name__)
    taken = set(given)
    parameters = inspect.signature(function).parameters.values()
    keywords = {
        each.name: each
        for each in parameters
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY) and each.name not in taken
    }
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters)
    problems = []
    for each in args:
        if each in taken:
            problems.append(f"{where}.{each} is set by flowrl itself; remove it")
        elif each not in keywords and not is_open:
            hint = closest(each, keywords)
            problems.append(f"{where}.{each} is not an argument of {name}; {hint}")
    checked = dict(args)
    for key, parameter in keywords.items():
        annotation = _annotation(function, parameter)
        if key not in args:
            if parameter.default is parameter.empty:
                problems.append(
                    f"{where}.{key} is missing; {name} needs it: "
                    f"add '{key}: <{type_name(annotation)}>'"
                )
        elif is_simple(annotation):
            try:
                adapter = TypeAdapter(
                    annotation, config=ConfigDict(strict=True, allow_inf_nan=False)
                )
                checked[key] = adapter.validate_json(json.dumps(args[key]))
            except (ValidationError, TypeError):
                problems.append(
                    f"{where}.{key} must be {type_name(annotation)}, "
                    f"got {yamlio.show(args[key])}; correct it or leave it out"
                )
    if problems:
        raise ConfigError("\n".join(problems))
    return checked


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """A parameter's annotation; `Any` where there is none or its names exist only for checkers."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    owner = function.__init__ if inspect.isclass(function) else inspect.unwrap(function)
    owner = getattr(owner, "func", owner)
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    scope = getattr(owner, "__globals__", {})
    try:
        return get_type_hints(holder, globalns=scope, include_extras=True)["value"]
    except NameError:  # imported under TYPE_CHECKING: some library's class, which no YAML can hold
        return Any


def is_simple(annotation: Any) -> bool:
    """True for annotations whose values a YAML file can hold."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return True
    if origin is Annotated:
        return is_simple(inner[0])
    if origin in (Union, types.UnionType, tuple, list, dict):
        return all(each is Ellipsis or is_simple(each) for each in inner)
    return annotation in (*_SIMPLE, tuple, list, dict)
