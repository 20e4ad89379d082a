"""BitDance's claims: exact grouped tokens, PSNR that rises with bits, a head that joins bits.

    python benchmarks/tokenizers/bitdance.py [--seeds 0 1 2] [--steps 400] [--parts bits head]

Paper: BitDance, arXiv:2602.14041. The tokenizers are measured on scenes of combinations that
training never shows. The head is tried on a law that is known: eight coupled bits whose parity the
condition tells, where bits drawn independently, even with the exact marginals, are wrong half of
the time. Reading order: `train`, `Law`, `train_head`, `claims`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bit_lab
import lab
import torch
from torch import Tensor

from tokenizers_vis.bit_head import BitHead
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.training import TokenizerTraining

NUM_TRAIN, NUM_HELD_OUT = 4096, 1024
BITS = {4: 4, 8: 8, 16: 8, 32: 8}  # of a token -> of a group
# At the tokenizer's own weights the codes of four bits are left unread: the commitment holds the
# features where their signs are before the decoder has learnt to look at them.
SMALL = {
    "image_size": 32, "channels": (24, 32, 48), "pixel_l2": 10.0, "entropy": 0.1,
    "commitment": 0.02,
}  # fmt: skip
BATCH, RATE = 32, 3e-3
TOY_BITS, TOY_CONDITIONS, TOY_DRAWS = 8, 4, 16_384


@functools.cache
def scenes(num: int, *, held_out: bool = False) -> lab.Scenes:
    """Rendered once."""
    return lab.scenes(num, seed=0, held_out=held_out)


def train(num_bits: int, *, seed: int, steps: int) -> dict[str, Any]:
    """Numbers of one tokenizer, plain."""
    seen, held_out = scenes(NUM_TRAIN), scenes(NUM_HELD_OUT, held_out=True)
    torch.manual_seed(seed)
    args = {**SMALL, "num_bits": num_bits, "group_bits": BITS[num_bits]}
    tokenizer = make_tokenizer("bitdance", args)
    training = TokenizerTraining(tokenizer)
    lab.fit(training, seen.images, steps=steps, seed=seed, batch_size=BATCH, lr=RATE)
    tokens = bit_lab.encode(tokenizer, held_out.images)
    assert tokens.ids is not None
    with torch.no_grad():
        back = tokenizer.tokens_from_ids(tokens.ids)
        same_image = all(
            torch.equal(tokenizer.decode(back.select(part)), tokenizer.decode(tokens.select(part)))
            for part in torch.arange(len(tokens)).split(bit_lab.BATCH)
        )
    mse = bit_lab.errors(tokenizer, held_out.images, tokens)
    return {
        "mse": mse.tolist(), "psnr": bit_lab.psnr(mse), "bits_per_image": tokenizer.bits,
        "wrong_embeddings": int((back.embeddings != tokens.embeddings).sum()),
        "embeddings": tokens.embeddings.numel(), "same_image": same_image,
        **bit_lab.bit_statistics(tokens),
    }  # fmt: skip


@dataclass(frozen=True)
class Law:
    """Probabilities [C, 2^D] of corners [2^D, D]: coupled bits of one parity for each condition."""

    corners: Tensor
    probability: Tensor

    @classmethod
    def make(cls) -> Law:
        """The same one always."""
        generator = torch.Generator().manual_seed(0)
        corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=TOY_BITS)))
        field = 0.3 * torch.randn(TOY_CONDITIONS, TOY_BITS, generator=generator)
        coupling = torch.randn(TOY_CONDITIONS, TOY_BITS, TOY_BITS, generator=generator)
        pairs = torch.einsum("ki,cij,kj->ck", corners, 0.3 * coupling, corners)
        parity = corners.prod(-1) * torch.tensor([1.0, -1.0]).repeat(TOY_CONDITIONS // 2)[:, None]
        score = (corners @ field.T).T + pairs
        return cls(corners, torch.softmax(score.masked_fill(parity < 0, -torch.inf), -1))

    @property
    def independent(self) -> Tensor:
        """The law of independent bits with the same marginals, [C, 2^D]."""
        marginal = self.probability @ (self.corners > 0).float()
        right = torch.where(self.corners > 0, marginal[:, None], 1 - marginal[:, None])
        return right.prod(-1)

    def distance(self, other: Tensor) -> float:
        """Total variation, a mean over conditions."""
        return float((self.probability - other).abs().sum(-1).mean() / 2)

    def right_parity(self, other: Tensor) -> float:
        """Share of another law's mass on the parity that the condition tells."""
        return float((other * (self.probability > 0)).sum(-1).mean())


