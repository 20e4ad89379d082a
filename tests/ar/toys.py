"""Small generators on small tokenizers, with weights that spread their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from flowrl.make.shapes_model import build_tokenizer
from pipelines.ar.registry import Model, make_generator
from tokenizers_vis.registry import make_tokenizer

SIZES = {"dim": 16, "depth": 2, "num_heads": 2}
GRID = {"image_size": 16, "channels": [8, 8], "vocab": 11}  # 4 x 4 tokens
CONFIG: dict[str, Any] = {
    "run": {"name": "toy", "steps": 6},
    "model": {
        "generator": "raster", "tokenizer": "shapes_vq", "text_length": 12, "args": SIZES,
    },
    "data": {"source": "shapes", "num_images": 24},
    "optim": {"lr": 1e-2},
    "compute": {"batch_size": 8, "micro_batch_size": 4},
    "eval": {"every": 3, "num_images": 4, "num_shown": 2, "batch_size": 3},
    "checkpoint": {"every": 2, "keep": 9},
    "track": {"log_every": 1},
}  # fmt: skip


def toy_model(name: str = "raster", **args: Any) -> Model:
    """A model whose logits are spread as a trained one's."""
    torch.manual_seed(0)
    tokenizer, texts = make_tokenizer("grid", GRID).eval(), build_tokenizer()
    sizes = {"num_words": len(texts), "text_length": 12, **SIZES, **args}
    generator = make_generator(name, sizes, tokenizer).eval()
    for parameter in generator.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return Model(generator, tokenizer.requires_grad_(False), texts)


def write_config(folder: Path, **sections: Any) -> Path:
    """A config's file that writes its runs into the folder; sections replace those of CONFIG."""
    config = {**CONFIG, **sections}
    config["run"] = {**CONFIG["run"], "output_dir": str(folder / "runs"), **sections.get("run", {})}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
