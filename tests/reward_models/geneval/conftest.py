"""A tiny Mask2Former, a tiny DETR, images of their own size, and their objects by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# Named as in several converted checkpoints; one row of GenEval's names below the other.
LABELS = dict(enumerate(["sofa", "person", "tvmonitor", "remote", "mouse", "cat"]))
NAMES = ["couch", "person", "tv", "tv remote", "computer mouse", "cat"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
Objects = list[tuple[int, float, tuple[int, ...], np.ndarray]]


@pytest.fixture(scope="session")
def names() -> list[str]:
    """GenEval's names of the labels of both detectors."""
    return NAMES


@pytest.fixture(scope="session")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of width 32 that finds many small things in anything, and its processor."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("mask2former")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      image_size=64, out_features=stages)  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=16, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=3,
        num_attention_heads=2, num_queries=10, id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )  # fmt: skip
    model = _redrawn(Mask2FormerForUniversalSegmentation(config))
    pixels = model.get_submodule("model.pixel_level_module.decoder.mask_projection")
    predictor = "model.transformer_module.decoder.mask_predictor"
    queries = model.get_submodule(f"{predictor}.mask_embedder.2.0")
    with torch.no_grad():
        model.class_predictor.weight.mul_(2)
        queries.weight.mul_(2)
        # The first channel is the same everywhere: a threshold that only a few pixels pass.
        pixels.weight[0] = 0
        pixels.bias[0] = 1
        queries.weight[0] = 0
        queries.bias[0] = -15
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DETR of width 32 whose boxes leave the image, and its processor."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    folder = tmp_path_factory.mktemp("detr")
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4,
                          layer_type="basic", out_features=["stage4"])  # fmt: skip
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}  # fmt: skip
    config = DetrConfig(
        backbone_config=resnet, d_model=32, num_queries=8, id2label=LABELS, **sizes,
        label2id={name: index for index, name in LABELS.items()},
    )  # fmt: skip
    model = _redrawn(DetrForObjectDetection(config))
    with torch.no_grad():
        model.class_labels_classifier.weight.mul_(2)
        model.bbox_predictor.layers[-1].bias.copy_(torch.tensor([-1.0, 1.0, 4.0, 4.0]))
    model.save_pretrained(folder)
    DetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def _redrawn(model: nn.Module) -> Any:
    """The model with weights that do not depend on how transformers' version starts them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim > 1:
                is_table = "quer" in name or "level_embed" in name
                std = 3.0 if is_table else 1.7 * (weight.shape[0] / weight.numel()) ** 0.5
                weight.copy_(std * torch.randn(weight.shape, generator=generator))
            elif name.endswith("bias"):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def small() -> Tensor:
    """Three coloured images of 64 x 64, the networks' own size, not on the 8 bit grid."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


@pytest.fixture(scope="session")
def pixels() -> Callable[[Tensor], Tensor]:
    """ImageNet's pixels [1, 3, 64, 64] of a small image."""

    def normalized(image: Tensor) -> Tensor:
        levels = np.rint(image.permute(1, 2, 0).numpy() * 255)
        return torch.tensor((levels / 255 - MEAN) / STD).float().permute(2, 0, 1)[None]

    return normalized


def stretched(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between the centres of pixels, constant beyond the outermost."""
    for axis, num in enumerate(size):
        old = values.shape[axis]
        at = ((np.arange(num) + 0.5) * old / num - 0.5).clip(0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (at - low).reshape(-1, *[1] * (1 - axis))
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values


@pytest.fixture(scope="session")
def objects() -> Callable[..., Objects]:
    """Label, confidence, box and mask of each object, pair by pair in float64."""
    return _objects


def _objects(class_logits: Tensor, mask_logits: Tensor, sizes: Any, threshold: float) -> Objects:
    padded, (height, width), size = sizes
    exponents = np.exp(class_logits.double().numpy())
    shares = exponents / exponents.sum(-1, keepdims=True)
    num = shares.shape[1] - 1
    pairs = sorted(
        ((shares[q, c], q, c) for q in range(len(shares)) for c in range(num)), reverse=True
    )
    found = []
    for share, query, label in pairs[:100]:
        seen = stretched(mask_logits[query].double().numpy(), padded)
        shown = stretched(seen[:height, :width], size)
        mask = shown > 0
        if mask.any():
            score = share * (1 / (1 + np.exp(-shown[mask]))).mean()
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            if score > threshold:
                found.append((label, score, box, mask))
    return found


@pytest.fixture(scope="session")
def by_hand(pixels: Callable[[Tensor], Tensor]) -> Callable[[Path, Tensor, float], Objects]:
    """The objects of a small image by the Mask2Former in a folder, from the surest on."""
    from transformers import Mask2FormerForUniversalSegmentation

    def found(folder: Path, image: Tensor, threshold: float) -> Objects:
        model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
        with torch.no_grad():
            outputs = model(pixel_values=pixels(image))
        logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
        unsorted = _objects(*logits, [(64, 64)] * 3, threshold)
        return sorted(unsorted, key=lambda each: -each[1])

    return found
