"""Forward-process losses: how well a velocity fits clean samples that are noised afresh.

No sampler, no transition, no density: a sample x0, a fresh noise x1 and a sigma give the point x_t
= (1 - sigma) * x0 + sigma * x1 and the target x1 - x0, and every loss is made of the squared error
between velocity and target. Reading order: `Matching`, `matching_error`, then DiffusionNFT (`nft`,
`nft_of_published_code`) and AWM (`matching_log_prob` and its weightings). All values are per
decision [E] and divided by the number of latent dims, as log_prob is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowrl.functional.flow import interpolate, predict_x0, velocity_target
from flowrl.functional.shapes import at_least_float32, mean_over_dims, require_same_shape

Weighting = Callable[[Tensor, Tensor], Tensor]
"""(error [E], sigma [E]) -> weighted error [E]."""


@dataclass(frozen=True)
class Matching:
    """How a parameter set sees samples at fresh noise: E points of the path and the velocity there.

    Attributes:
        velocity: [E, ...], with gradient unless computed under no_grad.
        x0: [E, ...], clean samples.
        x1: [E, ...], fresh noise.
        sigma: [E].
        unit: int64 [E]; decisions that share one (sigma, x1) and are judged together share one.
    """

    velocity: Tensor
    x0: Tensor
    x1: Tensor
    sigma: Tensor
    unit: Tensor

    @cached_property
    def x_t(self) -> Tensor:
        """[E, ...], where the velocity was asked for."""
        return interpolate(self.x0, self.x1, self.sigma)

    @cached_property
    def target(self) -> Tensor:
        """[E, ...], the velocity that leads from x1 to x0."""
        return velocity_target(self.x0, self.x1)

    @cached_property
    def error(self) -> Tensor:
        """[E], `matching_error` of the velocity."""
        return matching_error(self.velocity, self.target)

    @property
    def scalars(self) -> dict[str, Tensor]:
        """Name -> values per decision [E]."""
        return {"matching_error": self.error}


def matching_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Squared error [E], mean over dims: flow matching's loss of one sample.

    Paper: flow matching, arXiv:2210.02747. With the reference's velocity as target (detached) it
    is the penalty that all forward-process methods call KL.

    Args:
        velocity: [E, ...], carries the gradient.
        target: as velocity; detached.

    Returns:
        float32 [E], float64 if an input is.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(velocity=velocity, target=target)
    return mean_over_dims((at_least_float32(velocity) - target.detach()) ** 2)


def optimality(advantage: Tensor, limit: float) -> Tensor:
    """Probability that a sample is optimal: clip(advantage, +-limit) / (2 * limit) + 1/2; detached.

    Paper: DiffusionNFT, arXiv:2509.16117; limit 5 in its code.

    Raises:
        ValueError: limit is not positive.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, but is {limit}.")
    return advantage.detach().clamp(-limit, limit) / (2 * limit) + 0.5


def nft(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, optimal: Tensor, mix: float
) -> Tensor:
    """DiffusionNFT's loss [E]: optimal * |v+ - target|^2 + (1 - optimal) * |v- - target|^2.

    Paper: DiffusionNFT, arXiv:2509.16117, the policy loss of its algorithm, where v+ is
    mix * v + (1 - mix) * v_old and v- is (1 + mix) * v_old - mix * v, the mirror of v+ at v_old. A
    good sample attracts v, a bad one repels it through its mirror. For one sample the minimum lies
    at v - v_old = (2 * optimal - 1) / mix * (target - v_old). Differs: mean over dims, not sum.

    Args:
        velocity: [E, ...], carries the gradient.
        old_velocity: as velocity, of the set that drew the samples; detached.
        target: as velocity; detached.
        optimal: [E], in [0, 1], from `optimality`.
        mix: positive; the paper's beta, 1 or 0.1.

    Raises:
        ValueError: shapes that do not fit or mix that is not positive.
    """
    good, bad = nft_velocities(velocity, old_velocity, mix)
    return _by_optimality(matching_error(good, target), matching_error(bad, target), optimal)


