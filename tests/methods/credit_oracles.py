"""Flash-GRPO, G2RPO, DenseGRPO and Neighbor GRPO, naively: a state at a time, no flowrl.

Written from the papers' formulas and published code. `velocity(x, sigma, sample)` is the network at
one state; noise comes in, so that both sides draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tests.methods.oracles import Chains, Steps, Velocity, clipped, log_density, transition


def flash_loss(
    velocity: Velocity,
    old: Velocity,
    chains: Chains,
    steps: Steps,
    advantages: Sequence[float],
    *,
    noise_level: float,
    sigmas: Sequence[float],
    clip: float,
    trained: Sequence[int],
) -> Tensor:
    """Mean over samples of PPO's loss of Flow-SDE over lambda, whose inverse has mean 1."""

    def inverse(i: int) -> float:
        s, delta = sigmas[i], sigmas[i] - sigmas[i + 1]
        g = noise_level * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
        return 1 / (math.sqrt(delta) / g + g * math.sqrt(delta) * (1 - s) / (2 * s))

    mean_inverse = sum(map(inverse, trained)) / len(trained)
    losses = []
    for sample, (chain, (i,)) in enumerate(zip(chains, steps, strict=True)):
        log_probs = []
        for field in (velocity, old):
            v = field(chain[i], sigmas[i], sample)
            mean, std = transition("flow_sde", noise_level, chain[i], v, sigmas, i)
            log_probs.append(log_density(chain[i + 1], mean, std))
        loss = clipped(log_probs[0], log_probs[1].detach(), advantages[sample], clip)
        losses.append(loss * inverse(i) / mean_inverse)
    return torch.stack(losses).mean()


def euler_walk(
    velocity: Velocity, x: Tensor, points: Sequence[float], sample: int
) -> tuple[Tensor, Tensor]:
    """(the state at the last point, the x0 that was predicted in the last step)."""
    x0 = x
    for s, s_next in pairwise(points):
        v = velocity(x, s, sample)
        x0, x = x - s * v, x + (s_next - s) * v
    return x, x0


def granular_ends(
    velocity: Velocity, x: Tensor, sigmas: Sequence[float], k: int, stride: int, sample: int
) -> Tensor:
    """What G2RPO decodes of a state after step k: the last prediction of x0 on a strided path."""
    points = [*sigmas[: k + 2], *sigmas[k + 2 :: stride]]
    return euler_walk(velocity, x, points[k + 1 :], sample)[1].detach()


def granular_advantages(
    rewards: Sequence[Sequence[float]],
    weights: Sequence[float],
    groups: Sequence[int],
    kinds: Sequence[int],
    states: Sequence[int],
) -> dict[int, float]:
    """Per perturbed state: the sum over its ends and rewards of the normalised reward, clamped."""
    total = dict.fromkeys(states, 0.0)
    for weight, values in zip(weights, rewards, strict=True):
        for n, state in enumerate(states):
            same = [
                value
                for value, group, kind in zip(values, groups, kinds, strict=True)
                if (group, kind) == (groups[n], kinds[n])
            ]
            mean = sum(same) / len(same)
            std = math.sqrt(sum((r - mean) ** 2 for r in same) / (len(same) - 1))
            total[state] += weight * (values[n] - mean) / (std + 1e-8)
    return {state: max(-5.0, min(5.0, a)) for state, a in total.items()}


def dense_advantages(
    rewards: Sequence[Sequence[float]], groups: Sequence[int]
) -> list[list[float]]:
    """[trajectory][step]: the gain of the reward, over its group's std (ddof 0) + 1e-4."""
    gains = [[b - a for a, b in pairwise(r)] for r in rewards]
    result = []
    for mine, group in zip(gains, groups, strict=True):
        row = []
        for step, gain in enumerate(mine):
            same = [other[step] for other, g in zip(gains, groups, strict=True) if g == group]
            mean = sum(same) / len(same)
            std = math.sqrt(sum((x - mean) ** 2 for x in same) / len(same))
            row.append(max(-5.0, min(5.0, (gain - mean) / (std + 1e-4))))
        result.append(row)
    return result


