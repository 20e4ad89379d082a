"""The feature network of a Frechet distance: Inception where its weights are, else a small one.

Nothing is downloaded. Which network it was is part of every record: distances by different networks
say nothing about one another. Reading order: `load_features`, `feature_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.errors import ConfigError

_INCEPTION_SIZE = 299
_FID_CLASSES = 1008  # of the network that published distances are by


@dataclass(frozen=True)
class FeatureNetwork:
    """A network and what is to be said about it.

    Attributes:
        name: short, for tables.
        about: a sentence for the page.
        embed: float images [B, 3, H, W] in [0, 1] -> float [B, D].
    """

    name: str
    about: str
    embed: Callable[[Tensor], Tensor]


def load_features(source: str = "auto", *, device: str = "cpu") -> FeatureNetwork:
    """The feature network of a name or a file.

    Args:
        source: "auto" = ImageNet's Inception if it lies in torch's or the Hub's cache, else
            "shapes"; "inception" = that one or an error; "shapes" = the small network of this
            repository; or a file: TorchScript (`inception-2015-12-05.pt`, by which published
            distances are measured, or any module float [B, 3, H, W] in [0, 1] -> [B, D]), or a
            state dict (.pth, .safetensors) of torchvision's or timm's inception_v3.
        device: where it runs.

    Raises:
        ConfigError: there is no such network, or the file is another one's.
    """
    if source in ("auto", "inception"):
        found = cached_inception()
        if found is not None:
            return _inception(found, device)
        if source == "inception":
            raise ConfigError(
                "features=inception: the weights of inception_v3 lie neither in torch's nor in the "
                "Hub's cache; name their file, or use features=shapes"
            )
        return _shapes(device)
    if source == "shapes":
        return _shapes(device)
    file = Path(source).expanduser()
    if not file.is_file():
        raise ConfigError(f"features={source}: expected auto, inception, shapes or a file")
    if file.suffix == ".safetensors" or not _is_script(file):
        return _inception(file, device)
    return _script(file, device)


@torch.no_grad()
def feature_rows(network: FeatureNetwork, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Features float32 [N, D] on the CPU; of clips all frames, as [N * F, D]."""
    frames = images.flatten(0, 1) if images.ndim == 5 else images
    return torch.cat([network.embed(part).float().cpu() for part in frames.split(batch_size)])


def cached_inception() -> Path | None:
    """A file of ImageNet's inception_v3 that torchvision or timm has downloaded before."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    found = sorted(hub.glob("inception_v3_google-*.pth"))
    if found:
        return found[-1]
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache("timm/inception_v3.tv_in1k", "model.safetensors")
    return Path(file) if isinstance(file, str) else None


def _shapes(device: str) -> FeatureNetwork:
    from rewards.shapes.features import ShapesFeatures

    network = ShapesFeatures.load().to(device)
    return FeatureNetwork(
        "Shapes classifier",
        "A small classifier of shapes, colours and their number, trained in this repository on "
        "clean renders, in place of Inception, whose weights were not there. Distances by it "
        "compare with one another, and with no published FID.",
        lambda images: network(images.to(device)),
    )


def _inception(file: Path, device: str) -> FeatureNetwork:
    """Torchvision's inception_v3 up to its pooled 2048 features; timm's has the same names."""
    from torchvision.models import inception_v3

    state = _state_dict(file)
    classes = len(state.get("fc.bias", ()))
    if classes == _FID_CLASSES:
        raise ConfigError(
            f"{file} is a copy of FID's own Inception, which pools differently from torchvision's; "
            "give its TorchScript form, inception-2015-12-05.pt"
        )
    has_aux = any(key.startswith("AuxLogits") for key in state)
    network: Any = inception_v3(
        weights=None, init_weights=False, aux_logits=has_aux, num_classes=classes or 1000
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{file} does not fit inception_v3: {error}") from error
    network.fc = nn.Identity()
    network.eval().requires_grad_(False).to(device)

    def embed(images: Tensor) -> Tensor:
        size = (_INCEPTION_SIZE, _INCEPTION_SIZE)
        large = F.interpolate(images.to(device), size=size, mode="bilinear", antialias=True)
        features: Tensor = network(large * 2 - 1)  # what both libraries' weights were made with
        return features

    return FeatureNetwork(
        "Inception v3 (ImageNet)",
        f"Pooled features of inception_v3 ({file.name}), images resized to 299 x 299. Not the copy "
        "of Inception that published FIDs use.",
        embed,
    )


def _script(file: Path, device: str) -> FeatureNetwork:
    """A TorchScript module; that of StyleGAN's FID takes bytes and resizes by itself."""
    network: Any = torch.jit.load(str(file), map_location=device).eval()
    is_fid = "return_features" in {each.name for each in network.forward.schema.arguments}

    def embed(images: Tensor) -> Tensor:
        images = images.to(device)
        if not is_fid:
            found: Tensor = network(images)
            return found
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        features: Tensor = network(pixels, return_features=True)
        return features

    if is_fid:
        about = f"FID's own Inception ({file.name}), by which published distances are measured."
        return FeatureNetwork("Inception (FID)", about, embed)
    return FeatureNetwork(file.stem, f"The TorchScript module {file.name}.", embed)


def _is_script(file: Path) -> bool:
    """Whether a file is TorchScript: an archive with code in it."""
    import zipfile

    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def _state_dict(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    state = torch.load(file, weights_only=True, map_location="cpu")
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"{file} holds no state dict")
    return state