def nft_of_published_code(
    velocity: Tensor,
    old_velocity: Tensor,
    x_t: Tensor,
    x0: Tensor,
    sigma: Tensor,
    optimal: Tensor,
    mix: float,
) -> Tensor:
    """What DiffusionNFT's code minimises [E], up to its constant factor of 5.

    Differs from `nft` in three points: the errors are those of the clean sample x_t - sigma * v,
    which is sigma^2 times the velocity's; each is divided by its own mean absolute deviation
    (detached, at least 1e-5), which makes it nearly an L1 loss and takes one sigma back; the sum
    is divided by mix, so that mix leaves the first gradient alone (NVlabs/DiffusionNFT issue 13).

    Args:
        velocity: [E, ...], carries the gradient.
        old_velocity: as velocity; detached.
        x_t: as velocity, the noised sample.
        x0: as velocity, the clean sample.
        sigma: [E].
        optimal: [E], in [0, 1], from `optimality`.
        mix: positive.

    Raises:
        ValueError: shapes that do not fit or mix that is not positive.
    """
    good, bad = (
        _self_normalized_error(predict_x0(at_least_float32(x_t), each, sigma), x0)
        for each in nft_velocities(velocity, old_velocity, mix)
    )
    return _by_optimality(good, bad, optimal) / mix


def nft_velocities(velocity: Tensor, old_velocity: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """(v+, v-) of DiffusionNFT [E, ...] each: v_old plus and minus mix * (v - v_old).

    Arguments and errors as `nft`.
    """
    if not mix > 0:
        raise ValueError(f"mix must be positive, but is {mix}.")
    require_same_shape(velocity=velocity, old_velocity=old_velocity)
    old_velocity = at_least_float32(old_velocity.detach())
    step = mix * (at_least_float32(velocity) - old_velocity)
    return old_velocity + step, old_velocity - step


def matching_log_prob(error: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """AWM's stand-in for the log-likelihood of a sample [E]: minus its weighted error.

    Paper: AWM, arXiv:2509.25050: an estimate of the ELBO from one (sigma, noise); new and old
    policy must be asked at the same one.

    Args:
        error: [E], from `matching_error`.
        sigma: [E].
        weighting: one of the functions below.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(error=error, sigma=sigma)
    return -weighting(error, sigma.to(error))


def plain(error: Tensor, sigma: Tensor) -> Tensor:
    """Error: AWM's "Uniform"."""
    return error


def times_sigma(error: Tensor, sigma: Tensor) -> Tensor:
    """Error * sigma: AWM's "t"."""
    return sigma * error


def times_sigma_squared(error: Tensor, sigma: Tensor) -> Tensor:
    """Error * sigma^2, which is the error of x0: AWM's "t**2"."""
    return sigma**2 * error


def huber(error: Tensor, sigma: Tensor) -> Tensor:
    """(sqrt(error + 1e-10) - 1e-5) * sigma, the root of the error, smooth at 0: AWM's "huber"."""
    return sigma * (torch.sqrt(error + 1e-10) - 1e-5)


def general_huber(error: Tensor, sigma: Tensor, *, power: float = 0.25) -> Tensor:
    """((error + 1e-10)^power - 1e-10^power) / power * sigma: AWM's "ghuber".

    Raises:
        ValueError: power is not positive.
    """
    if not power > 0:
        raise ValueError(f"power must be positive, but is {power}.")
    return sigma * ((error + 1e-10) ** power - float(1e-10**power)) / power


def _by_optimality(good: Tensor, bad: Tensor, optimal: Tensor) -> Tensor:
    require_same_shape(error=good, optimal=optimal)
    optimal = optimal.detach()
    return optimal * good + (1 - optimal) * bad


def _self_normalized_error(predicted: Tensor, x0: Tensor) -> Tensor:
    """Squared error [E] over the detached mean absolute error, mean over dims."""
    deviation = mean_over_dims((predicted.detach() - x0).abs()).clamp(min=1e-5)
    return matching_error(predicted, x0) / deviation
