"""UniWeTok's claims: bits that all live, no conflict, a teacher that helps, bits easy to predict.

    python benchmarks/tokenizers/uniwetok.py [--seeds 0 1 2] [--steps 400] [--arms ...]

Paper: UniWeTok, arXiv:2602.14178. Everything is measured on scenes of combinations that training
never shows. The teacher is a small network that was trained here on the scenes' labels (the shape
and the colour of the largest object), so distillation brings in labels; the paper's teacher is not
published. The predictor that judges the prior is trained from scratch on frozen tokens.
Reading order: `ARMS`, `train`, `claims`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import bit_lab
import lab
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.addons.bit_prior import BitPrior
from tokenizers_vis.addons.distill import Distill
from tokenizers_vis.convs import ConvEncoder
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.training import TokenizerTraining

NUM_TRAIN, NUM_HELD_OUT = 4096, 1024
TEACHER_STEPS, PREDICTOR_STEPS = 400, 400
SMALL = {
    "image_size": 32, "channels": (24, 32, 48), "attention_depth": 1, "num_registers": 2,
    "num_bits": 16, "group_bits": 8, "pixel_l2": 10.0, "entropy": 0.1,
}  # fmt: skip
# name -> what differs from SMALL, and the add-ons' arguments
ARMS: dict[str, tuple[dict[str, Any], dict[str, dict[str, float]]]] = {
    "plain": ({}, {}),
    "committed": ({"commitment": 0.1}, {}),
    "unbounded": ({"bound": "none", "commitment": 0.1}, {}),
    "distilled": ({}, {"distill": {"pre": 0.1, "post": 0.1}}),
    "pre only": ({}, {"distill": {"pre": 0.2, "post": 0.0}}),
    "post only": ({}, {"distill": {"pre": 0.0, "post": 0.2}}),
    "prior": ({}, {"bit_prior": {"weight": 0.01}}),
}


@functools.cache
def scenes(num: int, *, size: int = 32, held_out: bool = False) -> lab.Scenes:
    """Rendered once."""
    return lab.scenes(num, seed=0, size=size, held_out=held_out)


class Teacher(nn.Module):
    """Features [B, 16, 64] of a small convolutional network with two classifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = ConvEncoder(3, (16, 32, 64))
        self.shape, self.color = nn.LazyLinear(16), nn.LazyLinear(16)

    def forward(self, images: Tensor) -> Tensor:
        return self.convs(images * 2 - 1).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


