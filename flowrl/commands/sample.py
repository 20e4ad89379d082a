"""`flowrl sample MODEL "a prompt"`: images as PNG files, drawn by the trainer's own sampler."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from torchvision.utils import save_image

from flowrl.commands.models import find_model, make_folder, open_policy
from flowrl.data.sampler import eval_batch
from flowrl.types import Prompt

_NAME_LENGTH = 60


def run(
    *, model: str, prompt: str, num: int, seed: int, out: Path, options: Mapping[str, Any]
) -> None:
    """Draws `num` images of a prompt, writes one file each and a grid, and prints the paths.

    Image i depends on the model, the prompt, the seed and i, not on how many are drawn.
    """
    spec = find_model(model, options, command="flowrl sample")
    folder = make_folder(out)
    policy = open_policy(spec, [prompt], Accelerator(mixed_precision=spec.mixed_precision))
    batch = eval_batch([Prompt(prompt)], samples_per_prompt=num, seed=seed, rank=0, world_size=1)
    images = policy.sample(
        batch, num_steps=spec.num_steps, guidance_scale=spec.guidance_scale
    ).images
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(spec.describe())
    for path in write_images(images, folder, f"{file_name(prompt)}_seed{seed}"):
        console.print(str(path))


def write_images(images: Tensor, folder: Path, name: str) -> list[Path]:
    """Writes images [N, 3, H, W] as `name_00.png` onwards, and `name_grid.png` if N > 1."""
    paths = []
    for index, image in enumerate(images):
        paths.append(folder / f"{name}_{index:02d}.png")
        save_image(image, paths[-1])
    if len(images) > 1:
        paths.append(folder / f"{name}_grid.png")
        save_image(images, paths[-1], nrow=math.ceil(len(images) ** 0.5))
    return paths


def file_name(prompt: str) -> str:
    """The prompt as the beginning of a file's name: letters and digits, whole words."""
    words = re.findall(r"\w+", prompt.lower())
    name = "_".join(words)[: _NAME_LENGTH + 1]
    return (name if len(name) <= _NAME_LENGTH else name.rpartition("_")[0]) or "image"
