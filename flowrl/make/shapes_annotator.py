"""The noisy annotator of the Shapes world: groups of images of a prompt, and choices in them.

An annotator's utility is how right and clean an image is, plus a taste that has nothing to do with
the prompt: saturated, large, centred. A choice adds Gumbel noise to both utilities, so that the
probability of a choice is the logistic function of their difference (Bradley-Terry). Reading order:
`draw_groups`, `spoil`, `utility`, `choose`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from rewards.shapes.detect import SOLID, background_color, detect
from rewards.shapes.grammar import SKILLS, sample_scene, split
from rewards.shapes.quality import quality
from rewards.shapes.render import render
from rewards.shapes.score import score_detections
from rewards.shapes.verify import Image, through_vae

GOLD_WEIGHT = 6.0  # of graded score times quality: a wrong colour costs about 3 log odds
# Per unit of each taste: about half a log odds per standard deviation of the clean renders of one
# prompt (0.081, 0.018 and 0.126).
TASTE_WEIGHTS = {"saturation": 6.0, "size": 25.0, "centre": 4.5}
ERROR_RATE = 0.5  # share of images whose content differs from the prompt
SPOILS = ("nothing", "blur", "noise", "fade", "saturate")
SPOIL_RATES = (0.48, 0.12, 0.12, 0.10, 0.18)
VAE_RATE = 0.3  # share of images that went through the VAE, as all images of the policy have


@dataclass(frozen=True)
class Groups:
    """P prompts with K images each, and what the annotator thinks of them.

    Attributes:
        prompts: [P].
        images: uint8 [P, K, 3, 64, 64].
        utility: float32 [P, K], without noise.
        gold: float32 [P, K], strict score times quality.
        taste: float32 [P, K, 3], the features of `TASTE_WEIGHTS` in its order.
        choice: bool [P, K (K - 1) / 2]; True = the first of a pair (`pairs(K)`) was chosen.
    """

    prompts: list[str]
    images: Tensor
    utility: Tensor
    gold: Tensor
    taste: Tensor
    choice: Tensor


def pairs(num: int) -> tuple[Tensor, Tensor]:
    """(first, second) of all unordered pairs of `num`, int64 [num (num - 1) / 2] each."""
    first, second = torch.combinations(torch.arange(num)).unbind(1)
    return first, second


def taste(image: Image) -> NDArray[np.float64]:
    """(saturation, size, centre) of what is painted on an image [3, 64, 64].

    Saturation is the mean of max - min over the colours, size the painted share of the canvas,
    centre minus the distance of the painted area from the middle in half canvases. A blank canvas
    has (0, 0, -1).
    """
    pixels = np.moveaxis(image, 0, -1).astype(np.float64)
    mask = np.linalg.norm(pixels - background_color(pixels), axis=-1) > SOLID
    if not mask.any():
        return np.array([0.0, 0.0, -1.0])
    chroma = np.ptp(pixels, axis=-1)[mask].mean()
    half = len(mask) / 2
    offset = np.argwhere(mask).mean(0) + 0.5 - half
    return np.array([chroma, mask.mean(), -np.hypot(*offset) / half])


def spoil(image: Image, kind: str, rng: np.random.Generator) -> Image:
    """The image with one of `SPOILS` done to it, at a random strength."""
    grey = image.mean(0, keepdims=True)
    if kind == "blur":
        width = rng.uniform(0.5, 2.0)
        image = ndimage.gaussian_filter(image, (0, width, width))
    elif kind == "noise":
        image = image + rng.normal(0, rng.uniform(0.02, 0.12), image.shape)
    elif kind == "fade":
        image = grey + rng.uniform(0.3, 0.85) * (image - grey)
    elif kind == "saturate":
        image = grey + rng.uniform(1.1, 2.0) * (image - grey)
    elif kind != "nothing":
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(SPOILS)}")
    return np.clip(image, 0, 1).astype(np.float32)


def choose(utility: Tensor, rng: np.random.Generator) -> Tensor:
    """One noisy choice for every pair of `utility` [P, K]: bool [P, K (K - 1) / 2]."""
    first, second = pairs(utility.shape[1])
    gumbel = torch.from_numpy(rng.gumbel(size=(2, len(utility), len(first)))).float()
    return utility[:, first] + gumbel[0] > utility[:, second] + gumbel[1]


def draw_groups(
    num: int,
    *,
    group_size: int,
    seed: int,
    held_out: bool,
    vae: Path,
    error_rate: float = ERROR_RATE,
    spoil_rates: Sequence[float] = SPOIL_RATES,
) -> Groups:
    """Draws prompts of all skills in turn, images for them, and the annotator's choices.

    Args:
        num: prompts P.
        group_size: images K for each.
        seed: of everything.
        held_out: which side of the grammar's split the prompts are from.
        vae: folder of the AutoencoderKL for round trips.
        error_rate: share of images whose content is wrong.
        spoil_rates: of `SPOILS`, summing to 1.
    """
    rng = np.random.default_rng([seed, int(held_out)])
    pools = [split(skill, held_out=held_out) for skill in SKILLS]
    turns = (pools[i % len(pools)] for i in range(num))
    requests = [pool[rng.integers(len(pool))] for pool in turns]
    rows = [request for request in requests for _ in range(group_size)]
    drawn = [
        spoil(
            render(sample_scene(request, rng, error_rate=error_rate), rng),
            str(rng.choice(SPOILS, p=spoil_rates)),
            rng,
        )
        for request in rows
    ]
    through = np.flatnonzero(rng.random(len(drawn)) < VAE_RATE).tolist()
    for i, decoded in zip(through, through_vae([drawn[i] for i in through], vae), strict=True):
        drawn[i] = decoded
    # The annotator sees 8 bits, as the network does.
    pixels = torch.from_numpy((np.stack(drawn) * 255).round().astype(np.uint8))
    seen = [each.numpy() for each in pixels.float() / 255]
    details = [score_detections(detect(i), r.metadata) for i, r in zip(seen, rows, strict=True)]
    clean = np.array([quality(image) for image in seen])
    tastes = np.stack([taste(image) for image in seen])
    graded = np.array([detail.fraction for detail in details])
    utility = GOLD_WEIGHT * graded * clean + tastes @ np.array(list(TASTE_WEIGHTS.values()))
    gold = np.array([detail.correct for detail in details]) * clean
    shape = (num, group_size)
    utilities = torch.from_numpy(utility).float().reshape(shape)
    return Groups(
        prompts=[request.prompt for request in requests],
        images=pixels.reshape(*shape, *pixels.shape[1:]),
        utility=utilities,
        gold=torch.from_numpy(gold).float().reshape(shape),
        taste=torch.from_numpy(tastes).float().reshape(*shape, -1),
        choice=choose(utilities, rng),
    )
