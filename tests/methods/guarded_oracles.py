"""GRPO-Guard, Flow-DPPO, GDPO's advantages and Pref-GRPO's win rates, naively; no flowrl.

Guard is written by what its ratio means, the change of the mean along the noise that was drawn,
where flowrl corrects a difference of log-probs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.methods.oracles import Chains, Steps, Velocity, log_density, transition


def guard_loss(
    velocity: Velocity,
    old: Velocity,
    chains: Chains,
    steps: Steps,
    advantages: Sequence[float],
    *,
    kernel: str,
    noise_level: float,
    sigmas: Sequence[float],
    clip: float,
) -> Tensor:
    """Mean over samples and steps of PPO's loss of exp(mean(shift * noise)), over -dt."""
    losses = []
    for sample, (chain, mine) in enumerate(zip(chains, steps, strict=True)):
        for i in mine:
            x, advantage = chain[i], advantages[sample]
            mean, std = transition(
                kernel, noise_level, x, velocity(x, sigmas[i], sample), sigmas, i
            )
            old_mean, _ = transition(kernel, noise_level, x, old(x, sigmas[i], sample), sigmas, i)
            old_mean = old_mean.detach()
            noise = (chain[i + 1] - old_mean) / std
            ratio = torch.exp(((mean - old_mean) * noise).mean())
            worst = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
            losses.append(worst / (sigmas[i] - sigmas[i + 1]))
    return torch.stack(losses).mean()


def dppo_loss(
    velocity: Velocity,
    old: Velocity,
    chains: Chains,
    steps: Steps,
    advantages: Sequence[float],
    *,
    kernel: str,
    noise_level: float,
    sigmas: Sequence[float],
    threshold: float,
) -> tuple[Tensor, float]:
    """(mean over samples and steps of -ratio * advantage where kept, share that is stopped)."""
    losses, stopped = [], 0
    for sample, (chain, mine) in enumerate(zip(chains, steps, strict=True)):
        for i in mine:
            x, advantage = chain[i], advantages[sample]
            mean, std = transition(
                kernel, noise_level, x, velocity(x, sigmas[i], sample), sigmas, i
            )
            old_mean, _ = transition(kernel, noise_level, x, old(x, sigmas[i], sample), sigmas, i)
            old_mean = old_mean.detach()
            log_ratio = log_density(chain[i + 1], mean, std)
            log_ratio = log_ratio - log_density(chain[i + 1], old_mean, std)
            divergence = float(((mean.detach() - old_mean) ** 2).mean() / (2 * std**2))
            away = advantage * float(log_ratio.detach()) > 0
            if divergence >= threshold and away:
                stopped += 1
                losses.append(torch.zeros_like(log_ratio))
            else:
                losses.append(-advantage * torch.exp(log_ratio))
    return torch.stack(losses).mean(), stopped / len(losses)


def gdpo_advantages(
    rewards: Sequence[Sequence[float]], groups: Sequence[int], weights: Sequence[float]
) -> list[float]:
    """Each reward over its group's std (ddof 0) + 1e-4; their sum over that of the batch + 1e-4."""

    def normalized(values: Sequence[float]) -> list[float]:
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        return [(v - mean) / (std + 1e-4) for v in values]

    total = [0.0] * len(groups)
    for weight, values in zip(weights, rewards, strict=True):
        for group in set(groups):
            members = [n for n, g in enumerate(groups) if g == group]
            scaled = normalized([values[n] for n in members])
            for n, value in zip(members, scaled, strict=True):
                total[n] += weight * value
    return [max(-5.0, min(5.0, a)) for a in normalized(total)]


def group_win_rates(scores: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Share of its group's other samples with a lower score; an equal one counts half."""
    rates = []
    for n, (mine, group) in enumerate(zip(scores, groups, strict=True)):
        others = [s for m, s in enumerate(scores) if groups[m] == group and m != n]
        rates.append(sum(1.0 if mine > s else 0.5 * (mine == s) for s in others) / len(others))
    return rates
