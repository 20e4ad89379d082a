"""LPIPS, where its weights are: a distance of images in a classifier's features.

Paper: Zhang et al., arXiv:1801.03924, eq. 1. Two files are needed: the linear heads (the lpips
package's `weights/v0.1/vgg.pth` or `alex.pth`) and torchvision's VGG-16 or AlexNet. Nothing is
downloaded; without them the page says that LPIPS is absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import ConfigError

# Layers of torchvision's `features` after which a head looks, and the channels there.
_TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
_CHANNELS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
_BACKBONE_FILES = {"vgg": "vgg16-*.pth", "alex": "alexnet-owt-*.pth"}
# The paper's code takes images in [-1, 1] and standardises them by these.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distance [B] of two batches of images float [B, 3, H, W] in [0, 1].

    Args:
        heads: weights [1, C, 1, 1] of the five heads.
        backbone: `features` of torchvision's VGG-16 or AlexNet.
        kind: "vgg" or "alex".
    """

    def __init__(self, heads: list[Tensor], backbone: nn.Sequential, *, kind: str) -> None:
        super().__init__()
        self.kind, self.backbone = kind, backbone
        self.heads = nn.ParameterList(heads)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Sum over layers of the weighted squared difference of unit features, mean over places."""
        pair = torch.cat([images, originals])
        x: Tensor = (pair * 2 - 1 - self.shift) / self.scale
        total = torch.zeros(len(images), device=x.device)
        heads = iter(self.heads)
        for number, layer in enumerate(self.backbone[: _TAPS[self.kind][-1] + 1]):
            # Torchvision's activations work in place, on what a head has looked at before.
            x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer(x)
            if number in _TAPS[self.kind]:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                first, second = unit.chunk(2)
                total = total + ((first - second).square() * next(heads)).sum(1).mean((1, 2))
        return total


def load_lpips(heads: str, backbone: str | None = None, *, device: str = "cpu") -> Lpips:
    """LPIPS of two files.

    Args:
        heads: file of the linear heads.
        backbone: torchvision's state dict; None = the one in torch's cache.
        device: where it runs.

    Raises:
        ConfigError: a file is missing or does not fit.
    """
    import torchvision

    found = _read(Path(heads).expanduser(), "lpips")
    weights = [found[key] for key in sorted(found) if key.endswith("weight")]
    widths = tuple(each.shape[1] for each in weights)
    kind = next((name for name, each in _CHANNELS.items() if each == widths), None)
    if kind is None:
        raise ConfigError(
            f"lpips={heads}: expected five heads of {_CHANNELS['vgg']} (VGG) or "
            f"{_CHANNELS['alex']} (AlexNet) channels, got {widths}"
        )
    file = _cached(kind) if backbone is None else Path(backbone).expanduser()
    makers: dict[str, Any] = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}
    with torch.device("meta"):
        network = makers[kind](weights=None)
    state = _read(file, "lpips_backbone")
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{file} does not fit torchvision's {kind}: {error}") from error
    return Lpips(weights, network.features, kind=kind).to(device)


def _cached(kind: str) -> Path:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    found = sorted(hub.glob(_BACKBONE_FILES[kind]))
    if not found:
        raise ConfigError(
            f"lpips: {hub} has no {_BACKBONE_FILES[kind]}; name torchvision's weights by "
            "lpips_backbone"
        )
    return found[-1]


def _read(file: Path, what: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ConfigError(f"{what}={file}: there is no such file")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    state: dict[str, Tensor] = torch.load(file, weights_only=True, map_location="cpu")
    return state
