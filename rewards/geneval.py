"""GenEval: does an image show the objects, counts, colours and places that its prompt asks for?

Paper: GenEval, arXiv:2310.11513, section 3. A detector finds COCO's 80 classes, CLIP names the
colour of an object that is cut out along its mask, and the row of metadata is judged by
`rewards.shapes.score`. Differs: the detector is one of transformers instead of mmdet's Mask2Former
with Swin-S, so scores are near the published ones, not equal. Reading order: `GenEval.find`,
`GenEval.score`, then `rewards.geneval_logic` and `rewards.detector`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from rewards.backbones import Placement
from rewards.base import Metadata, check_images, finite_images
from rewards.cards import Card
from rewards.clip import Clip, load_clip
from rewards.detector import Detector, Found, load_detector
from rewards.geneval_logic import COLORS, asked, flow_grpo_reward, strongest
from rewards.shapes.score import score_detections
from rewards.simple import pil_images

TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = (153, 153, 153)  # what CLIP sees beside the object, "#999"
VARIANTS: Mapping[str, Callable[[Sequence[Found], Metadata], float]] = {
    "strict": lambda found, row: float(score_detections(found, row).correct),
    "graded": lambda found, row: score_detections(found, row).fraction,
    "flow_grpo": flow_grpo_reward,
}


class GenEval:
    """1 for an image that meets all requirements of its row of GenEval's metadata, else 0.

    As published: objects above a confidence of 0.3, or of 0.9 where the row's tag is "counting"; at
    most 16 of a class; no suppression of overlaps; `include` looks at the surest `count` objects of
    a class, `exclude` at all; a colour is the likeliest of ten by CLIP ViT-L/14 on the object's box
    with everything else grey, against the mean of three templates.
    Differs: the detector is of the published architecture, Mask2Former with Swin-S, in
    transformers, trained by its authors and not by mmdet's (`detector=` takes others: Swin-L finds
    more); the image is resized by the detector's own processor, to a multiple of 32
    without padding; CLIP runs in float32 instead of half precision. The reasons of a verdict:
    `score_detections(objects, row).reason` for the objects of `find`.

    Args:
        variant: "strict", as published; "graded", the share of the requirements that hold;
            "flow_grpo", what Flow-GRPO trains on (`rewards.geneval_logic.flow_grpo_reward`).
        detector: Hub id, or a folder in transformers' format, of a model for universal segmentation
            or object detection with COCO's classes. One without masks leaves the background of an
            object's box in the picture whose colour is judged, as the published code does.
        clip: Hub id, or a folder in transformers' format, of a CLIP with its processor.
        threshold: an object's confidence has to be above it.
        counting_threshold: the same for rows with the tag "counting".
        max_objects: of a class in an image.
        max_overlap: objects that overlap a surer one of their class by this intersection over
            union are dropped; 1 = none.
        device: where the models run; None = the current GPU, or the CPU without one.
        dtype: "float32", "bfloat16" or "float16", of both models; confidences are float32.
        batch_size: images, or objects, per forward; bounds the memory.

    Raises:
        ValueError: an unknown variant or dtype, a threshold outside [0, 1), or a batch_size or
            max_objects below 1.
    """

    inputs = ("images", "metadata")
    scope = "sample"
    range = (0.0, 1.0)
    higher_is_better = True
    card = Card(
        name="geneval",
        model="facebook/mask2former-swin-small-coco-instance for objects (the benchmark: mmdet's "
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco), openai/clip-vit-large-patch14 for colours",
        licence="'other' by its model card, MIT by its publisher's repository (Mask2Former); MIT "
        "(CLIP)",
        paper="GenEval, arXiv:2310.11513",
        inputs=inputs,
        range=range,
        parameters=68_741_083 + 427_616_513,
        preprocessing="8 bit RGB, then each model's own processor; for colours the object's box, "
        "grey outside its mask",
        verified="rules by hand and against a second writing of the published ones; objects of a "
        "random Mask2Former and DETR, and colours of a random CLIP, by hand; not run on published "
        "weights",
    )

    def __init__(
        self,
        *,
        variant: str = "strict",
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if not (0 <= threshold < 1 and 0 <= counting_threshold < 1):
            raise ValueError(
                f"thresholds must be in [0, 1), got {threshold} and counting {counting_threshold}"
            )
        if max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, got {max_objects}")
        if variant == "flow_grpo":  # the most objects where one is asked for
            self.range = (2.0 - max_objects, 1.0)
        self.detector, self.clip = detector, clip
        self._value = VARIANTS[variant]
        self._thresholds = {False: threshold, True: counting_threshold}
        self._max_objects, self._max_overlap = max_objects, max_overlap
        self._placement = Placement(device, dtype, batch_size)
        self._colors_of: dict[str, Tensor] = {}

    def score(
        self, *, images: Tensor, prompts: Sequence[str] = (), metadata: Sequence[Metadata]
    ) -> Tensor:
        """Scores, float32 [B]; NaN for an image that is not finite.

        Args:
            images: float [B, 3, H, W] in [0, 1].
            prompts: not read.
            metadata: B rows of GenEval's format: `tag`, `include` and optionally `exclude`.

        Raises:
            ValueError: images of another shape or kind, another number of rows, a row without tag
                or requirements, or one with a class or colour that cannot be recognised.
            OSError: the weights are neither on this machine nor to be had.
        """
        pairs = zip(self.find(images=images, metadata=metadata), metadata, strict=True)
        scores = [
            float("nan") if found is None else self._value(found, row) for found, row in pairs
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    @torch.no_grad()
    def find(self, *, images: Tensor, metadata: Sequence[Metadata]) -> list[list[Found] | None]:
        """The objects of each image that count for its row; None where an image is not finite.

        Each class from the surest on, with a colour where the row asks for one. Args and Raises: as
        `score`.
        """
        check_images(images)
        if len(metadata) != len(images):
            raise ValueError(f"expected {len(images)} rows of metadata, got {len(metadata)}")
        names = self._detector.names
        for row in metadata:
            _check_row(row, names)
        found: list[list[Found] | None] = [None] * len(images)
        usable = finite_images(images).nonzero().flatten().tolist()
        for start in range(0, len(usable), self._placement.batch_size):
            index = usable[start : start + self._placement.batch_size]
            limits = [self._thresholds[metadata[i]["tag"] == "counting"] for i in index]
            detected = self._detector.detect(images[index], threshold=min(limits))
            for i, objects, limit in zip(index, detected, limits, strict=True):
                kept = strongest(
                    objects,
                    threshold=limit,
                    max_objects=self._max_objects,
                    max_overlap=self._max_overlap,
                )
                found[i] = self._painted(images[i], kept, asked(kept, metadata[i]))
        return found

    def _painted(self, image: Tensor, found: list[Found], chosen: Sequence[int]) -> list[Found]:
        """`found` with the colours of those at `chosen`."""
        if not chosen:
            return found
        painted = list(found)
        [picture] = pil_images(image[None])
        size = self._placement.batch_size
        for start in range(0, len(chosen), size):
            index = chosen[start : start + size]
            seen = normalize(self._clip.embed_pictures([cut(picture, found[i]) for i in index]))
            for i, embedding in zip(index, seen, strict=True):
                likeliest = int((self._colors(found[i].shape) @ embedding).argmax())
                painted[i] = replace(found[i], color=COLORS[likeliest])
        return painted

    def _colors(self, name: str) -> Tensor:
        """CLIP's directions, float32 [10, D], of the colours of class `name`."""
        if name not in self._colors_of:
            texts = [t.format(color=color, name=name) for color in COLORS for t in TEMPLATES]
            each = normalize(self._clip.embed_texts(texts)).reshape(len(COLORS), len(TEMPLATES), -1)
            self._colors_of[name] = normalize(each.mean(1))
        return self._colors_of[name]

    @cached_property
    def _detector(self) -> Detector:
        return load_detector(self.detector, self._placement, reward="GenEval", argument="detector")

    @cached_property
    def _clip(self) -> Clip:
        return load_clip(self.clip, self._placement, reward="GenEval", argument="clip")


def _check_row(row: Metadata, names: Collection[str]) -> None:
    """Raises ValueError unless a detector of the classes `names` and CLIP can judge a row."""
    items = [*row.get("include", []), *row.get("exclude", [])]
    if "tag" not in row or not items:
        raise ValueError(
            "expected GenEval's 'tag' and 'include' or 'exclude' in the metadata, got "
            f"{dict(row)!r}; where the tag is 'counting', only sure objects count"
        )
    for item in items:
        if item["class"] not in names:
            raise ValueError(
                f"class {item['class']!r} of the metadata is none of the detector's: "
                f"{', '.join(sorted(names))}"
            )
        if item.get("color", COLORS[0]) not in COLORS:
            raise ValueError(
                f"colour {item['color']!r} of the metadata is none of {', '.join(COLORS)}"
            )


def cut(picture: Image.Image, found: Found) -> Image.Image:
    """The box of an object, at least a pixel wide and high, grey where its mask is not."""
    if found.mask is not None:
        mask = Image.fromarray(found.mask.astype("uint8") * 255)
        picture = Image.composite(picture, Image.new("RGB", picture.size, BACKGROUND), mask)
    x0, y0, x1, y1 = map(round, found.box)
    return picture.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
