"""Detectors: objects of random logits, of a tiny Mask2Former and of a tiny DETR, by hand.

Kills, among others: masks that are stretched after they are cut off at 0, or over the padding; a
confidence without its mask; a box that ends on its last pixel; more pairs than the likeliest 100;
boxes that leave the image; the classes' names of the checkpoint instead of GenEval's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rewards.backbones import Placement
from rewards.detector import Detector, Found, instances, load_detector
from rewards.simple import pil_images

ByHand = Callable[..., list[Any]]


def same(found: list[Found], expected: list[Any], names: list[str]) -> None:
    """Asserts that both hold the same objects, in any order."""
    assert len(found) == len(expected)
    ordered = sorted(found, key=lambda each: -each.score)
    for one, (label, score, box, mask) in zip(
        ordered, sorted(expected, key=lambda each: -each[1]), strict=True
    ):
        assert one.shape == names[label] and one.color == ""
        assert one.score == pytest.approx(score, abs=1e-4)
        assert one.box == pytest.approx(tuple(box), abs=1e-3)
        assert mask is None if one.mask is None else np.array_equal(one.mask, mask)


def detector(folder: Path) -> Detector:
    return load_detector(
        str(folder), Placement("cpu", "float32", 8), reward="GenEval", argument="detector"
    )


def test_an_instance_golden() -> None:
    mask = torch.full((1, 4, 4), -20.0)
    mask[0, 1:3, 2:4] = 20
    share = np.exp(2) / (np.exp(2) + 2)
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    parts = instances(logits, mask, sizes=((4, 4),) * 3, threshold=0.5)
    scores, labels, boxes, masks = parts
    assert scores.tolist() == pytest.approx([share]) and labels.tolist() == [0]
    assert boxes.tolist() == [[2, 1, 4, 3]]
    assert masks.tolist() == (mask > 0).tolist()
    for threshold in (0.79, 0.9):  # above the confidence
        parts = instances(logits, mask, sizes=((4, 4),) * 3, threshold=threshold)
        assert [list(part.shape) for part in parts] == [[0], [0], [0, 4], [0, 4, 4]]


@pytest.mark.parametrize("num_queries", [7, 60])
def test_instances_are_those_by_hand(num_queries: int, objects: ByHand, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(num_queries)
    class_logits = 3 * torch.randn(num_queries, 5, generator=generator)
    mask_logits = 3 * torch.randn(num_queries, 5, 6, generator=generator)
    for sizes in [((20, 24), (18, 19), (31, 27)), ((9, 9), (9, 9), (8, 16))]:
        for threshold in (0.0, 0.3):
            expected = objects(class_logits, mask_logits, sizes, threshold)
            parts = instances(class_logits, mask_logits, sizes=sizes, threshold=threshold)
            found = [
                Found(names[label], score, tuple(box), mask.numpy())
                for score, label, box, mask in zip(
                    *[part.tolist() for part in parts[:3]], parts[3], strict=True
                )
            ]
            same(found, expected, names)
            assert len(expected) <= 100 and (num_queries < 60 or threshold or len(expected) > 90)


def test_mask2formers_objects_are_those_by_hand(
    mask2former: Path, small: Tensor, by_hand: ByHand, names: list[str]
) -> None:
    found = detector(mask2former).detect(small, threshold=0.3)
    for each, image in zip(found, small, strict=True):
        expected = by_hand(mask2former, image, 0.3)
        assert len(expected) > 2 and len({box for _, _, box, _ in expected}) > 1
        same(each, expected, names)


def test_padding_is_no_part_of_an_image(
    mask2former: Path, small: Tensor, objects: ByHand, names: list[str], tmp_path: Path
) -> None:
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    model.save_pretrained(tmp_path)
    processor = Mask2FormerImageProcessor(do_resize=False, pad_size={"height": 96, "width": 128})
    processor.save_pretrained(tmp_path)
    wide = torch.cat([small[:1], small[1:2, ..., :16]], dim=-1)
    inputs = processor(images=[*pil_images(wide)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 128)
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = ((96, 128), (64, 80), (64, 80))
    logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
    expected = objects(*logits, sizes, 0.3)
    assert expected
    same(detector(tmp_path).detect(wide, threshold=0.3)[0], expected, names)


def test_detrs_objects_are_those_by_hand(
    detr: Path, small: Tensor, pixels: Callable[[Tensor], Tensor], names: list[str]
) -> None:
    from transformers import DetrForObjectDetection

    model = DetrForObjectDetection.from_pretrained(detr).eval()
    below = above = 0
    for found, image in zip(detector(detr).detect(small, threshold=0.3), small, strict=True):
        with torch.no_grad():
            outputs = model(pixel_values=pixels(image))
        exponents = np.exp(outputs.logits[0].double().numpy())
        shares = (exponents / exponents.sum(-1, keepdims=True))[:, :-1]
        expected = []
        for share, (x, y, w, h) in zip(shares, outputs.pred_boxes[0].tolist(), strict=True):
            corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * 64
            if share.max() > 0.3:
                below, above = below + (corners < 0).sum(), above + (corners > 64).sum()
                expected.append((share.argmax(), share.max(), corners.clip(0, 64), None))
        same(found, expected, names)
    assert below and above


def test_the_classes_go_by_genevals_names(mask2former: Path, names: list[str]) -> None:
    assert detector(mask2former).names == set(names)
