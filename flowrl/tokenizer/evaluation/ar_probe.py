"""How many bits an autoregressive model needs for the tokens of an image: an independent probe.

A small causal transformer is trained from scratch on the ids of training images, in the order of
the layout, and scores those of held-out images. It is the same for every tokenizer, unconditional,
and knows nothing of how the tokenizer was trained. Its bits are an upper bound of the tokens'
entropy, and tell how hard they are to model at that size. Reading order: `ar_bits`, `ArProbe`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.data.seeds import derive_seed
from tokenizers_vis.blocks import SwiGlu, Transformer, causal_mask

_MAX_LOGITS = 2**24  # elements at a time: 64 MB; larger batches are cut, with the same gradient


@dataclass(frozen=True)
class ArSettings:
    """The probe's numbers.

    Attributes:
        steps: at most; the weights of the least validation loss are used.
        batch_size, lr: of AdamW on a one-cycle schedule.
        dim, depth, num_heads: of the transformer.
        validation: share of the training images that choose the weights.
        checks: validations, evenly over the steps.
    """

    steps: int = 1000
    batch_size: int = 32
    lr: float = 2e-3
    dim: int = 96
    depth: int = 3
    num_heads: int = 4
    validation: float = 0.1
    checks: int = 10


@dataclass(frozen=True)
class ArBits:
    """What the probe found.

    Attributes:
        bits: float [N, L], of every held-out token; 0 where the mask is False.
        best_step: whose weights were used.
        steps: that were trained.
        num_parameters: of the probe.
        train_bits: bits per token of the training images, at the weights used.
    """

    bits: Tensor
    best_step: int
    steps: int
    num_parameters: int
    train_bits: float


class ArProbe(nn.Module):
    """p(token | tokens before), and within a token p(group | groups before).

    Groups are modelled exactly by the chain rule: each sees the sum of the embeddings of those
    before it, on top of what the transformer says.

    Args:
        vocabs: int64 [L], ids of one group at every position.
        groups: ids per token.
        settings: the numbers.
    """

    def __init__(self, vocabs: Tensor, groups: int, settings: ArSettings) -> None:
        super().__init__()
        length, vocab, dim = len(vocabs), int(vocabs.max()), settings.dim
        self.groups, self.vocab = groups, vocab
        self.token_in = nn.Embedding(groups * vocab, dim)
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
        self.start = nn.Parameter(0.02 * torch.randn(dim))
        self.trunk = Transformer(dim, settings.depth, num_heads=settings.num_heads)
        self.group_in = nn.Embedding(groups * vocab, dim) if groups > 1 else None
        self.group_place = nn.Parameter(0.02 * torch.randn(groups, dim))
        self.group_mix = nn.Sequential(nn.LayerNorm(dim), SwiGlu(dim, 2 * dim))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Parameter(torch.randn(groups, vocab, dim) / math.sqrt(dim))
        nn.init.normal_(self.token_in.weight, std=0.5 / math.sqrt(groups))
        self.register_buffer("offset", torch.arange(groups) * vocab, persistent=False)
        allowed = torch.arange(vocab) < vocabs[:, None]
        self.register_buffer("allowed", allowed[None, :, None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Negative log-likelihood [B, L], nats, of ids int64 [B, L, G]."""
        codes = ids + self.offset
        before = self.token_in(codes).sum(2)[:, :-1]
        start = self.start.expand(len(ids), 1, -1)
        x = torch.cat([start, before], dim=1) + self.place
        x = self.trunk(x, mask=causal_mask(ids.shape[1], device=ids.device))
        x = x[:, :, None] + self.group_place
        if self.group_in is not None:
            each = self.group_in(codes)
            x = x + F.pad(each.cumsum(2)[:, :, :-1], (0, 0, 1, 0))
        x = self.norm(x + self.group_mix(x))
        logits = torch.einsum("blgd,gvd->blgv", x, self.out)
        logits = logits.masked_fill(~self.allowed, -math.inf)
        chosen = logits.gather(3, ids[..., None])[..., 0]
        return (logits.logsumexp(3) - chosen).sum(2)


def ar_bits(
    train: Tensor,
    held_out: Tensor,
    vocabs: Tensor,
    *,
    masks: tuple[Tensor, Tensor] | None = None,
    settings: ArSettings | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> ArBits:
    """Trains a probe and scores the held-out ids.

    Args:
        train: ids int64 [N, L] or [N, L, G].
        held_out: ids of other images.
        vocabs: int64 [L], ids of one group at every position.
        masks: bool [N, L] of both; None = all tokens count.
        settings: the probe's numbers.
        seed: of weights and batches; the global generators are left alone.
        device: where it runs.
    """
    settings = settings or ArSettings()
    train, held_out = (each if each.ndim == 3 else each[..., None] for each in (train, held_out))
    train_mask, test_mask = masks or (_everywhere(train), _everywhere(held_out))
    num_valid = max(1, round(settings.validation * len(train)))
    valid, fitted = train[:num_valid], train[num_valid:]
    valid_mask, fitted_mask = train_mask[:num_valid], train_mask[num_valid:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "ar probe"))
        probe = ArProbe(vocabs, train.shape[2], settings).to(device)
    best_step, state = _fit(probe, (fitted, fitted_mask), (valid, valid_mask), settings, seed)
    probe.load_state_dict(state)
    some = slice(0, len(held_out))
    seen = _score(probe, fitted[some], fitted_mask[some])
    return ArBits(
        bits=_score(probe, held_out, test_mask),
        best_step=best_step,
        steps=settings.steps,
        num_parameters=sum(p.numel() for p in probe.parameters()),
        train_bits=float(seen.sum() / fitted_mask[some].sum()),
    )


def _fit(
    probe: ArProbe,
    fitted: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
    settings: ArSettings,
    seed: int,
) -> tuple[int, dict[str, Tensor]]:
    """The step of the least validation loss, and the weights there."""
    ids, mask = fitted
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(derive_seed(seed, "ar batches"))
    every = max(1, settings.steps // settings.checks)
    best, best_step, state = math.inf, 0, copy.deepcopy(probe.state_dict())
    for step in range(1, settings.steps + 1):
        chosen = torch.randint(len(ids), (settings.batch_size,), generator=generator)
        _backward(probe, ids[chosen], mask[chosen])
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % every == 0 or step == settings.steps:
            loss = float(_score(probe, *valid).sum() / valid[1].sum())
            if loss < best:
                best, best_step, state = loss, step, copy.deepcopy(probe.state_dict())
    return best_step, state


def _backward(probe: ArProbe, ids: Tensor, mask: Tensor) -> None:
    """Accumulates the gradient of the mean over the batch's tokens, a part of it at a time."""
    device = probe.start.device
    rows, total = _rows(probe, ids), mask.sum().to(device)
    for part, kept in zip(ids.split(rows), mask.split(rows), strict=True):
        nll = probe(part.to(device))
        (torch.where(kept.to(device), nll, 0.0).sum() / total).backward()


@torch.no_grad()
def _score(probe: ArProbe, ids: Tensor, mask: Tensor) -> Tensor:
    """Bits [N, L] on the CPU, 0 where the mask is False."""
    device = probe.start.device
    parts = [probe(part.to(device)).cpu() for part in ids.split(min(64, _rows(probe, ids)))]
    return torch.where(mask, torch.cat(parts), 0.0) / math.log(2)


def _rows(probe: ArProbe, ids: Tensor) -> int:
    return max(1, _MAX_LOGITS // (ids.shape[1] * probe.groups * probe.vocab))


def _everywhere(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[:2], dtype=torch.bool)
