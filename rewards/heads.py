"""The head that two published reward models end in: linear layers with nothing between them.

The authors left the activations out (they are commented out in both repositories) and trained so;
dropout does nothing at scoring time. What remains is five matrices, kept apart as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn


def linear_head(tensors: Mapping[str, Tensor], *, source: str) -> nn.Sequential:
    """The head, [.., D] -> [.., 1], frozen and float32.

    Args:
        tensors: "layers.N.weight" and "layers.N.bias" of each linear layer, N ascending; the N
            between are dropout. Other names are not allowed.
        source: where they come from, for the error.

    Raises:
        ValueError: the tensors are not such a head.
    """
    indices = sorted(int(n.split(".")[1]) for n in tensors if _is_layer(n, "weight"))
    wanted = {f"layers.{i}.{part}" for i in indices for part in ("weight", "bias")}
    weights = [tensors[f"layers.{i}.weight"] for i in indices]
    chains = all(low.shape[0] == high.shape[1] for low, high in pairwise(weights))
    if not weights or set(tensors) != wanted or not chains or weights[-1].shape[0] != 1:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(
            f"{source} does not hold a scoring head: expected layers.N.weight and layers.N.bias of "
            f"linear layers that follow each other and end in one number, got {shapes}"
        )
    layers = []
    for index, weight in zip(indices, weights, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight.float())
        layer.bias = nn.Parameter(tensors[f"layers.{index}.bias"].float())
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def _is_layer(name: str, part: str) -> bool:
    pieces = name.split(".")
    return len(pieces) == 3 and pieces[0] == "layers" and pieces[1].isdigit() and pieces[2] == part