def make_teacher(seen: lab.Scenes, *, seed: int) -> Teacher:
    """Trained on labels, frozen."""
    torch.manual_seed(seed)
    teacher = Teacher()
    teacher.shape(torch.zeros(1, 64)), teacher.color(torch.zeros(1, 64))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(TEACHER_STEPS):
        chosen = torch.randint(len(seen.images), (64,), generator=generator)
        pooled = teacher(seen.images[chosen]).mean(1)
        loss = F.cross_entropy(teacher.shape(pooled), seen.shape[chosen])
        loss = loss + F.cross_entropy(teacher.color(pooled), seen.color[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def train(arm: str, *, seed: int, steps: int) -> dict[str, Any]:
    """Numbers of one training, plain."""
    args, addon_args = ARMS[arm]
    seen, held_out = scenes(NUM_TRAIN), scenes(NUM_HELD_OUT, held_out=True)
    addons: dict[str, AddOn] = {}
    if "distill" in addon_args:
        teacher = make_teacher(seen, seed=seed)
        addons["distill"] = Distill(teacher, **addon_args["distill"])
    if "bit_prior" in addon_args:
        addons["bit_prior"] = BitPrior(**addon_args["bit_prior"])
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("uniwetok", {**SMALL, **args})
    training = TokenizerTraining(tokenizer, addons=addons)
    lab.fit(training, seen.images, steps=steps, seed=seed, batch_size=32, lr=3e-3)
    known, tokens = (bit_lab.encode(tokenizer, each.images) for each in (seen, held_out))
    mse = bit_lab.errors(tokenizer, held_out.images, tokens)
    raw = bit_lab.raw_features(tokenizer, held_out.images)
    labels = {
        name: bit_lab.probe(known.embeddings.flatten(1), getattr(seen, name),
                            tokens.embeddings.flatten(1), getattr(held_out, name))
        for name in ("shape", "color")
    }  # fmt: skip
    larger = scenes(NUM_HELD_OUT, size=48, held_out=True).images
    larger_mse = bit_lab.errors(tokenizer, larger, bit_lab.encode(tokenizer, larger))
    predicted = None
    if arm in ("plain", "prior"):
        values = bit_lab.predictor_loss(known, tokens, steps=PREDICTOR_STEPS, seed=seed + 100)
        predicted = values.tolist()
    return {
        "mse": mse.tolist(), "psnr": bit_lab.psnr(mse), "psnr_48": bit_lab.psnr(larger_mse),
        **bit_lab.bit_statistics(tokens), "conflict": bit_lab.conflict(
            tokenizer.quantizer, raw),  # type: ignore[arg-type]
        "probe": labels, "predictor_loss": predicted,
    }  # fmt: skip


Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def differences(runs: Runs, first: str, second: str, read: Callable[[Any], Any]) -> dict[str, Any]:
    """Paired by image and seed: mean of first - second, with a 95 % interval over images."""
    rows = [
        torch.as_tensor(read(a), dtype=torch.float64)
        - torch.as_tensor(read(b), dtype=torch.float64)
        for a, b in zip(runs[first], runs[second], strict=True)
    ]
    values = torch.stack(rows).mean(0)  # over seeds; images are the sample
    low, high = lab.confidence(values)
    by_seed = [float(row.mean()) for row in rows]
    return {"mean": float(values.mean()), "low": low, "high": high, "by_seed": by_seed}


def claims(runs: Runs) -> list[dict[str, Any]]:
    """Each claim with what it rests on; those whose arms were run."""
    found: list[dict[str, Any]] = []

    def add(text: str, shows: bool, **numbers: Any) -> None:
        found.append({"claim": text, "shows": bool(shows), "numbers": numbers})

    def column(arm: str, key: str) -> list[float]:
        return [run[key] for run in runs[arm]]

    low, high = min(column("plain", "bit_mean_min")), max(column("plain", "bit_mean_max"))
    entropy, correlation = (
        column("plain", "bit_entropy_mean"),
        column("plain", "bit_correlation_max"),
    )
    add("no dead bits: every bit's mean in (.1, .9), mean entropy > .8", low > 0.1 and high < 0.9
        and min(entropy) > 0.8, mean_low=low, mean_high=high, entropy=entropy)  # fmt: skip
    add("no two bits of a token say the same: |correlation| < .5", max(correlation) < 0.5,
        correlation=correlation)  # fmt: skip
    sure = column("plain", "abs_feature")
    add("bits are sure without commitment: mean |feature| > .7", min(sure) > 0.7, abs_feature=sure)
    ratio = [run["psnr_48"] - run["psnr"] for run in runs["plain"]]
    add("48 pixels with the weights of 32: PSNR at most 1 dB lower", min(ratio) > -1,
        psnr_difference=ratio)  # fmt: skip
    if {"committed", "unbounded"} <= runs.keys():
        opposed = {
            arm: [run["conflict"] for run in runs[arm]] for arm in ("committed", "unbounded")
        }
        commitment = {arm: column(arm, "commitment") for arm in opposed}
        add("entropy and commitment never oppose each other with SigLu, and do without it",
            max(run["opposed"] for run in opposed["committed"]) == 0
            and min(run["opposed"] for run in opposed["unbounded"]) > 0.1,
            **opposed, commitment_error=commitment,
            psnr={arm: column(arm, "psnr") for arm in opposed})  # fmt: skip
    for arm in ("distilled", "pre only", "post only"):
        if arm not in runs:
            continue
        for label in ("shape", "color"):
            gain = differences(runs, arm, "plain", lambda run, label=label: run["probe"][label])
            add(f"a linear probe of the bits is better with a teacher ({arm}): {label}",
                gain["low"] > 0, accuracy_gain=gain, psnr=column(arm, "psnr"),
                psnr_plain=column("plain", "psnr"))  # fmt: skip
    if "prior" in runs:
        loss = differences(runs, "prior", "plain", lambda run: run["predictor_loss"])
        mse = differences(runs, "prior", "plain", lambda run: run["mse"])
        plain = torch.tensor([run["mse"] for run in runs["plain"]]).mean()
        share = mse["mean"] / float(plain)
        add("an independent predictor's loss is lower with the prior, at an error within 5 %",
            loss["high"] < 0 and share < 0.05, loss_difference=loss, error_difference_share=share,
            bit_entropy={arm: column(arm, "bit_entropy_mean")
                         for arm in ("plain", "prior")})  # fmt: skip
    return found


def arguments() -> argparse.Namespace:
    """`--arms` beside lab's; "plain" is always among them, as all are compared with it."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    chosen, rest = own.parse_known_args()
    sys.argv[1:] = rest
    args = lab.arguments(f"UniWeTok's claims; --arms of {', '.join(ARMS)}", steps=400)
    args.arms = list(dict.fromkeys(["plain", *chosen.arms]))
    return args


def main() -> None:
    """Runs the arms, prints the table and writes docs/tokenizers/uniwetok.json."""
    args = arguments()
    runs = {
        arm: [
            lab.once("uniwetok",
                     {"arm": [arm, ARMS[arm], SMALL], "seed": seed, "steps": args.steps},
                     lambda arm=arm, seed=seed: train(arm, seed=seed, steps=args.steps))
            for seed in args.seeds
        ]
        for arm in args.arms
    }  # fmt: skip
    columns = ("psnr", "psnr_48", "bit_entropy_mean", "bit_correlation_max", "abs_feature")
    table = {
        arm: {
            **{key: lab.spread([run[key] for run in found]) for key in columns},
            **{f"probe_{label}": lab.spread(
                [sum(run["probe"][label]) / len(run["probe"][label]) for run in found])
               for label in ("shape", "color")},
        }
        for arm, found in runs.items()
    }  # fmt: skip
    for arm, row in table.items():
        print(f"{arm:10}", "  ".join(f"{key} {value}" for key, value in row.items()))
    shown = claims(runs)
    for claim in shown:
        print("shows    " if claim["shows"] else "SHOWS NOT", claim["claim"], claim["numbers"])
    lab.write_result("uniwetok", {"seeds": args.seeds, "steps": args.steps, "sizes": SMALL,
                                  "table": table, "claims": shown})  # fmt: skip


if __name__ == "__main__":
    main()
