"""Teachers: frozen networks whose features a tokenizer is taught. A teacher is a callable.

It takes images [B, 3, H, W] in [0, 1] and returns features of patches, [B, N, D], or of the image,
[B, D]. Any function does; `frozen` makes one of a module, `timm_teacher` one of timm's by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Teacher = Callable[[Tensor], Tensor]


class Frozen(nn.Module):
    """A copy of a network in evaluation mode, without gradient, on the device of its images.

    Args:
        network: images -> features.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.network.to(images.device)(images)
        return features.float()

    def train(self, mode: bool = True) -> Frozen:
        """The network stays in evaluation mode."""
        return super().train(False)


def frozen(network: nn.Module) -> Teacher:
    """The teacher that a network is now; what happens to the network later does not change it."""
    return Frozen(network)


def timm_teacher(
    name: str, *, image_size: int | None = None, is_pretrained: bool = True
) -> Teacher:
    """A network of timm by name, with its own preprocessing; loaded when this is called.

    For instance "vit_small_patch14_dinov2.lvd142m". Its features are those of the patches,
    [B, N, D]: class and register tokens are left out, and a convolutional network's map is read
    row by row.

    Args:
        name: of timm's, or "hf-hub:..." for a Hub id.
        image_size: to which images are resized; None = the size that it was trained with.
        is_pretrained: False = random weights.
    """
    import timm
    from timm.data.config import resolve_model_data_config

    network: Any = timm.create_model(name, pretrained=is_pretrained, num_classes=0)
    if image_size is not None and network.pretrained_cfg.get("fixed_input_size"):
        network.set_input_size(img_size=image_size)  # resamples the embeddings of positions
    data = resolve_model_data_config(network)
    return Frozen(
        _Patches(network, image_size or data["input_size"][-1], data["mean"], data["std"])
    )


class _Patches(nn.Module):
    """Preprocessing and the features of patches of a timm network."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        sized = F.interpolate(images, size=size, mode="bicubic", antialias=True)
        found: Tensor = self.network.forward_features((sized - self.mean) / self.std)  # type: ignore[operator]
        if found.ndim == 4:
            return found.flatten(2).transpose(1, 2)
        return found[:, getattr(self.network, "num_prefix_tokens", 0) :]


def on_grid(features: Tensor, side: int) -> Tensor:
    """A teacher's features on a grid of side x side, [B, side * side, D].

    Features [B, N, D] of a square grid are resized (bilinear, as TokenFlow resizes its teacher's);
    features [B, D] of the whole image stand at every position.

    Raises:
        ValueError: features of another shape, or N that is no square.
    """
    if features.ndim == 2:
        return features[:, None].expand(-1, side * side, -1)
    rows = math.isqrt(features.shape[1]) if features.ndim == 3 else 0
    if not rows or rows * rows != features.shape[1]:
        raise ValueError(
            f"a teacher gives features [B, D], or [B, N, D] of a square grid, "
            f"got {list(features.shape)}"
        )
    if rows == side:
        return features
    grid = features.transpose(1, 2).unflatten(2, (rows, rows))
    resized = F.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)
    return resized.flatten(2).transpose(1, 2)


def cosine_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """1 - cos [...] of features and a teacher's [..., D]; the teacher's are detached."""
    return 1 - F.cosine_similarity(features.float(), wanted.detach().float(), dim=-1)
