"""`flowrl ar ...`: train autoregressive generators on visual tokens."""

from __future__ import annotations

import typer

from flowrl.commands.options import ConfigPath, Overrides

app = typer.Typer(help="Train autoregressive image models on visual tokens.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `train` a command of its own while it is the only one."""


@app.command("train")
def _train(
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Train the generator that CONFIG names; RUN/final is a model that `flowrl train` aligns."""
    from flowrl.commands import ar_tools

    ar_tools.train(config, overrides or [])
