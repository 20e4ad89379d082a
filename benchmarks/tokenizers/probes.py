"""Linear probes: how much of a label is in a representation, read by logistic regression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DECAYS = (1e-3, 1e-2, 1e-1)


def linear_probe(
    features: Tensor,
    labels: Tensor,
    held_out: Tensor,
    truth: Tensor,
    *,
    decays: Sequence[float] = DECAYS,
) -> Tensor:
    """Bool [M]: whether a linear classifier of the features is right on the held-out ones.

    The weight decay is chosen on a fifth of the training features.

    Args:
        features: [N, D], standardised by their own mean and spread.
        labels: int64 [N].
        held_out: [M, D].
        truth: int64 [M].
        decays: of the weights, to choose from.
    """
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    train, test = (features - mean) / spread, (held_out - mean) / spread
    cut = len(train) * 4 // 5
    classes = int(labels.max()) + 1
    scores = {}
    for decay in decays:
        weight = _logistic(train[:cut], labels[:cut], classes, decay)
        scores[decay] = float(_right(train[cut:], labels[cut:], weight).float().mean())
    best = max(scores, key=lambda decay: scores[decay])
    return _right(test, truth, _logistic(train, labels, classes, best))


def one_hot(ids: Tensor, vocab: int) -> Tensor:
    """Ids [N, L] as float [N, L * vocab]."""
    return F.one_hot(ids, vocab).flatten(1).float()


def _logistic(x: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """[D + 1, classes], the last row the bias; L-BFGS."""
    weight = torch.zeros(x.shape[1] + 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], labels)
        loss = loss + decay * weight[:-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _right(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight[:-1] + weight[-1]).argmax(1) == labels
