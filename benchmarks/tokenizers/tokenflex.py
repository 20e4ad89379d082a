"""TokenFLEX: one model at every number of tokens, against models trained at one number.

    python benchmarks/tokenizers/tokenflex.py [--seeds 0 1 2] [--steps 600]

What stands for the language model is a small transformer that answers three questions about a
scene from its vision tokens: colour and shape of the largest object, and how many there are. All
models have the same steps; the flexible one draws 4, 16 or 64 tokens for every batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lab import Scenes, arguments, claim, confidence, fit, once, scenes, spread, write_result
from torch import Tensor, nn

from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.blocks import Transformer
from tokenizers_vis.quantizers.base import LossTerm
from tokenizers_vis.tokenflex import TokenFlex, TokenFlexConfig
from tokenizers_vis.tokenizer import TokenizerOutput
from tokenizers_vis.tokens import Tokens

BASE = TokenFlexConfig(
    image_size=32, patch_size=4, dim=64, width=64, num_heads=4, depth=3, hidden=128, reader_depth=1
)
COUNTS, UNSEEN = (4, 16, 64), (9, 36)
QUESTIONS = {"color": 7, "shape": 6, "num_objects": 5}
TRAIN, HELD_OUT, BATCH = 4000, 2048, 64
POINT = 0.01


class Answers(nn.Module):
    """Tokens of scenes, and what a small transformer answers from them.

    Args:
        tokenizer: whose own reader is not used.
        known: scenes with their answers.
        counts: that a batch's number of tokens is drawn from.
    """

    def __init__(self, tokenizer: TokenFlex, known: Scenes, counts: Sequence[int]) -> None:
        super().__init__()
        self.tokenizer, self.known = tokenizer, known
        self.dropout = TokenDropout("uniform", counts=tuple(counts), is_shared=True)
        width = tokenizer.config.width
        self.token_in = nn.Linear(tokenizer.config.dim, width)
        self.question = nn.Parameter(torch.randn(len(QUESTIONS), width))
        self.reader = Transformer(width, 2, num_heads=4, rotary_axes=2)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in QUESTIONS.values())

    def answer(self, tokens: Tokens) -> list[Tensor]:
        """Logits [B, classes] of every question."""
        num = len(QUESTIONS)
        places = [torch.full((num, 2), torch.nan), tokens.layout.coords[:, 1:]]
        questions = self.question.expand(len(tokens), -1, -1)
        x = torch.cat([questions, self.token_in(tokens.embeddings)], dim=1)
        x = self.reader(x, coords=torch.cat(places))
        return [head(x[:, number]) for number, head in enumerate(self.heads)]

    def forward(
        self, index: Tensor, *, progress: float, generator: torch.Generator
    ) -> TokenizerOutput:
        """Losses of the known scenes at int64 index [B]."""
        count = int(self.dropout.draw(1, self.tokenizer.token_counts, generator))
        tokens = self.tokenizer.encode(self.known.images[index], count)
        losses = {
            name: LossTerm(1.0, F.cross_entropy(logits, getattr(self.known, name)[index]))
            for name, logits in zip(QUESTIONS, self.answer(tokens), strict=True)
        }
        return TokenizerOutput(tokens, losses)

    @torch.no_grad()
    def hits(self, asked: Scenes, count: int) -> list[float]:
        """Share of right answers for every scene, at a number of tokens."""
        logits = self.answer(self.tokenizer.encode(asked.images, count))
        right = [
            each.argmax(1) == getattr(asked, name)
            for name, each in zip(QUESTIONS, logits, strict=True)
        ]
        return torch.stack(right).float().mean(0).tolist()  # type: ignore[no-any-return]


def trained(
    counts: Sequence[int], *, seed: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Number of tokens -> share of right answers of every held-out scene; kept."""
    key = {"config": asdict(BASE), "counts": list(counts), "seed": seed, "steps": args.steps,
           "train": TRAIN, "held_out": HELD_OUT, "batch": BATCH}  # fmt: skip

    def run() -> dict[str, Any]:
        print(f"trained at {list(counts)}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        model = Answers(TokenFlex(BASE), scenes(TRAIN, seed=seed), counts)
        # The training draws numbers of scenes, because the answers belong to them.
        fit(model, torch.arange(TRAIN), steps=args.steps, seed=seed, batch_size=BATCH, lr=2e-3)  # type: ignore[arg-type]
        asked = scenes(HELD_OUT, seed=1000 + seed, held_out=True)
        return {str(count): model.hits(asked, count) for count in (*COUNTS, *UNSEEN)}

    return once("tokenflex", key, run)


Hits = list[dict[str, list[float]]]


def gap(first: Hits, second: Hits, count: int, other: int | None = None) -> dict[str, Any]:
    """Mean difference of accuracies and its interval, paired by scene, seeds pooled."""
    key = str(count if other is None else other)
    pairs = zip(first, second, strict=True)
    each = [np.subtract(one[str(count)], two[key]) for one, two in pairs]
    return {
        "mean": float(np.mean(each)),
        "interval": confidence(np.concatenate(each).tolist()),
        "seeds": [float(part.mean()) for part in each],
    }


def claims(flexible: Hits, fixed: dict[int, Hits]) -> list[dict[str, Any]]:
    """The sentences, and whether the numbers show them."""
    found = []
    for count in COUNTS:
        numbers = gap(flexible, fixed[count], count)
        found.append(
            claim(f"one flexible model is no more than a point below the model of {count} tokens, "
                  "with 95 % confidence", numbers["interval"][0] > -POINT, **numbers)
        )  # fmt: skip
    for unseen, below in zip(UNSEEN, COUNTS, strict=False):
        numbers = gap(flexible, flexible, unseen, below)
        found.append(
            claim(f"at {unseen} tokens, which it never saw, it is no more than a point below "
                  f"itself at {below}", numbers["interval"][0] > -POINT, **numbers)
        )  # fmt: skip
    for count in COUNTS[:-1]:
        numbers = gap(flexible, fixed[COUNTS[-1]], count)
        found.append(
            claim(f"the model of {COUNTS[-1]} tokens, given {count}, falls behind the flexible one",
                  numbers["interval"][0] > 0, **numbers)
        )  # fmt: skip
    return found


def main() -> None:
    """Trains, prints the table, writes docs/tokenizers/tokenflex.json."""
    args = arguments(__doc__ or "", steps=600)
    flexible = [trained(COUNTS, seed=seed, args=args) for seed in args.seeds]
    fixed = {
        count: [trained((count,), seed=seed, args=args) for seed in args.seeds] for count in COUNTS
    }
    names = {"flexible": flexible, **{f"only {count}": each for count, each in fixed.items()}}
    counts = sorted((*COUNTS, *UNSEEN))
    print(f"{'accuracy at':12}" + "".join(f"{count:>18}" for count in counts))
    table = {}
    for name, runs in names.items():
        table[name] = {count: [float(np.mean(run[str(count)])) for run in runs] for count in counts}
        print(f"{name:12}" + "".join(f"{spread(each):>18}" for each in table[name].values()))
    found = claims(flexible, fixed)
    for each in found:
        print("shows" if each["shows"] else "DOES NOT SHOW", "-", each["claim"], each["numbers"])
    write_result("tokenflex", {"config": asdict(BASE), "seeds": args.seeds, "steps": args.steps,
                               "accuracy": table, "claims": found})  # fmt: skip


if __name__ == "__main__":
    main()
