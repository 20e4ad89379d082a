"""The table of all configuration keys, and the page docs/config.md that holds it."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowrl.config import Config, plain
from flowrl.strict import Record, field_type, fields


class FieldRow(NamedTuple):
    """One line of the table of configuration keys."""

    key: str
    type: str
    default: str
    description: str


def describe_fields(model: type[Record] = Config) -> list[FieldRow]:
    """All keys of a config in order, for docs/config.md; `[]` marks the entries of a list."""
    rows = []
    for key, field in fields(model):
        default = "required"
        if not field.is_required():
            default = _yaml_word(plain(field.get_default(call_default_factory=True)))
        rows.append(FieldRow(key, field_type(field), default, field.description or ""))
    return rows


def _yaml_word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(model: type[Record]) -> list[str]:
    """The lines of the table of all keys of a config."""
    rows = ["| key | type | default | value |", "|---|---|---|---|"]
    for row in describe_fields(model):
        default = row.default if row.default == "required" else f"`{row.default}`"
        cells = (f"`{row.key}`", row.type, default, row.description)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def to_markdown() -> str:
    """The page docs/config.md."""
    return "\n".join(
        [
            "# Configuration",
            "",
            "Every key of a config file, for `flowrl train CONFIG [key=value ...]`. `[]` stands",
            "for each entry of a list. A file may begin with `base: other.yaml` and then holds",
            "what differs; `${section.key}` is another key's value. `flowrl check CONFIG` says",
            "whether a file fits together. Paths of prompts, models and runs are relative to the",
            "folder from which flowrl is started, that of `base` to its file.",
            "Made by `python -m flowrl.configdoc > docs/config.md`.",
            "",
            *table(Config),
            "",
        ]
    )


if __name__ == "__main__":
    print(to_markdown(), end="")
