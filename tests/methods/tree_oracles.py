"""BranchGRPO, TempFlow-GRPO and MixGRPO-Flash, naively: a state at a time, no flowrl.

A tree is made of `Node`s that know their children; `velocity(x, sigma, sample)` is the network at
one state. Noise comes in as functions of (step, first leaf), so that both sides draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from tests.methods.oracles import Velocity, clipped, log_density, transition

Noise = Callable[[int, int], Tensor]


@dataclass
class Node:
    """A state before step `depth`, the leaves below it and what led here."""

    x: Tensor
    depth: int
    leaves: range
    parent: Node | None = None
    log_prob: float = 0.0
    children: list[Node] = field(default_factory=list)
    reward: float = 0.0
    advantage: float = 0.0

    def below(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.below()


@dataclass(frozen=True)
class Branching:
    kernel: str
    noise_level: float
    sigmas: Sequence[float]
    splits: Sequence[int]
    stochastic: Sequence[int]
    factor: int
    scale: float


def grow(velocity: Velocity, how: Branching, node: Node, own: Noise, shared: Noise) -> None:
    i = node.depth
    if i == len(how.sigmas) - 1:
        return
    v = velocity(node.x, how.sigmas[i], node.leaves[0])
    count = how.factor if i in how.splits else 1
    share = len(node.leaves) // count
    for k in range(count):
        leaves = node.leaves[k * share : (k + 1) * share]
        log_prob = 0.0
        if i in how.stochastic:
            mean, std = transition(how.kernel, how.noise_level, node.x, v, how.sigmas, i)
            noise = own(i, leaves[0])
            if i in how.splits:
                noise = shared(i, node.leaves[0]) + how.scale * noise
                noise = noise / math.sqrt(1 + how.scale**2)
            x = mean + std * noise
            log_prob = float(log_density(x, mean, std).detach())
        else:
            x = node.x + (how.sigmas[i + 1] - how.sigmas[i]) * v
        child = Node(x.detach(), i + 1, leaves, node, log_prob)
        node.children.append(child)
        grow(velocity, how, child, own, shared)


def paths(node: Node, so_far: float = 0.0) -> list[tuple[int, float]]:
    """(leaf, log-prob of the way there) of all leaves below."""
    if not node.children:
        return [(node.leaves[0], so_far)]
    return [p for child in node.children for p in paths(child, so_far + child.log_prob)]


def credit(root: Node, rewards: Sequence[float], path_coef: float) -> None:
    """Sets reward and advantage of every node."""
    nodes = list(root.below())
    for node in nodes:
        ways = paths(node)
        weights = [math.exp(path_coef * way) for _, way in ways]
        node.reward = sum(w * rewards[n] for w, (n, _) in zip(weights, ways, strict=True))
        node.reward /= sum(weights)
    for depth in {node.depth for node in nodes}:
        level = [node for node in nodes if node.depth == depth]
        mean = sum(node.reward for node in level) / len(level)
        squares = sum((node.reward - mean) ** 2 for node in level)
        std = math.sqrt(squares / (len(level) - 1)) if len(level) > 1 else 0.0
        for node in level:
            raw = 0.0 if std < 1e-6 else (node.reward - mean) / (std + 1e-8)
            node.advantage = max(-5.0, min(5.0, raw))


def branch_loss(
    velocity: Velocity,
    how: Branching,
    roots: Sequence[Node],
    trained: Sequence[int],
    kept: set[int],
    clip: float,
) -> Tensor:
    """The mean over trained edges that lead to a kept leaf."""
    losses = []
    for node in (n for root in roots for n in root.below()):
        parent = node.parent
        if parent is None or parent.depth not in trained or not kept & set(node.leaves):
            continue
        i = parent.depth
        v = velocity(parent.x, how.sigmas[i], parent.leaves[0])
        mean, std = transition(how.kernel, how.noise_level, parent.x, v, how.sigmas, i)
        log_prob = log_density(node.x, mean, std)
        old = torch.tensor(node.log_prob, dtype=torch.float64)
        losses.append(clipped(log_prob, old, node.advantage, clip))
    return torch.stack(losses).mean()


def dpmpp_2m_walk(
    velocity: Velocity, x: Tensor, points: Sequence[float], sample: int, x0: Tensor, sigma: float
) -> Tensor:
    """DPM-Solver++ 2M (midpoint) in its exponentials, with the previous x0 (at sigma)."""

    def log_snr(s: float) -> float:
        if s == 1:
            return -math.inf
        return math.log((1 - s) / s) if s > 0 else math.inf

    for s, s_next in pairwise(points):
        m = x - s * velocity(x, s, sample)
        if s_next == 0:
            return m
        h, h_before = log_snr(s_next) - log_snr(s), log_snr(s) - log_snr(sigma)
        d = m if math.isinf(h_before) else m + (m - x0) * h / (2 * h_before)
        x = s_next / s * x - (1 - s_next) * (math.exp(-h) - 1) * d
        x0, sigma = m, s
    return x
