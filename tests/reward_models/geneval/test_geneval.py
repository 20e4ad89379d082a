"""GenEval on a tiny Mask2Former, a tiny DETR and a tiny CLIP: objects and colours by hand.

Rules and detectors have tests of their own beside this file. Kills, among others: a colour of the
whole image, of the box with its background, or by one template; a colour that nobody asked for; the
threshold of another row; an image that is not finite and gets a number.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rewards
from flowrl.testing import check_reward
from flowrl.types import Prompt
from rewards.backbones import Placement
from rewards.detector import Found, load_detector
from rewards.geneval import BACKGROUND, VARIANTS, GenEval, cut

COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
ByHand = Callable[[Path, Tensor, float], list[Any]]


def make(folder: Path, clip: Path, **args: object) -> GenEval:
    reward = rewards.load("geneval", detector=str(folder), clip=str(clip), **args)
    assert isinstance(reward, GenEval)
    return reward


def levels(image: Tensor) -> np.ndarray:
    return np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def test_an_object_is_cut_out_golden() -> None:
    picture = Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3))
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2] = True
    mask[2, 3] = True
    array = np.asarray(cut(picture, Found("cat", 0.9, (2, 1, 4, 3), mask)))
    whole = np.asarray(picture)
    assert array.tolist() == [[whole[1, 2].tolist(), [153] * 3],
                              [whole[2, 2].tolist(), whole[2, 3].tolist()]]  # fmt: skip
    # Without a mask the background stays; 1.4 and 0.6 round to 1, and no side is 0.
    array = np.asarray(cut(picture, Found("cat", 0.9, (1.4, 0.6, 2.6, 1.2))))
    assert array.tolist() == [whole[1, 1:3].tolist()]
    assert BACKGROUND == (0x99, 0x99, 0x99)


def directions(clip: Path, name: str) -> Tensor:
    """CLIP's directions of the colours of class `name`, float64 [10, D], one text at a time."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip, backend="pil")

    def direction(text: str) -> Tensor:
        ids = processor(text=f"a photo of a {text}", return_tensors="pt")
        read: Tensor = model.text_projection(model.text_model(**ids).pooler_output)[0].double()
        return read / read.norm()

    texts = [(f"{c} {name}", f"{c}-colored {name}", f"{c} object") for c in COLORS]
    with torch.no_grad():
        means = [torch.stack([direction(text) for text in three]).mean(0) for three in texts]
    return torch.stack([mean / mean.norm() for mean in means])


def test_a_colour_is_the_mean_of_three_templates(mask2former: Path, clip_folder: Path) -> None:
    with torch.no_grad():
        found = make(mask2former, clip_folder)._colors("tv remote")
    assert torch.allclose(found.double(), directions(clip_folder, "tv remote"), atol=1e-5)


