"""`flowrl rewards list | info | test | score`: rewards by themselves, without a run.

Reading order: `make_reward`, then the commands.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowrl import yamlio
from flowrl.errors import ConfigError, DataError, FlowrlError, RewardError
from flowrl.testing import check_reward
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt, PromptBatch

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)


def make_reward(name: str, args: Sequence[str]) -> Any:
    """The reward called `name`, made with arguments such as "device=cpu".

    Raises:
        ConfigError: there is no such reward, or the arguments do not fit.
    """
    from rewards import load

    given: dict[str, Any] = {}
    for text in args:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--arg {text}: expected KEY=VALUE, such as --arg batch_size=8")
        given[key] = yamlio.parse_yaml(value, f"--arg {text}")
    try:
        return load(name, **given)
    except (LookupError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error.args[0] if error.args else error)) from error


def list_rewards() -> None:
    """Print the rewards of the table and of plug-ins, and what each reads."""
    from rewards import NAMES
    from rewards.base import is_differentiable
    from rewards.cards import cards
    from rewards.registry import PLUGINS

    known = cards()
    rows = [("name", "reads", "per", "gradient", "model")]
    for name in NAMES:
        card = known.get(name)
        made = _class_of(name)
        inputs, scope = getattr(made, "inputs", None), getattr(made, "scope", None)
        # A property: it depends on the arguments.
        reads = ", ".join(inputs) if isinstance(inputs, tuple) else "as given"
        per = scope if isinstance(scope, str) else "as given"
        gradient = "yes" if is_differentiable(made) else "–"
        rows.append((name, reads, per, gradient, card.model if card else "–"))
    for entry in entry_points(group=PLUGINS):
        origin = entry.dist.name if entry.dist else "a plug-in"
        rows.append((entry.name, "", "", "", f"plug-in of {origin}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # not a table of rich's: it would cut ids to the terminal's width
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        CONSOLE.print("  ".join(cells).rstrip())
    CONSOLE.print(
        "\nA reward of your own: ./file.py:function or package.module:Name. More: flowrl rewards "
        "info NAME"
    )


def show_info(name: str) -> None:
    """Print what a reward does, where its model comes from and what it can be given."""
    from rewards.base import is_differentiable
    from rewards.cards import cards

    made, card = _class_of(name), cards().get(name)
    CONSOLE.print(inspect.getdoc(made) or f"{name} has no docstring")
    if card is not None:
        low, high = card.range
        rows = {
            "model": card.model,
            "licence": card.licence,
            "paper": card.paper,
            "reads": ", ".join(card.inputs),
            "range": f"{low:g} to {high:g}",
            "memory": f"{card.gigabytes():.2g} GB in float32, {card.gigabytes('bfloat16'):.2g} GB "
            "in bfloat16",
            "preprocessing": card.preprocessing,
            "verified": card.verified,
        }
        table = Table(box=None, pad_edge=False, show_header=False)
        for key, text in rows.items():
            table.add_row(key, text)
        CONSOLE.print()
        CONSOLE.print(table)
    gradient = "its score has one in what it reads" if is_differentiable(made) else "none declared"
    CONSOLE.print(f"\ngradient: {gradient}\narguments: {_signature(made)}")


def run_test(name: str, args: Sequence[str]) -> None:
    """Run the conformance checks of `flowrl.testing.check_reward`; loads the reward's model.

    Raises:
        RewardError: a rule is broken.
    """
    from rewards.base import is_differentiable

    reward = make_reward(name, args)
    try:
        check_reward(reward)
    except AssertionError as error:
        raise RewardError(f"{name} breaks the contract of rewards: {error}") from error
    except FlowrlError:
        raise
    except Exception as error:
        raise RewardError(f"{name} raised {type(error).__name__}: {error}") from error
    CONSOLE.print(
        f"{name} conforms: one score per sample within {_range(reward)}, the same again, in any "
        "order, alone and among others; NaN where an image cannot be scored"
        + ("; a gradient, of its score" if is_differentiable(reward) else "")
    )


def score_images(
    name: str,
    files: Sequence[Path],
    prompts: Sequence[str],
    metadata: str | None,
    args: Sequence[str],
) -> None:
    """Print a reward's scores of image files, and their components.

    Args:
        name: of the reward.
        files: images; those of different sizes are scored one by one.
        prompts: one for all, or one each.
        metadata: JSON or YAML of the prompt's metadata, for rewards that read it.
        args: of the reward.

    Raises:
        ConfigError: prompts that do not fit the files.
        DataError: a file is no image.
        RewardError: the reward failed.
    """
    if len(prompts) not in (1, len(files)):
        raise ConfigError(
            f"{len(files)} images and {len(prompts)} prompts: give --prompt once, or once per image"
        )
    asked = list(prompts) * (len(files) if len(prompts) == 1 else 1)
    row = {} if metadata is None else yamlio.parse_yaml(metadata, f"--metadata {metadata}")
    if not isinstance(row, Mapping):
        raise ConfigError(f"--metadata {metadata}: expected a mapping, got {yamlio.show(row)}")
    reward = make_reward(name, args)
    images = [_read_image(file) for file in files]
    has_one_size = len({image.shape for image in images}) == 1
    if reward.scope == "group" and not has_one_size:
        raise ConfigError(f"{name} compares images, so they must have one size")
    parts = [range(len(files))] if has_one_size else [[i] for i in range(len(files))]
    rewards = RewardSet([(name, reward, 1.0)])
    scores: list[dict[str, float]] = [{} for _ in files]
    for part in parts:
        batch = PromptBatch.one_group([Prompt(asked[i], row) for i in part])
        found = rewards.score(batch, images=torch.stack([images[i] for i in part]))
        if name in found.failures:
            raise RewardError(f"reward '{name}' failed: {found.failures[name].reason}")
        columns = {name: found.rewards[name]} | found.components
        for key, values in columns.items():
            for i, value in zip(part, values.tolist(), strict=True):
                scores[i][key] = value
    names = list(dict.fromkeys(key for row_ in scores for key in row_))
    table = Table("image", "prompt", *names, box=None, pad_edge=False, header_style="bold")
    for file, prompt, values in zip(files, asked, scores, strict=True):
        table.add_row(str(file), prompt, *(f"{values[key]:.4f}" for key in names))
    CONSOLE.print(table)


def _class_of(name: str) -> Any:
    """The class or function behind a name, not made."""
    from rewards.registry import find

    try:
        return find(name)[0]
    except (LookupError, ImportError) as error:
        raise ConfigError(str(error.args[0] if error.args else error)) from error


def _signature(made: Any) -> str:
    from rewards.base import INPUTS

    parameters = inspect.signature(made).parameters.values()
    words = [str(each) for each in parameters if each.name not in INPUTS]
    return ", ".join(words) or "none"


def _range(reward: Any) -> str:
    low, high = reward.range
    return f"[{low:g}, {high:g}]"


def _read_image(file: Path) -> Tensor:
    """Float32 [3, H, W] in [0, 1]."""
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
