"""`flowrl rewards ...`: what can be done with rewards apart from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Look at rewards, check them, score images, serve them.", no_args_is_help=True
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A name of `flowrl rewards list`, package.module:Name or ./file.py:f."
    ),
]
Args = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="KEY=VALUE", help="An argument of the reward; repeat for more."),
]


@app.command("list")
def _list() -> None:
    """Print the rewards that there are, those of installed plug-ins among them."""
    from flowrl.commands import reward_tools

    reward_tools.list_rewards()


@app.command("info")
def _info(name: Name) -> None:
    """Print what a reward measures, where its model comes from, and its arguments."""
    from flowrl.commands import reward_tools

    reward_tools.show_info(name)


@app.command("test")
def _test(name: Name, arg: Args = None) -> None:
    """Load a reward and check on small images that it does what training relies on."""
    from flowrl.commands import reward_tools

    reward_tools.run_test(name, arg or [])


@app.command("score")
def _score(
    name: Name,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="The prompt; once for all images, or once for each.")
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(help="The prompt's metadata as JSON or YAML, for rewards that read it."),
    ] = None,
    arg: Args = None,
) -> None:
    """Print a reward's scores of image files."""
    from flowrl.commands import reward_tools

    reward_tools.score_images(name, images, prompt or [""], metadata, arg or [])


@app.command("serve")
def _serve(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The server's YAML file.")],
) -> None:
    """Serve the rewards that FILE lists over HTTP, until Ctrl-C."""
    from flowrl.serve import serve

    serve(file)
