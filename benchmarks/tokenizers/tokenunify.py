"""TokenUnify: does the mixture's free-running error grow more slowly than next-token's alone?

    python benchmarks/tokenizers/tokenunify.py [--seeds 0 1 2] [--steps 800]

The same transformer is trained with the mixture, with the next token alone, and with hidden patches
alone (a masked autoencoder), with the same steps. Held-out images are then continued from their
first rows: each patch from true ones (teacher-forced) and from the model's own. Features of whole
images are probed for what is in the scene.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from lab import Scenes, arguments, claim, confidence, fit, once, scenes, spread, write_result
from numpy.typing import NDArray
from probes import linear_probe

from tokenizers_vis.tokenunify import TokenUnify, TokenUnifyConfig

BASE = TokenUnifyConfig(image_size=32, patch_size=4, width=64, num_heads=4, depth=3, num_prefixes=4)
KINDS = {
    "mixture": BASE,
    "next": replace(BASE, random_weight=0.0, all_weight=0.0),
    "hidden": replace(BASE, next_weight=0.0, all_weight=0.0),
}
GIVEN = 24  # of 64 patches: the first three of eight rows
FREE = ("forced", "free")
LABELS = ("color", "shape", "num_objects")
TRAIN, HELD_OUT, BATCH = 4000, 512, 32


@torch.no_grad()
def continued(model: TokenUnify, held_out: Scenes) -> dict[str, list[list[float]]]:
    """Errors [images, steps] of the patches behind the given ones, of predictions it learnt."""
    patches = model.patches(held_out.images)
    given = patches[:, :GIVEN]
    states = model.states(patches)
    found = {}
    if model.config.next_weight:
        found = {"forced": model.predict_next(patches), "free": model.roll_out(given)}
    if model.config.all_weight:
        found["at_once"] = model.predict_all(states[:, GIVEN : GIVEN + 1])[:, 0]
    errors = {name: (each - patches).square().mean(-1)[:, GIVEN:] for name, each in found.items()}
    return {name: each.tolist() for name, each in errors.items()}


def probed(model: TokenUnify, train: Scenes, held_out: Scenes) -> dict[str, float]:
    """Accuracy of a linear probe for every label."""
    with torch.no_grad():
        features = model.features(train.images), model.features(held_out.images)
    found = {}
    for label in LABELS:
        hits = linear_probe(
            features[0], getattr(train, label), features[1], getattr(held_out, label)
        )
        found[label] = float(hits.float().mean())
    return found


def trained(kind: str, *, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training and what was measured of it; kept."""
    key = {"config": asdict(KINDS[kind]), "seed": seed, "steps": args.steps, "train": TRAIN,
           "held_out": HELD_OUT, "batch": BATCH, "given": GIVEN}  # fmt: skip

    def run() -> dict[str, Any]:
        print(f"{kind}, seed {seed}", flush=True)
        torch.manual_seed(seed)
        model = TokenUnify(KINDS[kind])
        train = scenes(TRAIN, seed=seed)
        fit(model, train.images, steps=args.steps, seed=seed, batch_size=BATCH, lr=2e-3)  # type: ignore[arg-type]
        held_out = scenes(HELD_OUT, seed=1000 + seed, held_out=True)
        return {"errors": continued(model, held_out), "probe": probed(model, train, held_out)}

    return once("tokenunify", key, run)


def growth(errors: dict[str, NDArray[np.float64]]) -> float:
    """Slope of free-running over teacher-forced error, per step behind the given patches.

    Both are averaged over images; a ratio of 1 everywhere, slope 0, is no accumulation.
    """
    ratio = errors["free"].mean(0) / errors["forced"].mean(0)
    return float(np.polyfit(np.arange(len(ratio)), ratio, 1)[0])


