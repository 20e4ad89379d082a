"""The README.md beside an exported generator: what it is, how it was made, what it measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowrl import __version__
from flowrl.ar.schema import ArConfig
from flowrl.pretrain.card import configuration, measures
from pipelines.ar.registry import Model


def write_card(
    folder: Path, config: ArConfig, model: Model, *, step: int, metrics: Mapping[str, float]
) -> None:
    """Writes README.md.

    Args:
        folder: of the weights.
        config: the run's.
        model: that was saved there.
        step: steps done.
        metrics: of the held-out evaluation of these weights.
    """
    generator, order = model.generator, model.generator.order
    lines = [
        f"# {config.run.name}",
        "",
        f"An autoregressive text-to-image model, `{generator.name}`: {order.num_tokens} tokens of "
        f"{model.tokenizer.name}, drawn in {order.num_forwards} forwards. Made by `flowrl ar "
        f"train` (flowrl {__version__}), {step} of {config.run.steps} steps.",
        "",
        "```bash",
        'flowrl sample THIS_FOLDER "a photo of a red circle"',
        "```",
        "",
        f"On {config.eval.num_images} held-out pairs:",
        "",
        *measures(metrics),
        "",
        *configuration(config, ("run", "model", "data", "optim")),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
