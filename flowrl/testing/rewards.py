"""Does my reward do what flowrl relies on? The rules are those of `check_reward`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl.testing.words import require, require_same
from flowrl.train.attempts import Patience
from flowrl.train.border import check_output
from flowrl.train.scoring import RewardSet
from flowrl.types import Prompt, PromptBatch


def check_reward(
    reward: Any,
    *,
    images: Tensor | None = None,
    prompts: Sequence[Prompt] | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Raises unless `reward` is a Reward.

    It declares inputs, scope and range that exist; `score`, called with the declared inputs by
    keyword, returns a float per sample within the range, or a mapping of such tensors with "score"
    among them. Equal inputs give equal scores; a shuffled batch gives shuffled scores; samples of
    one prompt keep scores of their own; with scope "sample" a score does not depend on the other
    samples. A sample whose image is not a number is scored NaN, and the others as before, or, with
    scope "group", by a number still. One that declares `differentiable` has a gradient in the
    tensors that it reads: finite, not 0 everywhere, and of the scores, so that a step along it
    raises their sum.

    Args:
        reward: the object.
        images: float32 [N, 3, H, W] in [0, 1] on the CPU, N >= 3, on which the scores should
            differ; None = noise of 64 x 64 pixels of growing brightness. A reward that declares
            videos is given films of them, [N, 2, 3, H, W], one that declares texts their numbers as
            words, and one that declares latents the images at an eighth of their size.
        prompts: N of them, with the metadata that the reward reads; None = GenEval's rows, or one
            row N times with scope "group", whose calls hold the samples of one prompt.
        tolerance: absolute, for what may differ by rounding.
    """
    members = ("inputs", "scope", "range", "score")
    missing = [name for name in members if not hasattr(reward, name)]
    whole = f"a class with {', '.join(members)}"
    require(not missing, type(reward).__name__, whole, f"none of {', '.join(missing)}")
    if images is None:
        brightness = torch.linspace(0.25, 1, 4)[:, None, None, None]
        noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        images = noise * brightness
    if prompts is None:
        colors = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
        num = 1 if reward.scope == "group" else len(colors)
        prompts = [_geneval(colors[i % num]) for i in range(len(images))]
    require(len(images) == len(prompts) >= 3, "images and prompts", "as many, 3 or more",
             f"{len(images)} and {len(prompts)}")  # fmt: skip
    name = type(reward).__name__
    rewards = RewardSet(
        [(name, reward, 1.0)], patience=Patience(retries=0), provides=tuple(_samples(images, []))
    )
    everyone = list(range(len(images)))
    rewards.probe(prompts[0], **_samples(images, [0, 1]))

    def score(order: list[int], asked: Sequence[Prompt] = prompts) -> Tensor:
        batch = PromptBatch.one_group([asked[i] for i in order])
        found = rewards.score(batch, **_samples(images, order))
        reason = found.failures[name].reason if name in found.failures else ""
        require(not reason, f"a call with {len(order)} samples", "answered", reason)
        return found.rewards[name]

    scores, backwards = score(everyone), everyone[::-1]
    require_same(scores, score(everyone), 0.0, "the scores", "for the same batch again")
    turned = score(backwards)
    require_same(scores[backwards], turned, tolerance, "the scores", "with the batch backwards")
    if reward.scope == "sample":
        alone = torch.cat([score([i]) for i in everyone])
        require_same(scores, alone, tolerance, 'with scope "sample" the scores', "one by one")
        same = [prompts[0]] * len(prompts)
        alone = torch.cat([score([i], same) for i in everyone])
        what = "the scores of samples of one prompt"
        require_same(score(everyone, same), alone, tolerance, what, "one by one")
    if "images" in reward.inputs:
        _check_broken_image(reward, images, prompts, scores, tolerance)
    if getattr(reward, "differentiable", False):
        _check_gradient(reward, _samples(images, everyone), prompts)


