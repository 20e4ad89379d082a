"""What passes between flowrl and a reward, checked: its declaration, what goes in, what comes out.

A reward that breaks its promise (count, dtype, shape, device, range) is an error at once, for a
score that belongs to another sample cannot be told from a right one. NaN and infinity are answers:
they say that a sample could not be scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl.errors import RewardError, ShapeError, closest
from flowrl.protocols import Reward

INPUTS = ("images", "videos", "texts", "latents", "prompts", "metadata")
GIVEN = ("prompts", "metadata")  # whatever is generated
SCOPES = ("sample", "group")
SCORE = "score"  # the entry of a reward's mapping that is trained on; the others are its components
# What is logged of every reward beside its components, under the same names.
_LOGGED = ("mean", "std", "invalid_frac", "failed_calls")


def check_declaration(name: str, reward: Reward, provides: Sequence[str]) -> None:
    """Raises RewardError unless the reward declares what exists, and reads what is generated.

    Args:
        name: the reward's, for the message.
        reward: the reward.
        provides: what the run's model makes, of `INPUTS`.
    """
    if isinstance(reward.inputs, str) or not reward.inputs:
        raise RewardError(
            f"reward '{name}' must declare inputs as a tuple of names such as ('images',), "
            f"got {reward.inputs!r}"
        )
    for given in reward.inputs:
        if given not in INPUTS:
            raise RewardError(
                f"reward '{name}' declares the input '{given}', which nothing here provides; "
                f"{closest(given, INPUTS)}"
            )
        if given not in (*provides, *GIVEN):
            raise RewardError(
                f"reward '{name}' reads {given}, and this model makes {' and '.join(provides)}; "
                "use a reward for these, or another model"
            )
    if reward.scope not in SCOPES:
        raise RewardError(
            f"reward '{name}' declares the scope {reward.scope!r}; {closest(reward.scope, SCOPES)}"
        )
    low, high = reward.range
    if not low < high:
        raise RewardError(
            f"reward '{name}' declares the range ({low}, {high}), which is empty; give (lowest, "
            "highest), with infinities where there is no bound"
        )


def check_samples(samples: Mapping[str, Any], num: int) -> None:
    """Raises ShapeError unless these are `num` samples, as a reward may rely on.

    Images float32 [num, 3, H, W] and videos float32 [num, F, 3, H, W] in [0, 1], latents float
    [num, ...], all on the CPU; texts num strings.
    """
    for name, values in samples.items():
        if name == "texts":
            wrong = [value for value in values if not isinstance(value, str)]
            if wrong or len(values) != num:
                raise ShapeError(f"texts must be {num} strings, got {len(values)}, of which "
                                 f"{len(wrong)} are none")  # fmt: skip
        elif name == "latents":
            if len(values) != num or not values.is_floating_point():
                raise ShapeError(
                    f"latents must be float [{num}, ...], got {values.dtype} {tuple(values.shape)}"
                )
        else:
            _check_pixels(name, values, num)


def _check_pixels(name: str, values: Tensor, num: int) -> None:
    shape = f"[{num}, 3, H, W]" if name == "images" else f"[{num}, F, 3, H, W]"
    expected = f"{name} must be float32 {shape} on the CPU with values in [0, 1]"
    is_shaped = values.ndim == (4 if name == "images" else 5) and len(values) == num
    if not is_shaped or values.shape[-3] != 3:
        raise ShapeError(f"{expected}, got shape {tuple(values.shape)}")
    if values.dtype != torch.float32 or values.device.type != "cpu":
        raise ShapeError(f"{expected}, got {values.dtype} on {values.device}")
    if values.numel() == 0:
        return
    low, high = values.aminmax()
    if not (low >= 0 and high <= 1):  # so that NaN is refused too
        raise ShapeError(
            f"{expected}, got [{low:.6g}, {high:.6g}]; the pipeline's decode must clamp, and NaN "
            "means that the model has diverged"
        )


def check_output(name: str, reward: Reward, output: object, num: int) -> dict[str, Tensor]:
    """What a call returned as "score" and, if there are, components: float32 [num] each.

    Infinity becomes NaN. The declared range binds the score.

    Raises:
        RewardError: it is not what a reward returns.
    """
    parts = output if isinstance(output, Mapping) else {SCORE: output}
    if SCORE not in parts:
        raise RewardError(
            f"reward '{name}' returned a mapping of {', '.join(map(repr, parts)) or 'nothing'}; "
            f"what is trained on must be called '{SCORE}', the others are its components"
        )
    for key in parts:
        is_name = isinstance(key, str) and key.isprintable() and key != "" and "/" not in key
        if not is_name or key in _LOGGED:
            raise RewardError(
                f"reward '{name}' calls a component {key!r}, which cannot be logged as "
                f"reward/{name}/<component>; give it another name, without '/', that is not one of "
                f"{', '.join(_LOGGED)}"
            )
    values = {key: _finite(name, key, value, num) for key, value in parts.items()}
    low, high = reward.range
    below, above = (1e-5 * max(1.0, abs(bound)) for bound in (low, high))  # float32's rounding
    score = values[SCORE]
    wrong = (score < low - below) | (score > high + above)  # False for NaN
    if wrong.any():
        raise RewardError(
            f"reward '{name}' declares the range [{low:g}, {high:g}] but returned "
            f"{score[wrong][0].item():g}; correct its range or its score, or return NaN for a "
            "sample that cannot be scored"
        )
    return values


def _finite(name: str, key: str, output: object, num: int) -> Tensor:
    """One tensor that a reward returned, as float32 [num], NaN where not finite."""
    what = "" if key == SCORE else f" as '{key}'"
    expected = f"reward '{name}' must return a float tensor [{num}]{what}, one value per sample"
    if not isinstance(output, Tensor):
        raise RewardError(f"{expected}, got {type(output).__name__}; wrap it in torch.tensor(...)")
    if output.shape != (num,):
        hint = "use .flatten()" if output.numel() == num else "do not reduce over the batch"
        raise RewardError(f"{expected}, got shape {tuple(output.shape)}; {hint}")
    if not output.is_floating_point():
        raise RewardError(f"{expected}, got {output.dtype}; use .float()")
    if output.device.type != "cpu":
        raise RewardError(
            f"{expected} on the device of its images, cpu, got {output.device}; use .to('cpu')"
        )
    values = output.detach().float()
    return torch.where(values.isfinite(), values, torch.nan)


def show_inputs(inputs: Mapping[str, Any]) -> str:
    """Names and shapes, for a message."""
    return ", ".join(
        f"{key} {tuple(value.shape) if isinstance(value, Tensor) else f'[{len(value)}]'}"
        for key, value in inputs.items()
    )
