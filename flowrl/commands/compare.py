"""`flowrl compare COMPARE`: runs a list of configs over seeds, and writes one page about them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from flowrl.commands.env import usable_cores
from flowrl.compare.spec import load_comparison
from flowrl.errors import ConfigError


def run(
    *, file: Path, out: Path | None, jobs: int, seeds: str | None, page_only: bool
) -> Sequence[str]:
    """Runs what is not finished yet, then writes the page.

    Args:
        file: the comparison's YAML file.
        out: where to write; None = runs/<name>.
        jobs: runs side by side.
        seeds: numbers separated by commas, instead of the file's.
        page_only: run nothing.

    Returns:
        The runs that failed, by name.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    chosen = None if seeds is None else _numbers(seeds)
    comparison = load_comparison(file, out=out, seeds=chosen)  # before torch is loaded
    from flowrl.compare.page import make_page
    from flowrl.compare.run import run_all

    command = ["flowrl", "compare", str(file)]
    command += [] if out is None else ["--out", str(out)]
    command += [] if jobs == 1 else ["--jobs", str(jobs)]
    command += [] if chosen is None else ["--seeds", ",".join(map(str, chosen))]
    failed = []
    if not page_only:
        failed = run_all(comparison, jobs=jobs, cores=usable_cores() or 1, say=_say)
        if len(failed) == len(comparison.plans):
            return [plan.title for plan in failed]  # there may be nothing to write about
    for path in make_page(comparison, command=shlex.join(command)):
        _say(str(path))
    return [plan.title for plan in failed]


def _say(line: str) -> None:
    print(line, flush=True)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--seeds takes whole numbers separated by commas, such as 0,1,2; got {text!r}"
        ) from error