def _check_broken_image(
    reward: Any, images: Tensor, prompts: Sequence[Prompt], scores: Tensor, tolerance: float
) -> None:
    broken = images.clone()
    broken[1] = torch.nan
    available: dict[str, Any] = {
        **_samples(images, list(range(len(images)))),
        "images": broken,
        "prompts": [prompt.text for prompt in prompts],
        "metadata": [prompt.metadata for prompt in prompts],
    }
    output = reward.score(**{name: available[name] for name in reward.inputs})
    values = check_output(type(reward).__name__, reward, output, len(images))["score"]
    wanted = "NaN (a sample that cannot be scored is invalid, never a number)"
    require(not values[1].isfinite(), "the score of an image of NaN", wanted, f"{values[1]:g}")
    others = torch.arange(len(images)) != 1
    if reward.scope == "sample":
        what, beside = "the scores", "beside an image of NaN"
        require_same(scores[others], values[others], tolerance, what, beside)
        return
    lost = (scores.isfinite() & ~values.isfinite())[others]
    what, arrived = "the scores beside an image of NaN", f"NaN for {int(lost.sum())} more"
    require(not lost.any(), f'with scope "group" {what}', "numbers still", arrived)


def _check_gradient(reward: Any, samples: dict[str, Any], prompts: Sequence[Prompt]) -> None:
    read = [name for name in ("images", "videos", "latents") if name in reward.inputs]
    inputs = ", ".join(reward.inputs)
    require(bool(read), "the inputs of a differentiable reward", "tensors among them", inputs)
    at = {name: samples[name].clone().requires_grad_() for name in read}
    what = "the gradient of a differentiable reward"

    def total(tensors: dict[str, Tensor]) -> Tensor:
        available = {
            **samples, **tensors, "prompts": [prompt.text for prompt in prompts],
            "metadata": [prompt.metadata for prompt in prompts],
        }  # fmt: skip
        output = reward.score(**{name: available[name] for name in reward.inputs})
        scores = output["score"] if isinstance(output, Mapping) else output
        summed: Tensor = scores[scores.isfinite()].sum()
        return summed

    summed = total(at)
    require(summed.requires_grad, "its score", "part of torch's graph", "a detached tensor")
    found = torch.autograd.grad(summed, list(at.values()), allow_unused=True)
    gradients = {name: each for name, each in zip(at, found, strict=True) if each is not None}
    require(bool(gradients), what, f"one in {' or '.join(read)}", "none")
    largest = max(float(each.abs().max()) for each in gradients.values())  # NaN stays NaN
    is_finite = all(bool(each.isfinite().all()) for each in gradients.values())
    require(is_finite, what, "finite", "NaN or infinity")
    require(largest > 0, what, "not 0 everywhere", "0 everywhere")
    before, after = float(summed.detach()), []
    for step in (1e-2, 1e-3):  # the shorter one where the score is strongly curved
        moved = {
            name: at[name].detach() + step / largest * each for name, each in gradients.items()
        }
        pixels = {name: each.clamp(0, 1) for name, each in moved.items() if name != "latents"}
        with torch.no_grad():
            after.append(float(total({**at, **moved, **pixels})))
    require(
        max(after) > before, what, "that of its score, so that a step along it raises the sum of "
        f"the scores, {before:g}", " and ".join(f"{each:g}" for each in after),
    )  # fmt: skip


def _samples(images: Tensor, order: list[int]) -> dict[str, Any]:
    """What a reward may read of these images, in this order; see `check_reward`."""
    chosen = images[order]
    return {
        "images": chosen,
        "videos": torch.stack([chosen, chosen.flip(-1)], dim=1),
        "texts": [f"number {i}" for i in order],
        "latents": chosen[..., ::8, ::8],
    }


def _geneval(color: str) -> Prompt:
    text = f"a {color} circle"
    wanted = {"class": "circle", "count": 1, "color": color}
    return Prompt(text, {"tag": "colors", "include": [wanted], "prompt": text})
