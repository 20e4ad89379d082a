"""The page docs/tokenizer_config.md, of all keys of a tokenizer's training."""

from __future__ import annotations

from flowrl.configdoc import table
from flowrl.tokenizer.schema import TokenizerConfig


def to_markdown() -> str:
    """The page docs/tokenizer_config.md."""
    return "\n".join(
        [
            "# Configuration of a tokenizer's training",
            "",
            "Every key of a config file, for `flowrl tokenizer train CONFIG [key=value ...]`.",
            "Files are read as those of `flowrl train` (see [config.md](config.md)): `base`,",
            "`${...}` and overrides work alike. `configs/tokenizers/` has examples.",
            "Made by `python -m flowrl.tokenizer.configdoc > docs/tokenizer_config.md`.",
            "",
            *table(TokenizerConfig),
            "",
        ]
    )


if __name__ == "__main__":
    print(to_markdown(), end="")
