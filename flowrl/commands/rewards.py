"""`flowrl rewards ...`: what can be done with rewards apart from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Serve rewards to other machines.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `serve` a command of its own while there is no other."""


@app.command("serve")
def _serve(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The server's YAML file.")],
) -> None:
    """Serve the rewards that FILE lists over HTTP, until Ctrl-C."""
    from flowrl.serve import serve

    serve(file)
