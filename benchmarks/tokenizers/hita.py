"""Hita: do the slots carry what is global, and are exactly the predicted tokens dead?

    python benchmarks/tokenizers/hita.py [--seeds 0 1 2] [--steps 800]

The same tokenizer is trained with shift 1 (as the paper does it) and with shift 0 (its control:
every patch has its own token). Slots, or as many patches, of held-out images are then replaced by
those of another image, and a linear probe looks for the largest object's colour and shape. A causal
transformer, trained from scratch on frozen ids, says how many bits the patches have left when their
slots are known.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from lab import Scenes, arguments, claim, confidence, fit, once, scenes, spread, write_result
from larp import Probe
from probes import linear_probe
from torch import Tensor

from tokenizers_vis.hita import Hita, HitaConfig
from tokenizers_vis.tokens import Tokens
from tokenizers_vis.training import TokenizerTraining

BASE = HitaConfig(
    image_size=32, channels=(16, 32, 64), num_slots=4, shift=1, slot_vocab=128, patch_vocab=128,
    dim=8, width=64, num_heads=4, full_depth=2, causal_depth=2, fusion_depth=2, pixel_l2=10.0,
)  # fmt: skip
TRAIN, HELD_OUT, BATCH, PROBE_STEPS = 4000, 512, 48, 500
LABELS = ("color", "shape")


@torch.no_grad()
def measure(tokenizer: Hita, train: Scenes, held_out: Scenes, *, seed: int) -> dict[str, Any]:
    """Errors of held-out images with parts exchanged, dead positions, usage, probes."""
    images = held_out.images
    tokens = tokenizer.encode(images)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randperm(len(images), generator=generator).roll(1)
    num_slots = tokenizer.config.num_slots
    total = tokenizer.layout.num_tokens
    dead = tokenizer.dead_tokens
    live = torch.arange(num_slots, total - BASE.shift)  # the same patches whatever the shift
    some = live[torch.randperm(len(live), generator=generator)[:num_slots]]
    slots = torch.arange(num_slots)
    plain = errors(tokenizer, tokens, images)
    found = {
        "mse": float(plain.mean()),
        "slots_exchanged": float(errors(tokenizer, exchanged(tokens, slots, other), images).mean()),
        "patches_exchanged": float(
            errors(tokenizer, exchanged(tokens, some, other), images).mean()
        ),
        "changed_by": changed_by(tokenizer, tokens),
        "dead": [dead.start, dead.stop],
        "usage": tokenizer.usage(tokens.ids),
    }
    features = tokenizer.encode(train.images).embeddings
    for label in LABELS:
        targets = getattr(train, label), getattr(held_out, label)
        for name, part in (("slots", slots), ("patches", some)):
            hits = linear_probe(
                features[:, part].flatten(1), targets[0],
                tokens.embeddings[:, part].flatten(1), targets[1],
            )  # fmt: skip
            found[f"{label}_from_{name}"] = float(hits.float().mean())
    known = tokenizer.encode(train.images).ids
    found["bits_given_slots"] = patch_bits(known, tokens.ids, num_slots, seed=seed)
    found["bits_alone"] = patch_bits(known[:, num_slots:], tokens.ids[:, num_slots:], 0, seed=seed)
    return found


@torch.enable_grad()
def patch_bits(known: Tensor, ids: Tensor, num_slots: int, *, seed: int) -> list[float]:
    """Bits of the patches of every image by a causal probe that reads the slots before them.

    Args:
        known: int64 [N, L], what the probe is trained on; its first `num_slots` are slots.
        ids: int64 [M, L], what it is measured on.
        num_slots: 0 = patches alone.
        seed: of its weights and batches.
    """
    shift = BASE.slot_vocab * (torch.arange(ids.shape[1]) >= num_slots) * (num_slots > 0)
    vocab = BASE.patch_vocab + (BASE.slot_vocab if num_slots else 0)
    torch.manual_seed(seed)
    model = Probe(vocab, ids.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=PROBE_STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PROBE_STEPS):
        chosen = torch.randint(len(known), (128,), generator=generator)
        loss = model(known[chosen] + shift)[:, num_slots:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model(ids + shift)[:, num_slots:].sum(1).tolist()  # type: ignore[no-any-return]


def exchanged(tokens: Tokens, positions: Tensor, other: Tensor) -> Tokens:
    """With the tokens at some positions taken from other images, int64 [B]."""
    embeddings = tokens.embeddings.clone()
    embeddings[:, positions] = tokens.embeddings[other][:, positions]
    return replace(tokens, embeddings=embeddings)


def errors(tokenizer: Hita, tokens: Tokens, images: Tensor) -> Tensor:
    """Squared errors [B]."""
    return (tokenizer.decode(tokens) - images).square().flatten(1).mean(1)


def changed_by(tokenizer: Hita, tokens: Tokens) -> list[int]:
    """The positions whose token, turned around, changes any of 16 decoded images at all."""
    few = tokens.select(torch.arange(16))
    drawn = tokenizer.decode(few)
    found = []
    for position in range(tokenizer.layout.num_tokens):
        embeddings = few.embeddings.clone()
        embeddings[:, position] *= -1
        if not torch.equal(tokenizer.decode(replace(few, embeddings=embeddings)), drawn):
            found.append(position)
    return found


def trained(shift: int, *, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training and what was measured of it; kept."""
    config = replace(BASE, shift=shift)
    key = {
        "config": asdict(config),
        "seed": seed,
        "steps": args.steps,
        "train": TRAIN,
        "b": BATCH,
        "probe": PROBE_STEPS,
    }

    def run() -> dict[str, Any]:
        print(f"shift {shift}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        tokenizer = Hita(config)
        train = scenes(TRAIN, seed=seed)
        training = TokenizerTraining(tokenizer)
        fit(training, train.images, steps=args.steps, seed=seed, batch_size=BATCH, lr=2e-3)
        held_out = scenes(HELD_OUT, seed=1000 + seed, held_out=True)
        return measure(tokenizer, train, held_out, seed=seed)

    return once("hita", key, run)


def claims(shifted: list[dict[str, Any]], plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sentences, and whether the numbers of all seeds show them."""
    total = Hita(BASE).layout.num_tokens
    factor = [each["slots_exchanged"] / each["mse"] for each in shifted]
    control = [each["slots_exchanged"] / each["mse"] for each in plain]
    against = [each["slots_exchanged"] / each["patches_exchanged"] for each in shifted]
    dead_right = all(
        each["changed_by"] == list(range(total - shift))
        for runs, shift in ((shifted, BASE.shift), (plain, 0))
        for each in runs
    )
    gaps = {
        label: [each[f"{label}_from_slots"] - each[f"{label}_from_patches"] for each in shifted]
        for label in LABELS
    }
    used = [each["usage"]["slot/used"] for each in shifted]
    fewer = [np.subtract(each["bits_alone"], each["bits_given_slots"]) for each in shifted]
    told = {"bits_per_image": [float(each.mean()) for each in fewer],
            "interval": confidence(np.mean(fewer, 0).tolist())}  # fmt: skip
    ablation = np.log(np.array(factor) / np.array(control))
    return [
        claim("another image's slots raise the error at least twofold", min(factor) >= 2,
              factor=factor),
        claim("slots matter more with the shift than without it", confidence(ablation)[0] > 0,
              factor_without_shift=control, log_ratio_interval=confidence(ablation)),
        claim("exchanging the slots hurts more than exchanging as many patches", min(against) > 1,
              ratio=against),
        claim("exactly the last `shift` tokens change no pixel", dead_right,
              changed_by=[each["changed_by"][-1] for each in shifted + plain]),
        claim("the slots' table is used: over half of its codes", min(used) > 0.5, used=used),
        claim("patches have fewer bits left when their slots are known",
              told["interval"][0] > 0 and min(told["bits_per_image"]) > 0, fewer=told),
        *(
            claim(f"slots tell the {label} better than as many patches",
                  confidence(gap)[0] > 0, gap=gap, interval=confidence(gap))
            for label, gap in gaps.items()
        ),
    ]  # fmt: skip


def main() -> None:
    """Trains, prints the table, writes docs/tokenizers/hita.json."""
    args = arguments(__doc__ or "", steps=800)
    shifted = [trained(BASE.shift, seed=seed, args=args) for seed in args.seeds]
    plain = [trained(0, seed=seed, args=args) for seed in args.seeds]
    rows = ["mse", "slots_exchanged", "patches_exchanged"]
    rows += [f"{label}_from_{part}" for label in LABELS for part in ("slots", "patches")]
    print(f"{'':20} {'shift 1':>22} {'shift 0':>22}")
    for row in rows:
        both = [spread([each[row] for each in runs]) for runs in (shifted, plain)]
        print(f"{row:20} {both[0]:>22} {both[1]:>22}")
    found = claims(shifted, plain)
    for each in found:
        print("shows" if each["shows"] else "DOES NOT SHOW", "-", each["claim"], each["numbers"])
    short = [
        [{k: v for k, v in run.items() if not k.startswith("bits_")} for run in runs]
        for runs in (shifted, plain)
    ]
    write_result("hita", {"config": asdict(BASE), "seeds": args.seeds, "steps": args.steps,
                          "shifted": short[0], "unshifted": short[1], "claims": found})  # fmt: skip


if __name__ == "__main__":
    main()
