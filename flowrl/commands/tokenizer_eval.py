"""`flowrl tokenizer eval TOKENIZER...` and `flowrl tokenizer report EVALS...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Hangs both commands into `flowrl tokenizer`."""
    app.command("eval")(_eval)
    app.command("report")(_report)


def _eval(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...", help="Folders of tokenizers or of their runs, or Hub ids."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="'shapes', a folder of images or, for tokenizers that take them, of clips "
            "(sub-folders are classes), or a Hugging Face data set of images."
        ),
    ] = "shapes",
    out: Annotated[
        Path, typer.Option(help="Folder that gets a folder per tokenizer, named like it.")
    ] = Path("runs/tokenizer_eval"),
    name: Annotated[
        str | None, typer.Option(help="What the one TOKENIZER is called, if not as its folder.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=2, help="Held-out images, or clips.")] = 512,
    num_train: Annotated[
        int, typer.Option(min=16, help="Images that the probes are trained on.")
    ] = 4096,
    num_tokens: Annotated[
        str | None, typer.Option(help="Such as 1,4,16; powers of two and all if not given.")
    ] = None,
    num_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of generative decoders; their own if not given."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0.0, help="Guidance of them, 1 = off.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="Network of the Frechet distance: inception, shapes, a file, or auto = Inception "
            "if its weights are in a cache, else shapes."
        ),
    ] = "auto",
    lpips: Annotated[
        str | None, typer.Option(help="File of LPIPS's linear heads; left out if not given.")
    ] = None,
    lpips_backbone: Annotated[
        str | None, typer.Option(help="File of its VGG-16 or AlexNet; torch's cache if not given.")
    ] = None,
    ar_steps: Annotated[
        int, typer.Option(min=0, help="Steps of the autoregressive probe; 0 = leave it out.")
    ] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")] = 0,
) -> None:
    """Measure tokenizers on held-out images or clips: distortion, rate, codes, probes, speed."""
    from flowrl.commands import tokenizer_eval_tools

    options = tokenizer_eval_tools.EvalOptions(
        data=data,
        out=out,
        name=name,
        num_images=num_images,
        num_train=num_train,
        num_tokens=num_tokens,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        features=features,
        lpips=lpips,
        lpips_backbone=lpips_backbone,
        ar_steps=ar_steps,
        batch_size=batch_size,
        seed=seed,
    )
    tokenizer_eval_tools.evaluate_all(tokenizers, options)


def _report(
    evaluations: Annotated[
        list[Path],
        typer.Argument(metavar="EVALS...", help="Folders that `eval` wrote, or a folder of them."),
    ],
    out: Annotated[
        Path, typer.Option(help="The page; its .json and .png are written beside it.")
    ] = Path("tokenizers.html"),
    claims: Annotated[
        Path | None,
        typer.Option(help="Folder of what benchmarks/tokenizers found, such as docs/tokenizers."),
    ] = None,
) -> None:
    """Write one page that compares evaluated tokenizers."""
    from flowrl.commands import tokenizer_eval_tools

    tokenizer_eval_tools.report(evaluations, out=out, claims=claims)
