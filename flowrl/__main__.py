"""The command line: `flowrl COMMAND`, also as `python -m flowrl` and under `accelerate launch -m`.

Each command imports its module when it is called, so that help loads none of the heavy libraries.
What flowrl refuses (`FlowrlError`) is printed as one message and exits with 2, as a wrong command
line does; Ctrl-C exits with 130; `--debug` or FLOWRL_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from flowrl import __version__
from flowrl.commands import ar, rewards, tokenizer
from flowrl.commands.options import ConfigPath, Overrides
from flowrl.errors import FlowrlError

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Turns what a person can act on into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.params["debug"]:
                raise
            _print_error("interrupted", title="Stopped")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            message = _message(error)
            if message is None or ctx.params["debug"]:
                raise
            _print_error(message)
            raise typer.Exit(EXIT_REFUSED) from error


def _message(error: BaseException) -> str | None:
    """What to tell a person about an error, or None where only a traceback helps."""
    if isinstance(error, FlowrlError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        is_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or "No space left on device" in str(cause):  # safetensors wraps it in its own
            name = getattr(cause, "filename", None)
            return (
                f"the disk is full{f', writing {name}' if name else ''}; free some space or choose "
                "another run.output_dir, then go on with run.resume=latest"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _print_error(message: str, title: str = "Error") -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{title}: ", "bold red"), message)
    Console(stderr=True).print(line, soft_wrap=True, highlight=False)


app = typer.Typer(
    name="flowrl",
    cls=_Commands,
    help="Align image generators with reinforcement learning.",
    epilog="Start with: flowrl train configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="'shapes', a run's folder (or its best/), a diffusers folder or a Hub id.",
    ),
]
_OWN = "the model's own if not given."
NumSteps = Annotated[int | None, typer.Option(min=1, help=f"Sampler steps; {_OWN}")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance-scale", min=0.0, help=f"Classifier-free guidance, 1 = off; {_OWN}"),
]
Height = Annotated[int | None, typer.Option(min=1, help=f"Height of the images, pixels; {_OWN}")]
Width = Annotated[int | None, typer.Option(min=1, help=f"Width of the images, pixels; {_OWN}")]
TextLength = Annotated[
    int | None,
    typer.Option("--max-sequence-length", min=1, help=f"Tokens that the T5 text has; {_OWN}"),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the weights; float32, or the run's, if not given."),
]
Lora = Annotated[
    Path | None,
    typer.Option(help="LoRA to load: a folder or .safetensors file; none if not given."),
]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"flowrl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="FLOWRL_DEBUG", help="Show tracebacks of all errors."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options that stand before the command; `_Commands` reads them."""


@app.command("train")
def _train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Align the model that CONFIG names, evaluate it before and after, and write a report."""
    from flowrl.commands import train

    train.run(config=config, overrides=overrides or [])


@app.command("check")
def _check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build everything that CONFIG names, print method, batches and cost, and stop."""
    from flowrl.commands import check

    check.run(config=config, overrides=overrides or [])


@app.command("eval")
def _eval(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="File of prompts (JSONL or text), or a name; the run's, or 'shapes/heldout', if "
            "not given."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Reward to measure; repeat for several, the first is the score; the run's, or "
            "shapes_strict, if not given."
        ),
    ] = None,
    num_steps: NumSteps = None,
    guidance_scale: Guidance = None,
    samples_per_prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Images per prompt, two or more for diversity; the run's or 1."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the starting noise; the run's or 1234.")
    ] = None,
    max_prompts: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many prompts; all if not given.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for scores and images; scores are only printed if not given."),
    ] = None,
    lora: Lora = None,
    height: Height = None,
    width: Width = None,
    max_sequence_length: TextLength = None,
    dtype: Dtype = None,
) -> None:
    """Score MODEL on prompts, with fixed seeds; a run as its own evaluation does."""
    from flowrl.commands import eval as eval_command

    eval_command.run(
        model=model,
        options={
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "lora": lora,
            "height": height,
            "width": width,
            "max_sequence_length": max_sequence_length,
            "dtype": dtype,
        },
        settings={
            "data": data,
            "samples_per_prompt": samples_per_prompt,
            "seed": seed,
            "max_prompts": max_prompts,
        },
        rewards=reward or [],
        out=out,
    )


@app.command("sample")
def _sample(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 4,
    num_steps: NumSteps = None,
    guidance_scale: Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the starting noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the images (PNG).")] = Path("samples"),
    lora: Lora = None,
    height: Height = None,
    width: Width = None,
    max_sequence_length: TextLength = None,
    dtype: Dtype = None,
) -> None:
    """Draw images of PROMPT with MODEL."""
    from flowrl.commands import sample

    sample.run(
        model=model,
        prompt=prompt,
        num=num,
        seed=seed,
        out=out,
        options={
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "lora": lora,
            "height": height,
            "width": width,
            "max_sequence_length": max_sequence_length,
            "dtype": dtype,
        },
    )


@app.command("report")
def _report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]) -> None:
    """Write RUN/report.html: curves, samples before and after, and where the time went."""
    from flowrl.commands import report

    report.run(run=run)


@app.command("compare")
def _compare(
    comparison: Annotated[
        Path, typer.Argument(metavar="COMPARE", help="The comparison's YAML file.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and page; runs/NAME of the file if not given."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side; they share the cores.")] = 1,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds instead of the file's, such as 0,1,2.")
    ] = None,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Run nothing; write the page from what is there.")
    ] = False,
) -> None:
    """Run the configs that COMPARE lists over seeds on equal budgets, and write one page."""
    from flowrl.commands import compare

    failed = compare.run(file=comparison, out=out, jobs=jobs, seeds=seeds, page_only=page_only)
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command("sweep")
def _sweep(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The sweep's YAML file, in W&B's format.")
    ],
    local: Annotated[
        bool, typer.Option("--local", help="Run it here with optuna, without an account.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side; they share the cores.")] = 1,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Runs in all; the file's run_cap if not given.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for runs and results; runs/sweeps/NAME if not given."),
    ] = None,
) -> None:
    """Check a sweep of hyper-parameters and print W&B's commands, or run it here."""
    from flowrl.commands import sweep

    if sweep.run(file=file, local=local, jobs=jobs, trials=trials, output=output):
        raise typer.Exit(EXIT_FAILED)


@app.command("env")
def _env() -> None:
    """Print versions and hardware, for a bug report."""
    from flowrl.commands import env

    env.run()


app.add_typer(ar.app, name="ar")
app.add_typer(rewards.app, name="rewards")
app.add_typer(tokenizer.app, name="tokenizer")


def main() -> None:
    """Run the command line; the entry point of the console script `flowrl`."""
    app(prog_name="flowrl")


if __name__ == "__main__":
    main()
