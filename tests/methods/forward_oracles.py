"""DiffusionNFT, AWM, RWR, DGPO and DPO for flows, naively: a sample and a draw at a time.

Plain torch, written from the papers and their published code; nothing of flowrl is imported.
`velocity(x, sigma, sample)` is a network at one point; `draws[n][k]` is the (sigma, noise) of the
k-th draw of sample n. Every loss is a mean over all samples and draws, or over all pairs and draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float, int], Tensor]
Draws = Sequence[Sequence[tuple[float, Tensor]]]


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean over dims of the squared difference."""
    return ((a - b) ** 2).sum() / a.numel()


def look(velocity: Velocity, x0: Tensor, sigma: float, noise: Tensor, sample: int) -> Tensor:
    """The velocity at the noised sample."""
    return velocity(sigma * noise + (1 - sigma) * x0, sigma, sample)


def nft_loss(
    velocity: Velocity,
    old: Velocity,
    reference: Velocity,
    x0: Sequence[Tensor],
    draws: Draws,
    advantages: Sequence[float],
    *,
    form: str,
    beta: float,
    kl_coef: float,
) -> Tensor:
    """The paper's loss, or its code's in the space of x0 with adaptive weights, times 5 / beta."""
    losses = []
    for n, clean in enumerate(x0):
        r = max(-5.0, min(5.0, advantages[n])) / 10 + 0.5
        for sigma, noise in draws[n]:
            v = look(velocity, clean, sigma, noise, n)
            v_old = look(old, clean, sigma, noise, n).detach()
            plus, minus = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
            if form == "paper":
                target = noise - clean
                loss = r * mse(plus, target) + (1 - r) * mse(minus, target)
            else:
                x_t, parts = sigma * noise + (1 - sigma) * clean, []
                for each in (plus, minus):
                    guess = x_t - sigma * each
                    weight = max(float((guess - clean).detach().abs().mean()), 1e-5)
                    parts.append(mse(guess, clean) / weight)
                loss = 5 * (r * parts[0] / beta + (1 - r) * parts[1] / beta)
            v_ref = look(reference, clean, sigma, noise, n).detach()
            losses.append(loss + kl_coef * mse(v, v_ref))
    return torch.stack(losses).mean()


def awm_log_prob(error: Tensor, sigma: float, weighting: str) -> Tensor:
    """Minus the weighted error, as in the authors' code."""
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -error * sigma
    if weighting == "t_squared":
        return -error * sigma**2
    power = {"huber": 0.5, "ghuber": 0.25}[weighting]
    scale = 1.0 if weighting == "huber" else power
    return -((error + 1e-10) ** power - (1e-10) ** power) * sigma / scale


def awm_loss(
    velocity: Velocity,
    old: Velocity,
    reference: Velocity,
    x0: Sequence[Tensor],
    draws: Draws,
    advantages: Sequence[float],
    *,
    weighting: str,
    clip: float,
    off_policy: bool,
    kl_coef: float,
    old_kl_coef: float,
) -> Tensor:
    """PPO on the surrogate likelihood, plus the squared distances to the reference and to old."""
    losses = []
    for n, clean in enumerate(x0):
        for sigma, noise in draws[n]:
            v, v_old, v_ref = (
                look(each, clean, sigma, noise, n) for each in (velocity, old, reference)
            )
            v_old, v_ref = v_old.detach(), v_ref.detach()
            log_prob = awm_log_prob(mse(v, noise - clean), sigma, weighting)
            before = awm_log_prob(mse(v_old, noise - clean), sigma, weighting)
            ratio = torch.exp(log_prob - (before if off_policy else log_prob.detach()))
            a = advantages[n]
            loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
            losses.append(loss + kl_coef * mse(v, v_ref) + old_kl_coef * mse(v, v_old))
    return torch.stack(losses).mean()


def rwr_loss(
    velocity: Velocity,
    reference: Velocity,
    x0: Sequence[Tensor],
    draws: Draws,
    weights: Sequence[float],
    *,
    kl_coef: float,
) -> Tensor:
    """Flow matching, weighted."""
    losses = []
    for n, clean in enumerate(x0):
        for sigma, noise in draws[n]:
            v = look(velocity, clean, sigma, noise, n)
            v_ref = look(reference, clean, sigma, noise, n).detach()
            losses.append(weights[n] * mse(v, noise - clean) + kl_coef * mse(v, v_ref))
    return torch.stack(losses).mean()


def dgpo_loss(
    velocity: Velocity,
    anchor: Velocity,
    reference: Velocity,
    x0: Sequence[Tensor],
    draws: Draws,
    advantages: Sequence[float],
    groups: Sequence[Sequence[int]],
    *,
    beta: float,
    kl_coef: float,
) -> Tensor:
    """A group and a draw at a time; the draws of a group's members are the same."""
    losses = []
    for members in groups:
        for k in range(len(draws[members[0]])):
            errors, kls, inside = [], [], 0.0
            for n in members:
                sigma, noise = draws[n][k]
                v = look(velocity, x0[n], sigma, noise, n)
                error = mse(v, noise - x0[n])
                anchored = mse(look(anchor, x0[n], sigma, noise, n), noise - x0[n])
                inside += beta * advantages[n] * float((error - anchored).detach()) / len(members)
                kls.append(mse(v, look(reference, x0[n], sigma, noise, n).detach()))
                errors.append(error)
            weight = 1 / (1 + math.exp(-inside))
            for n, error, kl in zip(members, errors, kls, strict=True):
                losses.append(weight * advantages[n] * error + kl_coef * kl)
    return torch.stack(losses).mean()


def dpo_loss(
    velocity: Velocity,
    reference: Velocity,
    x0: Sequence[Tensor],
    draws: Draws,
    pairs: Sequence[tuple[int, int]],
    *,
    beta: float,
) -> Tensor:
    """Flow-GRPO's DPO: a (winner, loser) pair and a draw at a time; the draws are the same."""
    losses = []
    for pair in pairs:
        for k in range(len(draws[pair[0]])):
            gains = []
            for n in pair:
                sigma, noise = draws[n][k]
                v, v_ref = (look(each, x0[n], sigma, noise, n) for each in (velocity, reference))
                gains.append(mse(v, noise - x0[n]) - mse(v_ref, noise - x0[n]).detach())
            inside = -beta / 2 * (gains[0] - gains[1])
            losses.append(-torch.log(torch.sigmoid(inside)))
    return torch.stack(losses).mean()