def colored(clip: Path, image: Tensor, found: list[Any], names: list[str]) -> list[str]:
    """CLIP's colour of each object in a small image, one picture at a time."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip, backend="pil")
    of_label = {label: directions(clip, names[label]) for label in {each[0] for each in found}}
    named = []
    for label, _, (x0, y0, x1, y1), mask in found:
        kept = levels(image) >= 0 if mask is None else mask[..., None]
        array = np.where(kept, levels(image), np.uint8(153))[y0:y1, x0:x1]
        inputs = processor(images=Image.fromarray(array), return_tensors="pt")
        with torch.no_grad():
            seen = model.visual_projection(model.vision_model(**inputs).pooler_output)[0].double()
        cosines = of_label[label] @ seen / seen.norm()
        first, second = cosines.topk(2).values.tolist()
        assert first - second > 1e-5  # not a matter of rounding
        named.append(COLORS[int(cosines.argmax())])
    return named


def test_the_scores_are_those_of_objects_and_colours_by_hand(
    mask2former: Path, clip_folder: Path, small: Tensor, by_hand: ByHand, names: list[str]
) -> None:
    pictures, rows, expected = [], [], []
    seen = set()
    for image in small:
        hand = by_hand(mask2former, image, 0.3)
        colors = colored(clip_folder, image, hand, names)
        label = hand[0][0]
        own = [i for i, each in enumerate(hand) if each[0] == label]
        sure = sum(hand[i][1] > 0.6 for i in own)
        name, num, first = names[label], min(len(own), 16), colors[own[0]]
        seen |= {colors[i] for i in own}
        item = {"class": name, "count": 1}
        wrong = next(color for color in COLORS if color not in colors)
        all_of = [{"class": name, "count": len(own)}]
        for row, score in [
            ({"tag": "two_object", "include": [item]}, 1),
            ({"tag": "colors", "include": [{**item, "color": first}]}, 1),
            ({"tag": "colors", "include": [{**item, "color": wrong}]}, 0),
            ({"tag": "any", "include": all_of, "exclude": [{"class": name, "count": num}]}, 0),
            ({"tag": "any", "include": all_of, "exclude": [{"class": name, "count": num + 1}]}, 1),
            ({"tag": "any", "include": [{"class": name, "count": num + 1}]}, 0),
            # The other threshold; the score for too few is the count's.
            ({"tag": "counting", "include": [{"class": name, "count": len(own)}]},
             int(sure == len(own))),
            ({"tag": "counting", "exclude": [{"class": name, "count": sure + 1}]}, 1),
        ]:  # fmt: skip
            pictures.append(image)
            rows.append(row)
            expected.append(score)
    assert len(seen) > 1 and 0.2 < np.mean(expected) < 0.8
    reward = make(mask2former, clip_folder, counting_threshold=0.6, batch_size=5)
    scores = reward.score(images=torch.stack(pictures), metadata=rows)
    assert scores.dtype == torch.float32
    assert scores.tolist() == expected


def test_objects_of_a_row_carry_the_colours_that_it_asks_for(
    mask2former: Path, clip_folder: Path, small: Tensor, by_hand: ByHand, names: list[str]
) -> None:
    hand = by_hand(mask2former, small[0], 0.3)
    colors = colored(clip_folder, small[0], hand, names)
    label = hand[0][0]
    own = [i for i, each in enumerate(hand) if each[0] == label]
    row = {"tag": "colors", "include": [{"class": names[label], "count": 2, "color": "red"}]}
    [found] = make(mask2former, clip_folder).find(images=small[:1], metadata=[row])
    assert found is not None
    own_found = [each for each in found if each.shape == names[label]]
    assert [each.color for each in own_found[:2]] == [colors[i] for i in own[:2]]
    assert {each.color for each in own_found[2:]} | {"red"} <= {"", "red"}
    assert len(found) == len(hand)
    one = make(mask2former, clip_folder, max_objects=1).find(images=small[:1], metadata=[row])[0]
    assert one is not None and len(one) == len({each[0] for each in hand})


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants(
    mask2former: Path,
    clip_folder: Path,
    small: Tensor,
    variant: str,
    by_hand: ByHand,
    names: list[str],
) -> None:
    hand = by_hand(mask2former, small[0], 0.3)
    label = hand[0][0]
    num = sum(each[0] == label for each in hand)
    missing = next(i for i in range(6) if all(each[0] != i for each in hand))
    # One class with one object too many for Flow-GRPO, one that is not there.
    row = {"tag": "two_object", "include": [{"class": names[label], "count": num - 1},
                                            {"class": names[missing], "count": 2}]}  # fmt: skip
    expected = {"strict": 0, "graded": 1 / 2, "flow_grpo": (1 - 1 / (num - 1)) / 2}[variant]
    reward = make(mask2former, clip_folder, variant=variant)
    assert reward.score(images=small[:1], metadata=[row]).tolist() == pytest.approx([expected])
    assert reward.range == ((-14, 1) if variant == "flow_grpo" else (0, 1))


def test_a_detector_of_boxes_leaves_the_background(
    detr: Path, clip_folder: Path, small: Tensor, names: list[str]
) -> None:
    placement = Placement("cpu", "float32", 8)
    boxes = load_detector(str(detr), placement, reward="GenEval", argument="detector")
    asked = 0
    for image, objects in zip(small, boxes.detect(small, threshold=0.3), strict=True):
        if objects:
            surest = max(objects, key=lambda each: each.score)
            box = tuple(map(round, surest.box))
            one = [(names.index(surest.shape), surest.score, box, None)]
            item = {"class": surest.shape, "count": 1}
            item["color"] = colored(clip_folder, image, one, names)[0]
            row = {"tag": "colors", "include": [item]}
            assert make(detr, clip_folder).score(images=image[None], metadata=[row]) == 1
            asked += 1
    assert asked


def test_it_conforms(
    mask2former: Path, clip_folder: Path, small: Tensor, by_hand: ByHand, names: list[str]
) -> None:
    label = by_hand(mask2former, small[0], 0.3)[0][0]
    item = {"class": names[label], "count": 2}
    row = {"tag": "two_object", "include": [item, {"class": "cat", "count": 3}]}
    prompts = [Prompt("a couch", row)] * 3
    check_reward(make(mask2former, clip_folder, variant="graded"), images=small, prompts=prompts)


def test_a_broken_image_is_invalid(mask2former: Path, clip_folder: Path, small: Tensor) -> None:
    broken = small.clone()
    broken[1, 0, 3, 3] = torch.nan
    rows = [{"tag": "any", "exclude": [{"class": "cat", "count": 17}]}] * 3
    scores = make(mask2former, clip_folder).score(images=broken, metadata=rows)
    assert scores.isnan().tolist() == [False, True, False] and scores[0] == 1


def test_what_does_not_fit_is_refused(
    mask2former: Path, clip_folder: Path, small: Tensor, names: list[str], tmp_path: Path
) -> None:
    reward = make(mask2former, clip_folder)
    with pytest.raises(ValueError, match="expected 3 rows of metadata, got 1"):
        reward.score(images=small, metadata=[{}])
    cat = {"class": "cat", "count": 1}
    for row, message in [
        ({"include": [cat]}, "expected GenEval's 'tag'"),
        ({"tag": "counting"}, "'include' or 'exclude'"),
        ({"tag": "any", "exclude": [{"class": "sofa", "count": 1}]}, "'sofa' .* none of .*couch"),
        ({"tag": "any", "include": [{**cat, "color": "cyan"}]}, "'cyan' .* none of red"),
    ]:
        with pytest.raises(ValueError, match=message):
            reward.score(images=small[:1], metadata=[row])
    for args, message in [
        ({"variant": "loose"}, "strict, graded, flow_grpo, got 'loose'"),
        ({"threshold": 1.5}, r"must be in \[0, 1\), got 1.5"),
        ({"max_objects": 0}, "max_objects must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GenEval(**args)
    row = {"tag": "any", "include": [cat]}
    with pytest.raises(ValueError, match=r"GenEval's detector .* is a CLIPModel; expected a model"):
        make(clip_folder, clip_folder).score(images=small[:1], metadata=[row])
    with pytest.raises(OSError, match=r"GenEval's detector .* cannot be loaded"):
        make(tmp_path / "none", clip_folder).score(images=small[:1], metadata=[row])
    red = {"tag": "any", "include": [{**cat, "class": names[0], "color": "red"}]}
    lost = make(mask2former, tmp_path / "none", threshold=0.0)
    with pytest.raises(OSError, match=r"GenEval's clip .* cannot be loaded"):
        lost.score(images=small, metadata=[red] * 3)
