"""`flowrl tokenizer ...`: train visual tokenizers, and turn images and clips to tokens and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowrl.commands import tokenizer_eval
from flowrl.commands.options import ConfigPath, Overrides

app = typer.Typer(
    help="Train visual tokenizers, compare them; turn images and clips into tokens and back.",
    no_args_is_help=True,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="TOKENIZER",
        help="A run's folder, its final/, another tokenizer's folder, or a Hub id.",
    ),
]


@app.command("train")
def _train(
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Train the tokenizer that CONFIG names; RUN/final is what `encode` and `decode` load."""
    from flowrl.commands import tokenizer_tools

    tokenizer_tools.train(config, overrides or [])


@app.command("encode")
def _encode(
    tokenizer: Source,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="Images or folders of them; for a tokenizer that takes clips animated GIF, PNG or "
            "WebP files, videos, or folders of those or of numbered stills.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file of tokens.")] = Path("tokens.safetensors"),
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each image or clip; all if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or clips per forward.")] = 16,
) -> None:
    """Write the tokens of images or clips, resized and cut at the centre to the tokenizer's size.

    Of a clip's frames as many as the tokenizer takes are chosen, evenly spread.
    """
    from flowrl.commands import tokenizer_tools

    tokenizer_tools.encode(tokenizer, images, out, num_tokens=num_tokens, batch_size=batch_size)


@app.command("decode")
def _decode(
    tokens: Annotated[Path, typer.Argument(metavar="TOKENS", help="A file that `encode` wrote.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the images (PNG; clips are animated PNG).")
    ] = Path("decoded"),
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Where the tokenizer is now; where `encode` found it if not given."),
    ] = None,
    num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many tokens; all if not given.")
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a generative decoder; its own if not given.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance of it, 1 = off; its own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a generative decoder's noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or clips per forward.")] = 16,
) -> None:
    """Draw the images or clips that TOKENS stand for."""
    from flowrl.commands import tokenizer_tools

    tokenizer_tools.decode(
        tokens,
        out,
        source=tokenizer,
        num_tokens=num_tokens,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
    )


tokenizer_eval.add_to(app)
