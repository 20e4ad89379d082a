"""The page docs/ar_config.md, of all keys of a generator's training."""

from __future__ import annotations

from flowrl.ar.schema import ArConfig
from flowrl.configdoc import table


def to_markdown() -> str:
    """The page docs/ar_config.md."""
    return "\n".join(
        [
            "# Configuration of a generator's training",
            "",
            "Every key of a config file, for `flowrl ar train CONFIG [key=value ...]`.",
            "Files are read as those of `flowrl train` (see [config.md](config.md)): `base`,",
            "`${...}` and overrides work alike. `configs/ar/` has examples.",
            "Made by `python -m flowrl.ar.configdoc > docs/ar_config.md`.",
            "",
            *table(ArConfig),
            "",
        ]
    )


if __name__ == "__main__":
    print(to_markdown(), end="")
