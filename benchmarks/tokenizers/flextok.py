"""FlexTok's claims: ordered prefixes, what nested dropout is for, and tokens by complexity.

`python benchmarks/tokenizers/flextok.py [--seeds 0 1 2]`: for every seed a FlexTok with nested
dropout and one without, on 32 x 32 pixels, and their errors on the same held-out images and noise
at every prefix. About three minutes per training on one core. What the first token says of a scene,
against the last, is asked of the FlexTok that comes with flowrl.
"""

from __future__ import annotations

from typing import Any

import torch
from lab import Scenes, arguments, confidence, fit, once, scenes, spread, write_result
from probes import linear_probe
from torch import Tensor

from tokenizers_vis.addons.dropout import TokenDropout
from tokenizers_vis.registry import load_pretrained, make_tokenizer
from tokenizers_vis.tokenizer import Solver
from tokenizers_vis.training import TokenizerTraining

NUMBERS: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "num_registers": 8, "levels": (8, 5, 5, 5), "dim": 96,
    "num_heads": 3, "encoder_depth": 2, "decoder_depth": 3, "null_rate": 0.0, "min_sigma": 0.1,
    "compare": "clean", "sigma_mean": 1.0,
}  # fmt: skip
PREFIXES = (1, 2, 4, 8)
NUM_TRAIN, NUM_HELD_OUT, SOLVER = 20_000, 384, Solver(10)
ENOUGH = 1.1  # times the error with all tokens is close to it


def main() -> None:
    """Trains, compares, prints and writes."""
    args = arguments(__doc__ or "", steps=1800)
    train, held = scenes(NUM_TRAIN, seed=0), scenes(NUM_HELD_OUT, seed=1, held_out=True)
    runs: dict[str, list[dict[str, Any]]] = {"nested": [], "fixed": []}
    for seed in args.seeds:
        for arm, found in runs.items():
            key = {"arm": arm, "seed": seed, "steps": args.steps, **NUMBERS}
            found.append(once("flextok", key, lambda: measure(train, held, arm, seed, args.steps)))  # noqa: B023
    errors = {arm: torch.tensor([r["errors"] for r in found]) for arm, found in runs.items()}
    print(f"{'tokens':>8}" + "".join(f"{arm:>24}" for arm in errors))
    for i, count in enumerate(PREFIXES):
        each = [spread(errors[arm][:, i].mean(1).tolist()) for arm in errors]
        print(f"{count:8}" + "".join(f"{text:>24}" for text in each))
    claims = [*falls(errors["nested"]), control(errors), *complexity(errors["nested"], held)]
    claims += first_and_last()
    for claim in claims:
        print("shows  " if claim["shows"] else "DOES NOT SHOW  ", claim["claim"], claim["numbers"])
    curves = {arm: errors[arm].mean(2).tolist() for arm in errors}
    usage = {arm: [r["usage"] for r in found] for arm, found in runs.items()}
    write_result("flextok", {
        "command": "python benchmarks/tokenizers/flextok.py", "seeds": args.seeds,
        "steps": args.steps, "prefixes": PREFIXES, "mean_squared_error": curves, "usage": usage,
        "claims": claims,
    })  # fmt: skip


