"""What a linear map reads from tokens: ridge regression on labels, in closed form.

Nothing is drawn, so the same tokens give the same number. `linear_probe` says how the penalty is
chosen; `token_features` what the map sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PENALTIES = 10.0 ** torch.arange(-5, 3, dtype=torch.float64)  # of features of unit variance


def token_features(embeddings: Tensor, mask: Tensor, num_tokens: int) -> Tensor:
    """The first tokens side by side, [N, num_tokens * C]; 0 where the mask [N, L] is False."""
    kept = torch.where(mask[..., None], embeddings, 0.0)[:, :num_tokens]
    return kept.flatten(1)


def linear_probe(
    train: Tensor, held_out: Tensor, train_labels: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Predicted classes int64 [M] of the held-out rows, by name of the label.

    Ridge regression to one-hot classes; the largest output wins. Features are standardised by the
    training rows (those that never change are left out); the penalty, one per label, is the one of
    the least leave-one-out error of the training rows, which ridge regression has in closed form
    (Allen's PRESS; the means are those of all rows). Solved between rows, so that there may be more
    features than rows.

    Args:
        train: [N, D].
        held_out: [M, D].
        train_labels: int64 [N] by name.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    moves = std > 1e-6
    if not moves.any():
        return {name: labels.mode().values.expand(len(held_out)).clone()
                for name, labels in train_labels.items()}  # fmt: skip
    x, y = ((each.double() - mean)[:, moves] / std[moves] for each in (train, held_out))
    width = x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T / width)
    cross = y @ x.T / width @ vectors  # [M, N]
    values = values.clamp_min(0)
    found = {}
    for name, labels in train_labels.items():
        targets = F.one_hot(labels).double()
        centre = targets.mean(0)
        rotated = vectors.T @ (targets - centre)
        errors = torch.stack([_left_out_error(vectors, values, rotated, p) for p in _PENALTIES])
        penalty = _PENALTIES[errors.argmin()]
        scores = cross @ (rotated / (values + penalty * len(x))[:, None]) + centre
        found[name] = scores.argmax(1)
    return found


def _left_out_error(vectors: Tensor, values: Tensor, rotated: Tensor, penalty: Tensor) -> Tensor:
    """Mean squared error of every row by a fit to the others: (G^-1 y)_i / (G^-1)_ii."""
    inverse = 1 / (values + penalty * len(values))
    residual = vectors @ (rotated * inverse[:, None])
    own = (vectors.square() * inverse).sum(1)
    return (residual / own[:, None]).square().mean()
