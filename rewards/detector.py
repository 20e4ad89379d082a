"""Objects in an image, by a detector of transformers: class, confidence, box and, if it has, mask.

Two kinds are read: models of masks and classes per query (Mask2Former, arXiv:2112.01527; its kin
with the same outputs) and models of boxes (DETR and its kin, by their processors). The boxes and
confidences of masks are made as mmdet 2.27 makes them, whose Mask2Former is GenEval's detector;
transformers' own post-processing stretches binary masks of 384 x 384 to the image instead. Reading
order: `Found`, `Detector.detect`, `instances`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from rewards.backbones import Placement, pretrained_model, pretrained_processor
from rewards.simple import pil_images

MAX_PER_IMAGE = 100  # pairs of query and class that are looked at, as in COCO's evaluation

# The same class in COCO, or in the label file of several converted checkpoints -> in GenEval.
_GENEVAL_NAMES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


@dataclass(frozen=True)
class Found:
    """An object in an image, as `rewards.shapes.score` reads it.

    Attributes:
        shape: its class, under GenEval's name.
        score: the confidence, in [0, 1].
        box: (x0, y0, x1, y1) in pixels of the image, y downwards.
        mask: bool [H, W], True on the object; None from a detector of boxes.
        color: one of GenEval's colours; "" where nobody asked.
    """

    shape: str
    score: float
    box: tuple[float, float, float, float]
    mask: NDArray[Any] | None = None
    color: str = ""


@dataclass(frozen=True)
class Detector:
    """A detector of transformers with its processor.

    Attributes:
        model: with class and mask logits per query, or with what the processor reads boxes from.
        processor: of images.
        has_masks: which of the two it is.
    """

    model: Any
    processor: Any
    has_masks: bool

    @property
    def names(self) -> frozenset[str]:
        """The classes that it knows, under GenEval's names."""
        return frozenset(map(geneval_name, self.model.config.id2label.values()))

    def detect(self, images: Tensor, *, threshold: float) -> list[list[Found]]:
        """The objects of each image with a confidence above `threshold`, in any order.

        The image goes to the processor as 8 bit RGB and is processed by its settings.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            threshold: in [0, 1].
        """
        inputs = self.processor(images=pil_images(images), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        outputs = self.model(**inputs)
        size = (images.shape[-2], images.shape[-1])
        if not self.has_masks:
            return self._boxes(outputs, size, threshold, len(images))
        padded = tuple(inputs["pixel_values"].shape[-2:])
        found = []
        for i in range(len(images)):
            shown = padded
            if "pixel_mask" in inputs:  # 0 where the processor padded, on the right and below
                used = inputs["pixel_mask"][i].bool()
                shown = (int(used.any(1).sum()), int(used.any(0).sum()))
            parts = instances(
                outputs.class_queries_logits[i].float(),
                outputs.masks_queries_logits[i].float(),
                sizes=(padded, shown, size),
                threshold=threshold,
            )
            found.append(self._found(*parts))
        return found

    def _boxes(
        self, outputs: Any, size: tuple[int, int], threshold: float, num: int
    ) -> list[list[Found]]:
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        results = self.processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=[size] * num
        )
        height, width = size
        limit = results[0]["boxes"].new_tensor([width, height, width, height])
        return [
            self._found(each["scores"], each["labels"], each["boxes"].clamp(min=0).minimum(limit))
            for each in results
        ]

    def _found(
        self, scores: Tensor, labels: Tensor, boxes: Tensor, masks: Tensor | None = None
    ) -> list[Found]:
        columns = zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True)
        arrays = [None] * len(scores) if masks is None else list(masks.cpu().numpy())
        names = self.model.config.id2label
        return [
            Found(geneval_name(names[label]), score, tuple(box), mask)
            for (score, label, box), mask in zip(columns, arrays, strict=True)
        ]


def geneval_name(label: str) -> str:
    """GenEval's name of a class that a checkpoint calls `label`."""
    return _GENEVAL_NAMES.get(label, label)


def instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Confidences, labels, boxes and masks of one image, of objects above `threshold`.

    The confidence is the probability of the class times the mean probability of the mask's pixels;
    of all pairs of a query and a class the `MAX_PER_IMAGE` likeliest are taken, so a query may be
    two objects. A box spans from its mask's first pixel to behind its last.

    Args:
        class_logits: float32 [Q, C + 1], the last for "no object".
        mask_logits: float32 [Q, h, w].
        sizes: (height, width) of what the network saw, of the part of it that is not padding, and
            of the image; the logits are stretched to the first, cut to the second and stretched to
            the third.
        threshold: in [0, 1].

    Returns:
        float32 [N], int64 [N], float32 [N, 4] as (x0, y0, x1, y1), bool [N, H, W].
    """
    padded, (height, width), size = sizes
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    likeliest = probabilities.flatten().topk(min(MAX_PER_IMAGE, probabilities.numel()))
    # A mask can only lower the confidence, so the rest need not be stretched.
    pairs = likeliest.indices[likeliest.values > threshold]
    if not len(pairs):
        masks = torch.zeros((0, *size), dtype=torch.bool, device=class_logits.device)
        return class_logits.new_zeros(0), pairs, class_logits.new_zeros(0, 4), masks
    queries = torch.div(pairs, num_classes, rounding_mode="floor")
    seen = interpolate(mask_logits[queries][None], padded, mode="bilinear")
    shown = interpolate(seen[..., :height, :width], size, mode="bilinear")[0]
    masks = shown > 0
    mass = (shown.sigmoid() * masks).flatten(1).sum(1)
    scores = probabilities.flatten()[pairs] * mass / (masks.flatten(1).sum(1) + 1e-6)
    kept = scores > threshold
    return scores[kept], pairs[kept] % num_classes, _bounds(masks[kept]), masks[kept]


def _bounds(masks: Tensor) -> Tensor:
    """Boxes, float32 [N, 4], of masks [N, H, W] that are not empty."""
    sides = []
    for axis in (1, 2):  # over rows: the columns that are used, then the other way round
        used = masks.any(axis).int()
        first, last = used.argmax(1), used.shape[1] - used.flip(1).argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).float()


def load_detector(source: str, placement: Placement, *, reward: str, argument: str) -> Detector:
    """The detector of Hub id or folder `source`.

    Args:
        source: Hub id, or a folder in transformers' format, of a model of masks or of boxes.
        placement: dtype and device.
        reward: who asks, for the error.
        argument: the argument of `reward` that `source` came from.

    Raises:
        OSError: it is neither on this machine nor to be had.
        ValueError: it is a model of another kind.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForObjectDetection,
        AutoModelForUniversalSegmentation,
    )

    asking = {"reward": reward, "argument": argument}
    config = pretrained_processor(AutoConfig, source, **asking)
    [architecture, *_] = config.architectures or [config.model_type]
    has_masks = architecture.endswith(("ForUniversalSegmentation", "ForInstanceSegmentation"))
    if not has_masks and not architecture.endswith("ForObjectDetection"):
        raise ValueError(
            f"{reward}'s {argument} {source!r} is a {architecture}; expected a model for "
            "universal segmentation or object detection, such as "
            "facebook/mask2former-swin-small-coco-instance"
        )
    kind = AutoModelForUniversalSegmentation if has_masks else AutoModelForObjectDetection
    processor = pretrained_processor(AutoImageProcessor, source, **asking)
    return Detector(pretrained_model(kind, source, placement, **asking), processor, has_masks)
