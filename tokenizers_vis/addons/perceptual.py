"""The perceptual loss: distances of VGG-16's features, with weights that the user has.

Paper: LPIPS, arXiv:1801.03924. Nothing is downloaded: without a file of weights there is no such
loss, and random features are not called perceptual.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokenizer import TokenizerOutput, VisualTokenizer

_ENDS = (4, 9, 16, 23, 30)  # of torchvision's VGG-16: after relu1_2, 2_2, 3_3, 4_3 and 5_3
_WIDTHS = (64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_LEAST_SIZE = 16  # of an image: VGG halves it four times before its last features


class Perceptual(AddOn):
    """Distance of sample and reconstruction in the features of VGG-16; clips frame by frame.

    Args:
        weights: file of torchvision's `vgg16` (.pth or .safetensors; the classifier is not needed).
        heads: file of LPIPS's linear heads (`vgg.pth` of its repository); None = every channel
            counts the same, and the loss is no LPIPS.
        weight: of the loss; LARP's is 1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no VGG-16, or these are no heads of it.
    """

    needs_reconstruction = True
    mean: Tensor
    std: Tensor

    def __init__(
        self, *, weights: Path | str, heads: Path | str | None = None, weight: float = 1.0
    ) -> None:
        super().__init__()
        from torchvision.models import vgg16  # type: ignore[import-untyped]

        self.weight = weight
        with torch.device("meta"):  # its classifier has 100 M numbers that nobody needs
            features = vgg16(weights=None, init_weights=False).features
        self.features = features.to_empty(device="cpu")
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # features are kept while the next layer runs
        stored = _read(weights)
        found = {
            name.removeprefix("features."): value
            for name, value in stored.items()
            if name.startswith("features.")
        }
        _load(self.features, found, weights, "torchvision's vgg16")
        self.heads = nn.ParameterList(torch.full((width,), 1 / width) for width in _WIDTHS)
        if heads is not None:
            given = _read(heads)
            named = {
                str(number): given[name].flatten()
                for number in range(len(_WIDTHS))
                if (name := f"lin{number}.model.1.weight") in given
            }
            _load(self.heads, named, heads, "LPIPS's heads of VGG")
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_STD)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def attach(self, tokenizer: VisualTokenizer) -> None:
        if not tokenizer.is_decodable or tokenizer.is_generative:
            raise ValueError(f"{tokenizer.name} gives no reconstruction to look at in training")
        size = min(tokenizer.sample_shape[-2:])
        if size < _LEAST_SIZE:
            raise ValueError(f"VGG-16 needs {_LEAST_SIZE} pixels or more, got {size}")
        self.to(next(tokenizer.parameters()).device)

    def forward(
        self,
        images: Tensor,
        output: TokenizerOutput,
        *,
        progress: float,
        generator: torch.Generator | None,
    ) -> dict[str, LossTerm]:
        if output.reconstruction is None:
            raise ValueError("a perceptual loss needs an output with a reconstruction")
        distance = self.distance(output.reconstruction, images)
        return {"perceptual": LossTerm(self.weight, distance.mean())}

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """[B], or [B * F] of clips: sum over layers of the mean over places of h . (a^ - b^)^2.

        LPIPS eq. 1; a^ and b^ have unit length over channels, h are the heads.
        """
        total = a.new_zeros(len(a.flatten(0, -4)))
        x, y = self._scaled(a), self._scaled(b)
        layers = list(self.features)
        for start, end, head in zip((0, *_ENDS), _ENDS, self.heads, strict=False):
            for layer in layers[start:end]:
                x, y = layer(x), layer(y)
            error = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
            total = total + (error * head[:, None, None]).sum(1).mean((1, 2))
        return total

    def _scaled(self, images: Tensor) -> Tensor:
        return (images.flatten(0, -4).float() - self.mean) / self.std

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode."""
        return super().train(False)


def _read(file: Path | str) -> dict[str, Tensor]:
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(stored).__name__}")
    return stored


def _load(module: nn.Module, state: dict[str, Tensor], file: Path | str, what: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold {what}: {error}") from error