def train_head(*, seed: int, steps: int) -> dict[str, Any]:
    """A head of 3 blocks of 128, judged by the frequencies of what it draws."""
    law = Law.make()
    torch.manual_seed(seed)
    head = BitHead(TOY_BITS, TOY_CONDITIONS, dim=128, depth=3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    one_hot = torch.eye(TOY_CONDITIONS)
    for _ in range(steps):
        condition = torch.randint(TOY_CONDITIONS, (256,), generator=generator)
        chosen = torch.multinomial(law.probability[condition], 1, generator=generator)[:, 0]
        values = head.loss(law.corners[chosen], one_hot[condition], generator=generator)
        optimizer.zero_grad()
        values.mean().backward()
        optimizer.step()
        schedule.step()
    condition = torch.arange(TOY_CONDITIONS).repeat_interleave(TOY_DRAWS)
    found = {}
    for num_steps in (5, 10, 20, 50):
        bits = head.sample(one_hot[condition], num_steps=num_steps, generator=generator)
        place = 2 ** torch.arange(TOY_BITS - 1, -1, -1)
        number = ((bits > 0).long() * place).sum(-1) + condition * 2**TOY_BITS
        count = torch.bincount(number, minlength=TOY_CONDITIONS * 2**TOY_BITS)
        drawn = count.view(TOY_CONDITIONS, -1) / TOY_DRAWS
        found[str(num_steps)] = {"tv": law.distance(drawn), "parity": law.right_parity(drawn)}
    exact = torch.multinomial(law.probability, TOY_DRAWS, replacement=True, generator=generator)
    count = torch.stack([torch.bincount(row, minlength=2**TOY_BITS) for row in exact])
    return {
        "head": found,
        "independent": {"tv": law.distance(law.independent),
                        "parity": law.right_parity(law.independent)},
        "tv_floor": law.distance(count / TOY_DRAWS),
    }  # fmt: skip


def claims(
    runs: Mapping[int, Sequence[Mapping[str, Any]]], heads: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each claim with what it rests on; those whose parts were run."""
    found: list[dict[str, Any]] = []
    if runs:
        wrong = {bits: [run["wrong_embeddings"] for run in each] for bits, each in runs.items()}
        exact = all(run["wrong_embeddings"] == 0 and run["same_image"]
                    for each in runs.values() for run in each)  # fmt: skip
        found.append({
            "claim": "grouped ids give the same embeddings and the same image, bit by bit",
            "shows": exact, "numbers": {"wrong_embeddings": wrong},
        })  # fmt: skip
        gains = {}
        for fewer, more in itertools.pairwise(runs):
            rows = [
                10 * (torch.tensor(a["mse"]).log10() - torch.tensor(b["mse"]).log10())
                for a, b in zip(runs[fewer], runs[more], strict=True)
            ]
            values = torch.stack(rows).mean(0)  # over seeds; images are the sample
            low, high = lab.confidence(values)
            gains[f"{fewer} to {more}"] = {
                "mean": float(values.mean()), "low": low, "high": high,
                "by_seed": [float(row.mean()) for row in rows],
            }  # fmt: skip
        found.append({
            "claim": "PSNR rises with every doubling of the bits of a token (dB, paired by image)",
            "shows": all(gain["low"] > 0 and min(gain["by_seed"]) > 0 for gain in gains.values()),
            "numbers": gains,
        })  # fmt: skip
        dead = {bits: [run["dead_bits"] for run in each] for bits, each in runs.items()}
        found.append({
            "claim": "no bit is constant: means within (.01, .99)",
            "shows": not any(itertools.chain(*dead.values())), "numbers": dead,
        })  # fmt: skip
    if heads:
        twenty = [run["head"]["20"] for run in heads]
        bernoulli = heads[0]["independent"]
        found.append({
            "claim": "the head's law is nearer than that of independent bits of exact marginals",
            "shows": max(run["tv"] for run in twenty) < 0.5 * bernoulli["tv"]
            and min(run["parity"] for run in twenty) > bernoulli["parity"] + 0.25,
            "numbers": {"steps_20": twenty, "independent": bernoulli,
                        "floor": [run["tv_floor"] for run in heads]},
        })  # fmt: skip
    return found


def main() -> None:
    """Runs the parts, prints the table and writes docs/tokenizers/bitdance.json."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--parts", nargs="+", choices=("bits", "head"), default=["bits", "head"])
    own.add_argument("--head-steps", type=int, default=3000)
    own.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    chosen, rest = own.parse_known_args()
    sys.argv[1:] = rest
    about = "BitDance's claims; --parts bits head, --bits 4 8 16 32, --head-steps 3000"
    args = lab.arguments(about, steps=400)
    runs = {
        bits: [
            lab.once("bitdance", {"bits": [bits, BITS[bits], SMALL], "seed": seed,
                                  "steps": args.steps},
                     lambda bits=bits, seed=seed: train(bits, seed=seed, steps=args.steps))
            for seed in args.seeds
        ]
        for bits in (chosen.bits if "bits" in chosen.parts else ())
    }  # fmt: skip
    heads = [
        lab.once("bitdance", {"head": chosen.head_steps, "seed": seed},
                 lambda seed=seed: train_head(seed=seed, steps=chosen.head_steps))
        for seed in (args.seeds if "head" in chosen.parts else ())
    ]  # fmt: skip
    columns = ("psnr", "bits_per_image", "bit_entropy_mean", "abs_feature")
    table: dict[str, Any] = {
        str(bits): {key: lab.spread([run[key] for run in each]) for key in columns}
        for bits, each in runs.items()
    }
    for number, run in zip(args.seeds, heads, strict=False):
        table[f"head, seed {number}"] = run
    for name, row in table.items():
        print(f"{name:10}", "  ".join(f"{key} {value}" for key, value in row.items()))
    shown = claims(runs, heads)
    for claim in shown:
        print("shows    " if claim["shows"] else "SHOWS NOT", claim["claim"], claim["numbers"])
    lab.write_result("bitdance", {"seeds": args.seeds, "steps": args.steps,
                                  "head_steps": chosen.head_steps, "sizes": SMALL,
                                  "table": table, "claims": shown})  # fmt: skip


if __name__ == "__main__":
    main()
