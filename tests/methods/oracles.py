"""Flow-GRPO, DanceGRPO, MixGRPO and GRPO on tokens, naively: a sample and a step at a time.

Plain torch, written from the papers and their published code; nothing of flowrl is imported. A
chain is the list of a sample's T + 1 states; `velocity(x, sigma, sample)` is the guided network at
one state. No tree, no batch, no mask: what is not trained is not visited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float, int], Tensor]
Chains = list[list[Tensor]]
Steps = Sequence[Sequence[int]]  # the trained steps of each sample


def transition(
    kernel: str, noise_level: float, x: Tensor, v: Tensor, sigmas: Sequence[float], i: int
) -> tuple[Tensor, float]:
    """Mean and std of step i, from the predicted clean data x0 and noise x1."""
    s, s_next = sigmas[i], sigmas[i + 1]
    delta = s - s_next
    x0, x1 = x - s * v, x + (1 - s) * v
    if kernel == "cps":
        angle = noise_level * math.pi / 2
        return (1 - s_next) * x0 + s_next * math.cos(angle) * x1, s_next * math.sin(angle)
    g = noise_level
    if kernel == "flow_sde":
        g = noise_level * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
    mean = (1 - s_next) * x0 + (s_next - g * g * delta / (2 * s)) * x1
    return mean, g * math.sqrt(delta)


def log_density(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std^2), averaged over dims."""
    total = -((x - mean) ** 2).sum() / (2 * std**2)
    return total / x.numel() - math.log(std) - math.log(2 * math.pi) / 2


def rollout(
    velocity: Velocity,
    kernel: str,
    noise_level: float,
    sigmas: Sequence[float],
    stochastic: Sequence[int],
    first: Sequence[Tensor],
    noise: Sequence[Sequence[Tensor]],
) -> Chains:
    """Chains from the starting noise of each sample and the noise of its steps."""
    chains = []
    for sample, x in enumerate(first):
        chain = [x]
        for i in range(len(sigmas) - 1):
            v = velocity(x, sigmas[i], sample)
            if i in stochastic:
                mean, std = transition(kernel, noise_level, x, v, sigmas, i)
                x = mean + std * noise[sample][i]
            else:
                x = x + (sigmas[i + 1] - sigmas[i]) * v
            chain.append(x.detach())
        chains.append(chain)
    return chains


def summed_advantages(
    rewards: Sequence[Sequence[float]], groups: Sequence[int], weights: Sequence[float], scope: str
) -> list[float]:
    """Flow-GRPO's tracker: sum rewards; mean of the group; std (ddof 0) of the scope, + 1e-4."""
    total = [0.0] * len(groups)
    for weight, values in zip(weights, rewards, strict=True):
        total = [t + weight * value for t, value in zip(total, values, strict=True)]
    result = []
    for reward, group in zip(total, groups, strict=True):
        mine = [r for r, g in zip(total, groups, strict=True) if g == group]
        spread = total if scope == "global" else mine
        center = sum(spread) / len(spread)
        std = math.sqrt(sum((r - center) ** 2 for r in spread) / len(spread))
        result.append((reward - sum(mine) / len(mine)) / (std + 1e-4))
    return [max(-5.0, min(5.0, a)) for a in result]


def normalized_advantages(
    rewards: Sequence[Sequence[float]], groups: Sequence[int], weights: Sequence[float]
) -> list[float]:
    """DanceGRPO and MixGRPO: each reward over its group's std (ddof 1) + 1e-8; then the sum."""
    result = [0.0] * len(groups)
    for weight, values in zip(weights, rewards, strict=True):
        for sample, group in enumerate(groups):
            mine = [r for r, g in zip(values, groups, strict=True) if g == group]
            mean = sum(mine) / len(mine)
            std = math.sqrt(sum((r - mean) ** 2 for r in mine) / (len(mine) - 1))
            result[sample] += weight * (values[sample] - mean) / (std + 1e-8)
    return [max(-5.0, min(5.0, a)) for a in result]


def clipped(log_prob: Tensor, old_log_prob: Tensor, advantage: float, clip: float) -> Tensor:
    """PPO's loss of one decision."""
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def flow_loss(
    velocity: Velocity,
    old: Velocity,
    reference: Velocity,
    chains: Chains,
    steps: Steps,
    advantages: Sequence[float],
    *,
    kernel: str,
    noise_level: float,
    sigmas: Sequence[float],
    clip: float,
    kl_coef: float,
    kl: str,
) -> Tensor:
    """The mean over samples and their trained steps of clipped ratio + KL to the reference."""
    losses = []
    for sample, (chain, mine) in enumerate(zip(chains, steps, strict=True)):
        for i in mine:
            means = []
            for field in (velocity, old, reference):
                v = field(chain[i], sigmas[i], sample)
                mean, std = transition(kernel, noise_level, chain[i], v, sigmas, i)
                means.append(mean)
            new_mean, old_mean, reference_mean = means
            log_prob = log_density(chain[i + 1], new_mean, std)
            old_log_prob = log_density(chain[i + 1], old_mean.detach(), std)
            loss = clipped(log_prob, old_log_prob, advantages[sample], clip)
            distance = ((new_mean - reference_mean.detach()) ** 2).mean()
            g_squared = std**2 / (sigmas[i] - sigmas[i + 1])
            divergence = distance / (2 * (std**2 if kl == "paper" else g_squared))
            losses.append(loss + kl_coef * divergence)
    return torch.stack(losses).mean()


def token_loss(
    logits: Tensor,
    old_logits: Tensor,
    reference_logits: Tensor,
    tokens: Tensor,
    advantages: Sequence[float],
    *,
    temperature: float,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> Tensor:
    """GRPO: the mean over samples of the mean over their tokens of clipped ratio + k3."""
    losses = []
    for n, advantage in enumerate(advantages):
        per_token = []
        for s, token in enumerate(tokens[n]):
            new, old, ref = (
                torch.softmax(each[n, s] / temperature, dim=0)[token]
                for each in (logits, old_logits.detach(), reference_logits.detach())
            )
            ratio = new / old
            surrogate = torch.minimum(
                ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
            )
            k3 = ref / new - torch.log(ref / new) - 1
            per_token.append(-surrogate + kl_coef * k3)
        losses.append(torch.stack(per_token).mean())
    return torch.stack(losses).mean()
