"""Tensors of a file, and how they are fitted into a module: strictly, with what is wrong named."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAMED = 5  # problems that an error lists one by one


def fit_weights(module: nn.Module, given: Mapping[str, Tensor], *, where: str) -> None:
    """Loads weights into a module, all of them and no others.

    Args:
        module: that has exactly these names and shapes.
        given: by the names of its state dict.
        where: of the weights, for the error.

    Raises:
        ValueError: weights that are missing, unknown or of another shape.
    """
    wanted = dict(module.state_dict())
    problems = [f"{key} is missing" for key in sorted(wanted.keys() - given.keys())]
    problems += [f"{key} is unknown" for key in sorted(given.keys() - wanted.keys())]
    problems += [
        f"{key} is {list(given[key].shape)}, expected {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key].shape != wanted[key].shape
    ]
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{where} does not fit: {'; '.join(problems[:_NAMED])}{more}")
    module.load_state_dict(dict(given))


def load_tensors(path: Path) -> Any:
    """What a .safetensors or a torch file holds; the latter is opened for tensors only.

    Raises:
        ValueError: a torch file with other objects, whose reading could run code.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and was not opened, because reading such a pickle can "
            "run code; save its tensors as .safetensors where you trust it, and give that file"
        ) from error
