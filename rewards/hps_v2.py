"""HPSv2: how well an image pleases people for its prompt, by a CLIP ViT-H/14 trained on rankings.

Paper: HPS v2, arXiv:2306.09341, section 4. The score is the cosine, as the published `score()`
returns it; the benchmark's figures are 100 times that. Reading order: `HpsV2.score`, `fit_square`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, pad

from rewards.backbones import Placement, checkpoint_file, load_tensors, score_in_batches, shared
from rewards.base import Metadata
from rewards.cards import Card
from rewards.clip import normalized


@dataclass(frozen=True, eq=False)
class _Network:
    """A CLIP of open_clip and its tokenizer."""

    model: Any
    tokenizer: Any


class HpsV2:
    """cos(text, image) of every image and its prompt, near 0.2 to 0.35.

    The preprocessing is that of the published scoring code: the 8 bit image as floats, longer side
    to 224 bicubic, centred on black, CLIP's mean and std; the prompt cut to 77 tokens. Other than
    CLIP's own preprocessing it crops nothing. Differs: float32 instead of automatic half precision.

    Args:
        model: the checkpoint, or a folder or Hub id that holds it: a torch file with the weights
            under "state_dict", or a .safetensors file of the same names.
        file: its name there; "HPS_v2_compressed.pt" is version 2.0.
        architecture: name of open_clip, or "local-dir:FOLDER" with an open_clip_config.json.
        antialias: of the resize. False is how the network was trained and the paper scored: up to
            0.16, torchvision did not smooth tensors before it shrank them. True is what the same
            code does with later versions; the scores of large images change.
        device: where the model runs; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of the model; scores are float32.
        batch_size: images per forward; bounds the memory.

    Raises:
        ValueError: an unknown dtype, or a batch_size below 1.
    """

    inputs = ("images", "prompts")
    scope = "sample"
    range = (-1.0, 1.0)
    higher_is_better = True
    card = Card(
        name="hps_v2",
        model="xswu/HPSv2 HPS_v2.1_compressed.pt (version 2.1), architecture ViT-H-14 of open_clip",
        licence="Apache-2.0",
        paper="HPS v2, arXiv:2306.09341",
        inputs=inputs,
        range=range,
        parameters=986_109_441,
        preprocessing="8 bit RGB; longer side to 224 bicubic without smoothing, centred on black, "
        "CLIP's mean and std; 77 tokens of open_clip",
        verified="a random CLIP of open_clip saved like the published file, against torch by hand; "
        "not run on the published weights",
    )

    def __init__(
        self,
        *,
        model: str = "xswu/HPSv2",
        file: str = "HPS_v2.1_compressed.pt",
        architecture: str = "ViT-H-14",
        antialias: bool = False,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 64,
    ) -> None:
        self.model, self.file, self.architecture = model, file, architecture
        self.antialias = antialias
        self._placement = Placement(device, dtype, batch_size)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata] = ()
    ) -> Tensor:
        """Scores, float32 [B], of images float [B, 3, H, W] in [0, 1]; NaN for a broken image.

        Raises:
            ValueError: images of another shape or kind, not one prompt per image, or a checkpoint
                of another architecture.
            OSError: the weights are neither on this machine nor to be had.
            ImportError: open_clip is not installed.
        """
        size = self._placement.batch_size
        return score_in_batches(self._score, images, prompts, batch_size=size)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of one forward."""
        network, placement = self._network, self._placement
        levels = (images.float().clamp(0, 1) * 255).round() / 255
        side = network.model.visual.image_size[0]
        pixels = normalized(fit_square(levels, side, antialias=self.antialias))
        tokens = network.tokenizer(list(prompts)).to(placement.torch_device)
        placed = pixels.to(placement.torch_device, placement.torch_dtype)
        image = network.model.encode_image(placed).float()
        text = network.model.encode_text(tokens).float()
        return cosine_similarity(image, text).clamp(-1, 1)  # rounding may step over

    @cached_property
    def _network(self) -> _Network:
        path = checkpoint_file(self.model, self.file, reward="HpsV2")
        key = ("open_clip", self.architecture, str(path), *self._placement.key)
        return shared(key, lambda: _load(self.architecture, path, self._placement))


def fit_square(images: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Images [B, 3, size, size]: the longer side scaled to `size`, centred on black.

    An odd remainder goes to the right and the bottom. Bicubic values may leave [0, 1]; they are
    not cut.

    Args:
        images: float [B, 3, H, W].
        size: of the square.
        antialias: smooth before shrinking.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    fitted = round(height * scale), round(width * scale)
    resized = interpolate(images, fitted, mode="bicubic", antialias=antialias)
    below, right = size - fitted[0], size - fitted[1]
    return pad(resized, (right // 2, right - right // 2, below // 2, below - below // 2))


def _load(architecture: str, path: Path, placement: Placement) -> _Network:
    """The frozen network with the checkpoint's weights."""
    try:
        import open_clip  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "hps_v2 needs open_clip, which is not installed; run `pip install open-clip-torch`"
        ) from error

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(
            f"HpsV2's architecture {architecture!r} is not one of open_clip's; the published "
            "checkpoints are ViT-H-14"
        )
    model = open_clip.CLIP(**config)
    loaded = load_tensors(path)
    weights = loaded.get("state_dict", loaded)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint {path} is not one of {architecture}: expected the names and shapes of "
            f"open_clip's CLIP, got {len(weights)} others. {str(error).splitlines()[1].strip()}"
        ) from error
    frozen = model.eval().requires_grad_(False)
    placed = frozen.to(device=placement.torch_device, dtype=placement.torch_dtype)
    return _Network(placed, open_clip.get_tokenizer(architecture))
