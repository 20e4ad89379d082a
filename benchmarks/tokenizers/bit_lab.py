"""What the claims about binary tokens are measured with: errors, a probe, bits, the conflict."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.addons.bit_prior import BitPredictor
from tokenizers_vis.quantizers.binary import GroupedBinary, siglu
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.tokens import Tokens

BATCH = 128


@torch.no_grad()
def encode(tokenizer: VisualTokenizer, images: Tensor) -> Tokens:
    """Tokens of all images, a batch at a time."""
    parts = [tokenizer.encode(part) for part in images.split(BATCH)]
    return Tokens(
        torch.cat([part.embeddings for part in parts]),
        torch.cat([part.mask for part in parts]),
        parts[0].layout,
        torch.cat([part.ids for part in parts if part.ids is not None]),
        torch.cat([part.features for part in parts if part.features is not None]),
    )


@torch.no_grad()
def errors(tokenizer: VisualTokenizer, images: Tensor, tokens: Tokens) -> Tensor:
    """Mean squared error of every image [N]."""
    index = torch.arange(len(images)).split(BATCH)
    drawn = torch.cat([tokenizer.decode(tokens.select(part)) for part in index])
    return (drawn - images).square().mean((1, 2, 3))


def psnr(mse: Tensor) -> float:
    """Mean over images of -10 log10 of their errors, dB."""
    return float((-10 * mse.log10()).mean())


def probe(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> list[bool]:
    """Whether a ridge regression of one-hot labels on inputs [N, D] is right, by test row.

    The ridge is chosen on a quarter of the training rows, and the regression then fitted on all.
    """
    num = int(labels.max()) + 1
    cut = 3 * len(train) // 4

    def predicted(rows: Tensor, own: Tensor, unseen: Tensor, ridge: float) -> Tensor:
        mean = rows.mean(0)
        x = (rows - mean).double()
        y = F.one_hot(own, num).double()
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
        return ((unseen - mean).double() @ weight + y.mean(0)).argmax(1)

    def score(ridge: float) -> float:
        found = predicted(train[:cut], labels[:cut], train[cut:], ridge)
        return float((found == labels[cut:]).double().mean())

    best = max((0.003, 0.01, 0.03, 0.1, 0.3, 1.0), key=score)
    return (predicted(train, labels, test, best) == truth).tolist()  # type: ignore[no-any-return]


def bit_statistics(tokens: Tokens) -> dict[str, float]:
    """Means, entropies (bits) and correlations of the bits, and the features' mean size."""
    bits = tokens.embeddings.flatten(0, 1).double()
    positive = (bits > 0).double().mean(0)
    pairs = torch.corrcoef(bits.T).nan_to_num(1.0).fill_diagonal_(0).abs()
    entropy = torch.special.entr(torch.stack([positive, 1 - positive])).sum(0) / math.log(2)
    ids = tokens.embeddings.flatten(0, 1)
    assert tokens.features is not None
    return {
        "bit_mean_min": float(positive.min()),
        "bit_mean_max": float(positive.max()),
        "dead_bits": float(((positive < 0.01) | (positive > 0.99)).sum()),
        "bit_entropy_mean": float(entropy.mean()),
        "bit_entropy_min": float(entropy.min()),
        "bit_correlation_max": float(pairs.max()),
        "unique_tokens": float(len(torch.unique(ids, dim=0))),
        "abs_feature": float(tokens.features.abs().mean()),
        "commitment": float((tokens.features - tokens.embeddings).square().mean()),
    }


def conflict(quantizer: GroupedBinary, raw: Tensor) -> dict[str, float]:
    """How the gradients of entropy and commitment by the projected features [N, L, D] agree.

    The entropy is the one of a token, which makes it sure; not the batch's diversity.

    Returns:
        opposed: share of the entries in which the signs differ; cosine of the two gradients.
    """
    gradients = []
    for name in ("entropy", "commitment"):
        x = raw.clone().requires_grad_()
        bounded = siglu(x) if quantizer.bound == "siglu" else x
        if name == "entropy":
            grouped = bounded.unflatten(-1, (-1, quantizer.group_bits))
            value = quantizer.entropies(grouped, None)[0]
        else:
            hard = torch.where(bounded > 0, 1.0, -1.0)
            value = (bounded - hard).square().mean()
        gradients.append(torch.autograd.grad(value, x)[0].flatten())
    first, second = gradients
    return {
        "opposed": float((first * second < 0).float().mean()),
        "cosine": float(F.cosine_similarity(first, second, dim=0)),
    }


@torch.no_grad()
def raw_features(tokenizer: Any, images: Tensor) -> Tensor:
    """What stands before the bound, [N, L, D]."""
    parts = []
    for part in images.split(BATCH):
        grid = tokenizer.encoder(part * 2 - 1)
        parts.append(tokenizer.quantizer.project(grid.flatten(2).transpose(1, 2)))
    return torch.cat(parts)


def predictor_loss(train: Tokens, test: Tokens, *, steps: int, seed: int) -> Tensor:
    """The loss of an independent `BitPredictor`, trained on frozen tokens, by test image [N].

    The draws of noise are the same whatever the tokens are.
    """
    torch.manual_seed(seed)
    model: nn.Module = BitPredictor(train.embeddings.shape[-1], dim=64, depth=2, num_heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(train), (64,), generator=generator)
        loss = model.loss(train.select(chosen), generator=generator)  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        known = model.conditions(test.embeddings, test.layout)  # type: ignore[operator]
        values = model.head.loss(test.embeddings, known, repeats=16, generator=generator)  # type: ignore[union-attr,operator]
    return values.mean(1)  # type: ignore[no-any-return]
