"""HieraTok: does every scale improve the image, and what do several scales give over one?

`python benchmarks/tokenizers/hieratok.py [--seeds 0 1 2] [--steps 1000]` trains, per seed, HieraTok
with scales 1, 2 and 4 and token dropout off, and two tokenizers of one scale with the same depth:
one with the same latent per token (fewer numbers in all: 16 tokens, not 21) and one with wider
tokens, of the same numbers in all (16 x 21 = 21 x 16). The single scales are reported beside it;
nothing says that they must be worse.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from lab import Scenes, arguments, confidence, fit, once, scenes, spread, write_result
from probes import linear_probe
from torch import Tensor

from tokenizers_vis.hieratok import HieraTok, HieraTokConfig
from tokenizers_vis.training import TokenizerTraining

SIZES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "scales": (1, 2, 4), "latent_dim": 16, "dim": 64,
    "num_heads": 4, "encoder_depth": 2, "scale_depth": 1, "decoder_depth": 2, "readout_depth": 1,
    "pixel_l2": 4.0,
}  # fmt: skip
SYSTEMS: dict[str, dict[str, Any]] = {
    "scales 1 2 4": {},
    "no auxiliary": {"auxiliary": 0.0},
    "one scale": {"scales": (4,)},
    "one scale, as many numbers": {"scales": (4,), "latent_dim": 21},
}
BATCH, NUM_TRAIN, NUM_PROBE, NUM_TEST = 32, 6000, 2000, 1024


@torch.no_grad()
def measure(tokenizer: HieraTok, probe: Scenes, test: Scenes) -> dict[str, Any]:
    """Errors of every prefix and probes of single tokens, per held-out image."""
    seen, unseen = tokenizer.encode(probe.images), tokenizer.encode(test.images)
    prefixes = {}
    for count in tokenizer.token_counts:
        drawn = tokenizer.decode(unseen.keep(count))
        prefixes[str(count)] = (drawn - test.images).square().mean((1, 2, 3)).tolist()
    last = tokenizer.layout.starts[-2]
    fine = torch.randint(16, (4,), generator=torch.Generator().manual_seed(0)) + last
    places = {"coarsest": [0], "fine": fine.tolist()}
    right: dict[str, Any] = {}
    for label in ("shape", "color"):
        for name, tokens in places.items():
            results = []
            for token in tokens:
                one, other = seen.embeddings[:, token], unseen.embeddings[:, token]
                known, truth = getattr(probe, label), getattr(test, label)
                with torch.enable_grad():
                    hits = linear_probe(one, known, other, truth)
                results.append(hits.float())
            right[f"{label}, {name}"] = torch.stack(results).mean(0).tolist()
    return {"prefixes": prefixes, "right": right}


def run(seed: int, name: str, *, steps: int) -> dict[str, Any]:
    """One system of a seed."""
    train = scenes(NUM_TRAIN, seed=100 + seed)
    probe, test = scenes(NUM_PROBE, seed=200 + seed), scenes(NUM_TEST, seed=300, held_out=True)
    torch.manual_seed(seed)
    tokenizer = HieraTok(HieraTokConfig(**{**SIZES, **SYSTEMS[name]}))
    print(f"seed {seed}: {name}", flush=True)
    started = time.perf_counter()
    fit(TokenizerTraining(tokenizer), train.images, steps=steps, seed=seed, batch_size=BATCH)
    took = time.perf_counter() - started
    return {**measure(tokenizer, probe, test), "seconds": took}


def paired(one: Tensor, other: Tensor) -> dict[str, Any]:
    """Of [seeds, images]: means, mean difference per seed, and its interval over images."""
    difference = one - other
    return {
        "means": [float(one.mean()), float(other.mean())],
        "per_seed": difference.mean(1).tolist(),
        "interval": confidence(difference.mean(0)),
    }


def claims(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the issue asks of HieraTok, decided by the numbers."""

    def error(system: str, prefix: int = -1) -> Tensor:
        return torch.tensor([list(each[system]["prefixes"].values())[prefix] for each in results])

    def right(what: str) -> Tensor:
        return torch.tensor([each["scales 1 2 4"]["right"][what] for each in results])

    def above(numbers: dict[str, Any]) -> bool:
        return bool(numbers["interval"][0] > 0 and min(numbers["per_seed"]) > 0)

    ours = "scales 1 2 4"
    steps = [paired(error(ours, n), error(ours, n + 1)) for n in range(2)]
    out = [{"claim": "the error falls with every scale of a prefix",
            "shows": all(map(above, steps)), "numbers": steps}]  # fmt: skip
    for n, tokens in enumerate((1, 5)):
        numbers = paired(error("no auxiliary", n), error(ours, n))
        out.append({"claim": f"without auxiliary losses a prefix of {tokens} is worse",
                    "shows": above(numbers), "numbers": numbers})  # fmt: skip
    for label in ("shape", "color"):
        numbers = paired(right(f"{label}, coarsest"), right(f"{label}, fine"))
        out.append({"claim": f"the coarsest token says more of the {label} than a fine token",
                    "shows": above(numbers), "numbers": numbers})  # fmt: skip
    for control in ("one scale", "one scale, as many numbers"):
        numbers = paired(error(control), error(ours))
        out.append({"claim": f"all scales have a smaller error than '{control}'",
                    "shows": above(numbers), "numbers": numbers})  # fmt: skip
    return out


def main() -> None:
    """Trains what is not cached, prints the table, writes the result."""
    args = arguments(__doc__ or "", steps=1000)
    results: list[dict[str, Any]] = [{} for _ in args.seeds]
    for name, numbers in SYSTEMS.items():
        for seed, result in zip(args.seeds, results, strict=True):
            key = {"seed": seed, "steps": args.steps, "sizes": SIZES, "system": numbers,
                   "batch": BATCH}  # fmt: skip
            result[name] = once("hieratok", key, partial(run, seed, name, steps=args.steps))
    table = []
    for name in SYSTEMS:
        rows = [each[name] for each in results]
        row: dict[str, Any] = {"system": name}
        for group, title in (("prefixes", "error by tokens"), ("right", "probe accuracy")):
            row[title] = {
                key: spread([float(torch.tensor(each[group][key]).mean()) for each in rows])
                for key in rows[0][group]
            }
        row["seconds of training"] = spread([each["seconds"] for each in rows])
        table.append(row)
        print(row)
    found = claims(results)
    for claim in found:
        print("shows" if claim["shows"] else "DOES NOT SHOW", "-", claim["claim"])
    write_result("hieratok", {"seeds": args.seeds, "steps": args.steps, "sizes": SIZES,
                              "table": table, "claims": found})  # fmt: skip


if __name__ == "__main__":
    main()