def summary(run: dict[str, Any]) -> dict[str, float]:
    """Numbers of one training, of what it learnt."""
    errors = {name: np.array(each) for name, each in run["errors"].items()}
    found = {name: float(each.mean()) for name, each in errors.items()}
    if "free" in errors:
        half = errors["free"].shape[1] // 2
        found |= {f"{name}_late": float(errors[name][:, half:].mean()) for name in FREE}
        found["growth"] = growth(errors)
    return {**found, "probe": float(np.mean(list(run["probe"].values())))}


def slower(
    mixture: list[dict[str, Any]], alone: list[dict[str, Any]], *, num: int = 500
) -> tuple[list[float], tuple[float, float]]:
    """Slope of next-token alone minus the mixture's: every seed's, and the mean's interval.

    The interval resamples seeds and images, the same for both models.
    """
    rng = np.random.default_rng(0)
    pairs = [
        [{name: np.array(run["errors"][name]) for name in FREE} for run in pair]
        for pair in zip(mixture, alone, strict=True)
    ]

    def difference(pair: list[dict[str, NDArray[np.float64]]], rows: Any) -> float:
        first, second = ({name: each[rows] for name, each in run.items()} for run in pair)
        return growth(second) - growth(first)

    each = [difference(pair, slice(None)) for pair in pairs]
    means = []
    for _ in range(num):
        drawn = rng.integers(len(pairs), size=len(pairs))
        rows = rng.integers(HELD_OUT, size=HELD_OUT)
        means.append(np.mean([difference(pairs[seed], rows) for seed in drawn]))
    return each, (float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975)))


def claims(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The sentences, and whether the numbers show them."""
    each, interval = slower(runs["mixture"], runs["next"])
    parts = {kind: [summary(run) for run in every] for kind, every in runs.items()}

    def gap(key: str, kind: str, other: str, other_key: str = "") -> list[float]:
        pairs = zip(parts[kind], parts[other], strict=True)
        return [second[other_key or key] - first[key] for first, second in pairs]

    late = gap("free_late", "mixture", "next")
    direct = gap("at_once", "mixture", "mixture", "free")
    probe = gap("probe", "hidden", "mixture")
    forced = gap("forced", "mixture", "next")
    return [
        claim("the mixture's roll-out error, over its teacher-forced one, grows more slowly than "
              "that of the next token alone", interval[0] > 0,
              slope_mixture=[one["growth"] for one in parts["mixture"]],
              slope_next=[one["growth"] for one in parts["next"]],
              difference=each, interval=interval),
        claim("its roll-out error itself is lower, in the later half", confidence(late)[0] > 0,
              difference=late, interval=confidence(late)),
        claim("predicting all that remains at once is better than rolling out",
              confidence(direct)[0] > 0, difference=direct, interval=confidence(direct)),
        claim("teacher-forced it is as good as the next token alone, within 5 %",
              min(forced) > -0.05 * np.mean([one["forced"] for one in parts["next"]]),
              difference=forced),
        claim("a probe finds more in the mixture's features than in those of hidden patches alone",
              confidence(probe)[0] > 0, difference=probe, interval=confidence(probe)),
    ]  # fmt: skip


def main() -> None:
    """Trains, prints the table, writes docs/tokenizers/tokenunify.json."""
    args = arguments(__doc__ or "", steps=800)
    runs = {kind: [trained(kind, seed=seed, args=args) for seed in args.seeds] for kind in KINDS}
    parts = {kind: [summary(run) for run in every] for kind, every in runs.items()}
    print(f"{'':14}" + "".join(f"{kind:>24}" for kind in KINDS))
    for row in parts["mixture"][0]:
        cells = [
            spread([one[row] for one in each]) if row in each[0] else "-" for each in parts.values()
        ]
        print(f"{row:14}" + "".join(f"{cell:>24}" for cell in cells))
    found = claims(runs)
    for each in found:
        print("shows" if each["shows"] else "DOES NOT SHOW", "-", each["claim"], each["numbers"])
    write_result("tokenunify", {"config": asdict(BASE), "seeds": args.seeds, "steps": args.steps,
                                "given": GIVEN, "runs": parts, "claims": found})  # fmt: skip


if __name__ == "__main__":
    main()
