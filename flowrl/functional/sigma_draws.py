"""Where on the path from data to noise a forward-process loss looks: distributions of sigma.

Each is a quantile function `(uniform, schedule) -> sigma`: numbers in [0, 1) become noise levels.
So `stratified` numbers become a stratified sample of any of them, and the caller owns the
randomness. `uniform` has any shape; `schedule` is the sampler's sigmas [T+1], which only
`schedule_steps` reads. Results are float32, of the shape of `uniform`.
"""

import torch
from torch import Tensor

from flowrl.functional.flow import shift_sigmas


def stratified(uniform: Tensor) -> Tensor:
    """A number in each of K equal parts of [0, 1), (k + uniform[..., k]) / K; float64 [..., K]."""
    count = uniform.shape[-1]
    return (torch.arange(count, device=uniform.device) + uniform.double()) / count


def uniform_sigma(
    uniform: Tensor, schedule: Tensor, *, low: float = 0.0, high: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Uniform in [low, high), then shifted as by `flow.shift_sigmas`.

    AWM's "uniform" is low=0.2, high=1.

    Raises:
        ValueError: not 0 <= low < high <= 1, or shift is not positive.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"low and high must satisfy 0 <= low < high <= 1, but are {low}, {high}.")
    return shift_sigmas(low + (high - low) * uniform.double(), shift).float()


def logit_normal_sigma(
    uniform: Tensor,
    schedule: Tensor,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    floor: float = 0.0,
) -> Tensor:
    """Sigmoid of N(mean, std^2), shifted, at least `floor`.

    Paper: SD3, arXiv:2403.03206, eq. 19; Flow-GRPO's DPO trains with it. AWM uses floor=0.01.

    Raises:
        ValueError: std or shift is not positive.
    """
    if not std > 0:
        raise ValueError(f"std must be positive, but is {std}.")
    edge = 1e-7  # keeps the quantile finite
    normal = torch.special.ndtri(uniform.double().clamp(edge, 1 - edge))
    return shift_sigmas(torch.sigmoid(mean + std * normal), shift).clamp(min=floor).float()


def schedule_steps(
    uniform: Tensor, schedule: Tensor, *, first: int = 0, fraction: float = 1.0
) -> Tensor:
    """One of the sampler's own sigmas, from step `first` to before int(T * fraction).

    Paper: DiffusionNFT, arXiv:2509.16117: all steps, fraction .99 (with stratified numbers, as many
    as there are steps, each exactly once); AWM, arXiv:2509.25050, "discrete_wo_init": first=1,
    fraction=.9, stratified.

    Args:
        uniform: in [0, 1).
        schedule: [T+1], descending, last 0, which is never drawn.
        first: first step that may be drawn.
        fraction: in (0, 1].

    Raises:
        ValueError: no step lies in that range.
    """
    steps = schedule[first : min(int((len(schedule) - 1) * fraction), len(schedule) - 1)]
    if first < 0 or len(steps) == 0:
        raise ValueError(
            f"first={first} and fraction={fraction} leave no step of {len(schedule) - 1}."
        )
    # A stratum's lower edge k / K times K may round to just below k.
    index = (uniform.double() * len(steps) + 1e-9).long().clamp(max=len(steps) - 1)
    return steps.to(uniform.device)[index].float()
