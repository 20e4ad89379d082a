"""The command line that a sweep's agent makes of the file's `command` and a run's values.

An agent puts the values where the file has a macro. `${args_no_hyphens}` prints them as key=value
with Python's `str`, so a nested parameter would become one override that replaces its section, and
None a text: both are refused. `${args_json}` prints all of them as one JSON object and keeps every
type. Reading order: `parse_command`, `TrainCommand.line`, `check_printed`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import ConfigError
from flowrl.sweep.space import Dimension
from flowrl.yamlio import files_beside, parse_yaml, show

FLAT, JSON = "${args_no_hyphens}", "${args_json}"
RUN_ID = "WANDB_RUN_ID"
# Where a run of this machine writes is decided here, not by the file's command.
OWN_KEYS = ("run.name", "run.output_dir")

Values = Mapping[tuple[str, ...], Any]


@dataclass(frozen=True)
class TrainCommand:
    """A `flowrl train` with a place for a run's values.

    Attributes:
        program: all words up to and with `train`.
        config: the config file, as the command names it.
        rest: overrides, and the macro.
        macro: FLAT or JSON.
    """

    program: tuple[str, ...]
    config: Path
    rest: tuple[str, ...]
    macro: str

    def arguments(self, values: Values) -> tuple[str, ...]:
        """What follows the config file in the line that an agent runs."""
        words: list[str] = []
        for word in self.rest:
            words += print_values(values, self.macro) if word == self.macro else [word]
        return tuple(words)

    def line(self, values: Values) -> tuple[str, ...]:
        """The whole line that an agent runs, with this Python as the interpreter."""
        return (*self.program, str(self.config), *self.arguments(values))

    def local_arguments(self, values: Values, *, name: str, folder: Path) -> tuple[str, ...]:
        """The same arguments for a run that writes to `folder/name`."""
        kept = [
            word
            for word in self.arguments(values)
            if word.partition("=")[0].strip() not in OWN_KEYS
        ]
        return (*kept, f"run.name={name}", f"run.output_dir={_quoted(str(folder))}")

    def local_line(self, values: Values, *, name: str, folder: Path) -> tuple[str, ...]:
        """The same line for a run of this machine; plain `flowrl` is that of this Python."""
        program = self.program
        if program[0] == "flowrl":
            program = (sys.executable, "-m", *program)
        arguments = self.local_arguments(values, name=name, folder=folder)
        return (*program, str(self.config), *arguments)


def parse_command(command: Sequence[str], program: str, where: str) -> TrainCommand:
    """The file's `command`, which must be one of `flowrl train`.

    Args:
        command: its words.
        program: the file's `program`, for the macro of this name.
        where: names the file in errors.

    Raises:
        ConfigError: it is another command, or an agent would not expand it to what it says.
    """
    place = f"{where}: command"
    known = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable, "${program}": program}
    words = [known.get(word, word) for word in command]
    for word in words:
        is_macro = word.startswith("${") and word.endswith("}")
        if (is_macro and word not in (FLAT, JSON)) or "${envvar:" in word:
            raise ConfigError(
                f"{place}: {word} is not of use here; use {FLAT} or {JSON} for the run's values, "
                "and ${oc.env:NAME} inside an override for a variable"
            )
    calls = [i for i, word in enumerate(words) if word == "train" and i and _is_us(words[i - 1])]
    if not calls:
        raise ConfigError(
            f"{place}: {' '.join(words)} is not flowrl train; write "
            f"[flowrl, train, CONFIG, 'run.name=${{oc.env:{RUN_ID}}}', {FLAT}]"
        )
    first = calls[0] + 1
    rest = tuple(words[first + 1 :])
    macros = [word for word in words if word in (FLAT, JSON)]
    if len(macros) != 1 or macros[0] not in rest:
        raise ConfigError(
            f"{place}: {len(macros)} of {FLAT} and {JSON} stand in it; the run's values go to "
            "exactly one of them, behind the config file"
        )
    if not any(word.startswith(f"{key}=") and RUN_ID in word for word in rest for key in OWN_KEYS):
        raise ConfigError(
            f"{place}: all runs of an agent would write to one folder; add "
            f"'run.name=${{oc.env:{RUN_ID}}}'"
        )
    config = Path(words[first])
    if not config.is_file():
        raise ConfigError(
            f"{place}: {config}: no such file in {Path.cwd()}, where an agent would look for it; "
            f"{files_beside(config)}; start from the folder that it is relative to"
        )
    return TrainCommand(tuple(words[:first]), config, rest, macros[0])


def print_values(values: Values, macro: str) -> list[str]:
    """What an agent puts in the place of a macro; values below one parameter are one mapping."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    if macro == JSON:
        return [json.dumps(tree)]
    return [f"{name}={value}" for name, value in tree.items()]


def check_printed(dimension: Dimension, values: Sequence[Any], macro: str, where: str) -> None:
    """Refuses a parameter that arrives at the run as something else than the file says.

    Raises:
        ConfigError: names file, parameter and value.
    """
    place = f"{where}: parameters.{dimension.name}"
    if dimension.name in (*OWN_KEYS, "run.resume"):
        raise ConfigError(f"{place} is set by the sweep itself; remove it")
    if macro == JSON:
        return
    if len(dimension.path) > 1:
        raise ConfigError(
            f"{place}: {FLAT} prints nested parameters as one mapping, {dimension.path[0]}="
            f"{{...}}, which would replace the whole section; write the dotted name "
            f"{dimension.name}, or {JSON} in command"
        )
    for value in values:
        arrived = parse_yaml(str(value), place)
        if type(arrived) is not type(value) or arrived != value:
            raise ConfigError(
                f"{place}: {FLAT} prints {show(value)} as {value}, which reads as {show(arrived)}; "
                f"use {JSON} in command, which keeps types"
            )


def _is_us(word: str) -> bool:
    return Path(word).name == "flowrl"


def _quoted(text: str) -> str:
    """A text as the value of an override: in quotes where YAML would read something else."""
    try:
        is_plain = parse_yaml(text, text) == text
    except ConfigError:
        is_plain = False
    return text if is_plain else json.dumps(text)
