"""What `flowrl ar train` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.ar.schema import load_ar_config
from flowrl.commands.pretrain import run_training

if TYPE_CHECKING:
    from flowrl.pretrain.loop import PretrainRun


def train(config: Path, overrides: Sequence[str]) -> None:
    """Trains, evaluates and exports.

    Raises:
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    loaded = load_ar_config(config, overrides)  # before torch is loaded

    def build() -> PretrainRun:
        from flowrl.ar.build import build_run

        return build_run(loaded, where=config.name)

    run_training(loaded, build, describe, command=["ar", "train", str(config), *overrides])


def describe(run: PretrainRun) -> str:
    """The run in three lines."""
    model, config, cut = run.task.model, run.config, run.batches.cut
    generator, num = model.generator, len(run.batches)
    trained = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    return "\n".join(
        [
            f"{generator.name}: {trained / 1e6:.2f} M trained parameters, "
            f"{generator.order.num_tokens} tokens of {generator.vocab} in "
            f"{generator.order.num_forwards} forwards",
            f"{config.data.source}: {num} captioned images, {len(run.task.held_out)} others "
            "measured",
            f"{config.run.steps} steps of {cut.batch_size} ({cut.total} x {cut.micro_batch_size}) "
            f"are {config.run.steps * cut.batch_size / num:.3g} epochs",
        ]
    )