def stepwise_loss(
    velocity: Velocity,
    old: Velocity,
    reference: Velocity,
    chains: Chains,
    steps: Steps,
    samples: Sequence[int],
    advantages: Sequence[Sequence[float]],
    *,
    kernel: str,
    noise_level: float,
    sigmas: Sequence[float],
    clip: float,
    kl_coef: float,
) -> Tensor:
    """Mean over chains and steps, each with its own advantage, of clipped ratio + KL."""
    losses = []
    for sample, chain, mine, row in zip(samples, chains, steps, advantages, strict=True):
        for i, advantage in zip(mine, row, strict=True):
            means = []
            for field in (velocity, old, reference):
                v = field(chain[i], sigmas[i], sample)
                mean, std = transition(kernel, noise_level, chain[i], v, sigmas, i)
                means.append(mean)
            new, before, anchor = means
            log_prob = log_density(chain[i + 1], new, std)
            old_log_prob = log_density(chain[i + 1], before.detach(), std)
            divergence = ((new - anchor.detach()) ** 2).mean() / (2 * std**2)
            losses.append(clipped(log_prob, old_log_prob, advantage, clip) + kl_coef * divergence)
    return torch.stack(losses).mean()


def neighbor_chains(
    velocity: Velocity,
    solver: str,
    sigmas: Sequence[float],
    shared: Sequence[Tensor],
    own: Sequence[Tensor],
    spread: float,
) -> Chains:
    """Deterministic chains from neighbouring starts; DPM-Solver++ 2M by its exponentials."""

    def log_snr(s: float) -> float:
        return math.log((1 - s) / s)

    chains = []
    for sample, (one, other) in enumerate(zip(shared, own, strict=True)):
        chain = [math.sqrt(1 - spread**2) * one + spread * other]
        before: list[Tensor] = []
        for i, (s, s_next) in enumerate(pairwise(sigmas)):
            v = velocity(chain[-1], s, sample).detach()
            m = chain[-1] - s * v
            target = m
            if solver == "dpmpp_2m" and i >= 2 and s_next > 0:
                h, h_before = log_snr(s_next) - log_snr(s), log_snr(s) - log_snr(sigmas[i - 1])
                target = m + (m - before[-1]) * h / (2 * h_before)
            chain.append(s_next / s * chain[-1] + (1 - s_next / s) * target)
            before.append(m)
        chains.append(chain)
    return chains


def neighbor_advantages(
    rewards: Sequence[Sequence[float]],
    groups: Sequence[int],
    weights: Sequence[float],
    power: float,
) -> list[float]:
    """The sum of normalised rewards (ddof 1) over its quasi-norm in the group."""
    total = [0.0] * len(groups)
    for weight, values in zip(weights, rewards, strict=True):
        for n, group in enumerate(groups):
            mine = [r for r, g in zip(values, groups, strict=True) if g == group]
            mean = sum(mine) / len(mine)
            std = math.sqrt(sum((r - mean) ** 2 for r in mine) / (len(mine) - 1))
            total[n] += weight * (values[n] - mean) / (std + 1e-8)
    return [
        a / sum(abs(b) ** power for b, h in zip(total, groups, strict=True) if h == g)
        ** (1 / power)
        for a, g in zip(total, groups, strict=True)
    ]  # fmt: skip


def neighbor_loss(
    velocity: Velocity,
    old: Velocity,
    chains: Chains,
    groups: Sequence[int],
    anchors: Sequence[int],
    trained: Sequence[int],
    advantages: Sequence[float],
    *,
    sigmas: Sequence[float],
    temperature: float,
    clip: float,
) -> Tensor:
    """Mean over steps, anchors and candidates of PPO's loss of a softmax of distances."""
    losses = []
    for i in trained:
        for k in anchors:
            members = [n for n, group in enumerate(groups) if group == groups[k]]
            leaps = []
            for field in (velocity, old):
                x = chains[k][i]
                x = x + (sigmas[i + 1] - sigmas[i]) * field(x, sigmas[i], k)
                near = [torch.exp(-((chains[n][i + 1] - x) ** 2).mean() / temperature)
                        for n in members]  # fmt: skip
                leaps.append([each / sum(near) for each in near])
            for n, new, before in zip(members, *leaps, strict=True):
                losses.append(clipped(new.log(), before.detach().log(), advantages[n], clip))
    return torch.stack(losses).mean()