def measure(train: Scenes, held: Scenes, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains one arm; squared error of every held-out image at every prefix."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer("flextok", NUMBERS)
    dropout = TokenDropout("pow2") if arm == "nested" else None
    print(f"{arm}, seed {seed}")
    training = TokenizerTraining(tokenizer, dropout=dropout)
    fit(training, train.images, steps=steps, seed=seed, lr=3e-3)
    errors = []
    with torch.no_grad():
        tokens = tokenizer.encode(held.images)
        for count in PREFIXES:
            drawn = tokenizer.decode(tokens.keep(count), solver=SOLVER)
            errors.append((drawn - held.images).square().mean((1, 2, 3)).tolist())
    assert tokens.ids is not None
    return {"errors": errors, "usage": tokenizer.usage(tokens.ids)}


def falls(errors: Tensor) -> list[dict[str, Any]]:
    """Of errors [seeds, prefixes, images]: does every doubling help, image by image?"""
    claims = []
    for i, count in enumerate(PREFIXES[:-1]):
        gain = (errors[:, i] - errors[:, i + 1]).mean(0)
        low, high = confidence(gain)
        every = bool(((errors[:, i] - errors[:, i + 1]).mean(1) > 0).all())
        claims.append({
            "claim": f"the error falls from {count} to {PREFIXES[i + 1]} tokens",
            "shows": low > 0 and every,
            "numbers": f"by {gain.mean():.5f}, 95 % interval {low:.5f} to {high:.5f}; "
            f"in {'every seed' if every else 'not every seed'}",
        })  # fmt: skip
    return claims


def control(errors: dict[str, Tensor]) -> dict[str, Any]:
    """Is the prefix of a model without nested dropout clearly worse at the shortest prefixes?"""
    ratios = []
    for i in range(2):
        mean = {arm: errors[arm][:, i].mean() for arm in errors}
        ratios.append(float(mean["fixed"] / mean["nested"]))
    full = float(errors["fixed"][:, -1].mean() / errors["nested"][:, -1].mean())
    return {
        "claim": "without nested dropout short prefixes are clearly worse",
        "shows": min(ratios) > 1.2,
        "numbers": f"error over that with it: {ratios[0]:.2f} at 1 token, {ratios[1]:.2f} at 2, "
        f"{full:.2f} with all",
    }


def first_and_last() -> list[dict[str, Any]]:
    """Does the first token say more of a scene than the last one? By linear probes of each."""
    found = []
    for label in ("shape", "color", "num_objects"):
        hits = once("flextok", {"probe": label, "of": "shapes_flextok"}, lambda: probe(label))  # noqa: B023
        gain = torch.tensor(hits["first"]).float() - torch.tensor(hits["last"]).float()
        low, high = confidence(gain)
        found.append({
            "claim": f"the first token says more of the scene than the last one: {label}",
            "shows": low > 0,
            "numbers": f"accuracy {sum(hits['first']) / len(gain):.3f} against "
            f"{sum(hits['last']) / len(gain):.3f}, 95 % interval of the difference {low:+.3f} to "
            f"{high:+.3f}",
        })  # fmt: skip
    return found


@torch.no_grad()
def probe(label: str) -> dict[str, list[bool]]:
    """Whether a probe of the first and of the last token is right, by held-out scene."""
    tokenizer = load_pretrained("shapes_flextok")
    seen, asked = scenes(2000, seed=2, size=64), scenes(1024, seed=3, size=64, held_out=True)
    known, found = (
        torch.cat([tokenizer.encode(part).embeddings for part in each.images.split(128)])
        for each in (seen, asked)
    )
    hits = {}
    for name, place in (("first", 0), ("last", -1)):
        with torch.enable_grad():
            right = linear_probe(
                known[:, place], getattr(seen, label), found[:, place], getattr(asked, label)
            )
        hits[name] = right.tolist()
    return hits


def complexity(errors: Tensor, held: Scenes) -> list[dict[str, Any]]:
    """Do scenes of more objects need more tokens?

    Asked twice of errors [seeds, prefixes, images]: for one quality, the median error of all images
    with all tokens (an image that never gets there counts as twice all tokens), and for a quality
    of the image's own, within `ENOUGH` of its error with all tokens.
    """
    counts = torch.tensor([*PREFIXES, 2 * PREFIXES[-1]], dtype=torch.float)
    limit = float(errors[:, -1].median())
    found = []
    for what, good in (
        (f"for an error of {limit:.4f}, the median with all", errors <= limit),
        ("to come close to their own error with all", errors <= ENOUGH * errors[:, -1:]),
    ):
        reached = torch.cat([good, torch.ones_like(good[:, :1])], 1)
        needed = counts[reached.float().argmax(1)].mean(0)
        groups = {int(n): needed[held.num_objects == n] for n in held.num_objects.unique()}
        few, many = groups[min(groups)], groups[max(groups)]
        low, high = _gaps(few, many)
        text = ", ".join(f"{n}: {values.mean():.2f}" for n, values in groups.items())
        found.append({
            "claim": f"scenes of more objects need more tokens {what}",
            "shows": low > 0,
            "numbers": f"mean tokens by objects {text}; most against fewest "
            f"{float(many.mean() - few.mean()):+.2f}, 95 % interval {low:+.2f} to {high:+.2f}",
        })  # fmt: skip
    return found


def _gaps(few: Tensor, many: Tensor) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    means = [
        values[torch.randint(len(values), (2000, len(values)), generator=generator)].mean(1)
        for values in (few, many)
    ]
    gaps = means[1] - means[0]
    return float(gaps.quantile(0.025)), float(gaps.quantile(0.975))


if __name__ == "__main__":
    main()
