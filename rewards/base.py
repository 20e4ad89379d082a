"""What a reward is, and helpers for writing one.

A reward declares what it reads (`inputs`), whether it scores samples one by one (`scope`), the
range of its scores, and turns a batch into one float each. NaN says that a sample could not be
scored: it is then left out, never trained as 0. Any class with these members is a reward; nothing
inherits from anything.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import Tensor

Metadata = Mapping[str, Any]
INPUTS = ("images", "videos", "texts", "latents", "prompts", "metadata")


class Reward(Protocol):
    """Scores a batch.

    Attributes:
        inputs: which of `INPUTS` it reads; it is given no others.
        scope: "sample" if a score depends on its own sample only.
        range: (low, high) of the scores, infinite where unbounded.
        higher_is_better: True; a cost is negated by its reward.

    A class may also say `differentiable = True`: a score has a gradient with respect to the images,
    videos or latents that it reads. What rounds to 8 bit, or passes through PIL or a wire, has
    none. Training asks for scores under `torch.no_grad`, and uses no such gradient; whoever calls
    `score` with tensors that require one gets it.
    """

    inputs: tuple[str, ...]
    scope: str
    range: tuple[float, float]
    higher_is_better: bool

    def score(self, **inputs: Any) -> Tensor | Mapping[str, Tensor]:
        """Scores, float32 [B]; NaN: not to be scored.

        Or a mapping of such tensors: "score", and components of it by other names, which are logged
        beside it.

        Args:
            inputs: those declared, by name: images float [B, 3, H, W] and videos float
                [B, F, 3, H, W] in [0, 1], latents float [B, ...], texts and prompts as B strings,
                metadata as B mappings.
        """
        ...


def score_of(output: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The score [B] alone, of what a reward returned."""
    return output["score"] if isinstance(output, Mapping) else output


def is_differentiable(reward: object) -> bool:
    """Whether a reward, or its class, declares `differentiable`; see `Reward`."""
    return bool(getattr(reward, "differentiable", False))


class FunctionReward:
    """A plain function as a reward; its parameters named like inputs are the inputs it declares.

    The function returns B numbers. Its other parameters are given once, when the reward is made.
    """

    scope = "sample"
    range = (-float("inf"), float("inf"))
    higher_is_better = True

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any]) -> None:
        """Wraps `function` with `args` for the parameters that are not inputs.

        Raises:
            ValueError: if the function reads no input.
        """
        parameters = inspect.signature(function).parameters
        self.inputs = tuple(name for name in INPUTS if name in parameters)
        self._function, self._args = function, dict(args)
        self._name = getattr(function, "__name__", "the reward function")
        if not self.inputs:
            raise ValueError(
                f"{self._name}({', '.join(parameters)}) reads nothing; "
                f"expected at least one parameter named {', '.join(INPUTS)}"
            )

    def score(self, **given: Any) -> Tensor | Mapping[str, Tensor]:
        """The function's scores, float32 [B], of `given`: at least the inputs it declares.

        Raises:
            ValueError: if the function does not return one number per sample, or several by name.
        """
        chosen = {name: given[name] for name in self.inputs}
        output = self._function(**chosen, **self._args)
        expected = len(chosen[self.inputs[0]])
        if isinstance(output, Mapping):
            return {name: self._checked(values, expected) for name, values in output.items()}
        return self._checked(output, expected)

    def _checked(self, output: Any, expected: int) -> Tensor:
        scores = torch.as_tensor(output, dtype=torch.float32)
        if scores.shape != (expected,):
            raise ValueError(
                f"{self._name} returned shape {list(scores.shape)}; expected [{expected}], "
                "one number per sample"
            )
        return scores


def check_images(images: Tensor) -> None:
    """Raises ValueError unless `images` is a float tensor [B, 3, H, W]."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"expected float images [B, 3, H, W] in [0, 1], got {images.dtype} {list(images.shape)}"
        )


def check_counts(columns: Mapping[str, Sized]) -> None:
    """Raises ValueError unless all columns are equally long, e.g. {"images": .., "prompts": ..}."""
    counts = [f"{len(column)} {name}" for name, column in columns.items()]
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError(f"got {', '.join(counts[:-1])} and {counts[-1]}; give one each")


def check_one_prompt(prompts: Sequence[str], what: str) -> None:
    """Raises ValueError if `prompts` differ, for a reward, called `what`, that compares a group."""
    if len(distinct := list(dict.fromkeys(prompts))) > 1:
        raise ValueError(
            f"{what} compares samples of one prompt, got {len(distinct)}: {distinct[0]!r}, "
            f"{distinct[1]!r}, ...; call it once per group"
        )


def finite_images(images: Tensor) -> Tensor:
    """Which images can be looked at, bool [B]: those without NaN or infinity."""
    return images.isfinite().flatten(1).all(1)
