"""Small trainings for the tests beside it, and add-ons that tests name as module:Class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from flowrl.pretrain.loop import PretrainRun
from flowrl.tokenizer.build import build_run
from flowrl.tokenizer.schema import load_tokenizer_config
from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.quantizers.base import LossTerm

GRID = {"name": "grid", "args": {"image_size": 16, "channels": [8, 16], "vocab": 32}}
FSQ = {"name": "grid", "args": {**GRID["args"], "quantizer": "fsq", "levels": [4, 4]}}
FLEXTOK = {
    "name": "flextok",
    "args": {
        "image_size": 16, "patch_size": 4, "num_registers": 4, "levels": [4, 4], "dim": 16,
        "num_heads": 2, "encoder_depth": 1, "decoder_depth": 1, "solver": {"num_steps": 2},
    },
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "run": {"name": "toy", "steps": 6},
    "tokenizer": GRID,
    "data": {"source": "shapes", "num_images": 20},
    "optim": {"lr": 1e-2},
    "compute": {"batch_size": 8, "micro_batch_size": 4},
    "eval": {"every": 3, "num_images": 4, "num_shown": 3, "batch_size": 3},
    "checkpoint": {"every": 2, "keep": 9},
    "track": {"log_every": 1},
}


def write_config(folder: Path, **sections: Any) -> Path:
    """A config's file that writes its runs into the folder; sections replace those of CONFIG."""
    config = {**CONFIG, **sections}
    config["run"] = {**CONFIG["run"], "output_dir": str(folder / "runs"), **sections.get("run", {})}
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def toy_run(folder: Path, *overrides: str, **sections: Any) -> PretrainRun:
    config = load_tokenizer_config(write_config(folder, **sections), overrides)
    return build_run(config, where="toy.yaml")


class Critic(AddOn):
    """An adversary that tells images from reconstructions by one number for each pixel's place."""

    needs_reconstruction = True

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.start = start
        self.adversary = nn.Linear(3 * 16 * 16, 1)

    def forward(self, images, output, *, progress, generator) -> dict[str, LossTerm]:
        return {"fooled": LossTerm(0.1, -self.adversary(output.reconstruction.flatten(1)).mean())}

    def adversary_loss(self, images, output, *, progress) -> Tensor | None:
        if progress < self.start:
            return None
        drawn, real = (self.adversary(x.flatten(1)).mean() for x in (output.reconstruction, images))
        return drawn - real


class Breaks(AddOn):
    """A loss that is not a number from the middle of the training on."""

    def forward(self, images, output, *, progress, generator) -> dict[str, LossTerm]:
        value = torch.tensor(float("nan") if progress >= 0.5 else 0.0)
        return {"broken": LossTerm(1.0, value)}
