"""TokenFlow: does the shared index carry the label, and what does that cost in pixels?

`python benchmarks/tokenizers/tokenflow.py [--seeds 0 1 2] [--steps 600]` trains, per seed, a
classifier of the largest object's shape (the teacher, on labels alone), TokenFlow under it (with
the paper's weight of the pixels in the choice of a code, 1, and with 4), and two controls with the
same scales, vocabulary and pixel part: pixel-only VQ, and TokenFlow without its teacher. Every one
is probed by the same logistic regression on its ids (one-hot, so the width of an embedding plays no
part) and on the codes that the ids look up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lab import Scenes, arguments, confidence, fit, once, scenes, spread, write_result
from probes import linear_probe, one_hot
from torch import Tensor, nn

from rewards.shapes.vocabulary import SHAPES
from tokenizers_vis.teachers import frozen
from tokenizers_vis.tokenflow import SemanticEncoder, TokenFlow, TokenFlowConfig
from tokenizers_vis.training import TokenizerTraining

SIZES: dict[str, Any] = {
    "image_size": 32, "channels": (16, 32, 64), "scales": (1, 2, 4), "vocab": 256, "dim": 48,
    "num_heads": 4, "semantic_depth": 2, "decoder_depth": 1, "teacher_dim": 48,
    "pixel_l1": 1.0, "pixel_l2": 4.0,
}  # fmt: skip
SYSTEMS: dict[str, dict[str, Any]] = {
    "tokenflow": {},
    "tokenflow, pixels weigh 4": {"pixel_weight": 4.0},
    "pixel only": {"semantic_dim": 0},
    "no teacher": {"semantic": 0.0},
}
TAUGHT = [name for name in SYSTEMS if name.startswith("tokenflow")]
BATCH, TEACHER_STEPS, NUM_TRAIN, NUM_PROBE, NUM_TEST = 32, 400, 6000, 2000, 1024


class Classifier(nn.Module):
    """A semantic encoder with a linear head on its mean: what the teacher is trained as."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        self.body = SemanticEncoder(config)
        self.head = nn.Linear(config.dim, len(SHAPES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).mean(1))
        return logits


def train_teacher(train: Scenes, *, steps: int, seed: int) -> Classifier:
    """A classifier of shapes, trained on labels alone."""
    torch.manual_seed(seed)
    teacher = Classifier(TokenFlowConfig(**SIZES))
    optimizer = torch.optim.AdamW(teacher.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 2))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(train.images), (64,), generator=generator)
        loss = F.cross_entropy(teacher(train.images[chosen]), train.shape[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return teacher.eval()


@torch.no_grad()
def measure(tokenizer: TokenFlow, probe: Scenes, test: Scenes, metrics: dict[str, float]) -> Any:
    """Errors of every prefix, probes and usage, on held-out scenes; per image where paired."""
    seen, unseen = tokenizer.encode(probe.images), tokenizer.encode(test.images)
    assert seen.ids is not None and unseen.ids is not None
    prefixes = {}
    for count in tokenizer.token_counts:
        drawn = tokenizer.decode(unseen.keep(count))
        prefixes[str(count)] = (drawn - test.images).square().mean((1, 2, 3)).tolist()
    vocab = tokenizer.config.vocab
    read = {"ids": (one_hot(seen.ids, vocab), one_hot(unseen.ids, vocab))}
    for name, one, other in zip(
        ["pixel", "semantic"],
        reversed(tokenizer.parts(seen)),
        reversed(tokenizer.parts(unseen)),
        strict=False,
    ):
        read[name] = (one.flatten(1), other.flatten(1))
    with torch.enable_grad():
        right = {
            name: linear_probe(one, probe.shape, other, test.shape).float().tolist()
            for name, (one, other) in read.items()
        }
    return {"prefixes": prefixes, "right": right, "usage": tokenizer.usage(seen.ids), **metrics}


def run(seed: int, name: str, *, steps: int) -> dict[str, Any]:
    """One system of a seed."""
    train = scenes(NUM_TRAIN, seed=100 + seed)
    probe, test = scenes(NUM_PROBE, seed=200 + seed), scenes(NUM_TEST, seed=300, held_out=True)
    torch.manual_seed(seed)
    tokenizer = TokenFlow(TokenFlowConfig(**{**SIZES, **SYSTEMS[name]}))
    print(f"seed {seed}: {name}", flush=True)
    known = {}
    if name in TAUGHT:
        classifier = train_teacher(train, steps=TEACHER_STEPS, seed=seed)
        with torch.no_grad():
            accuracy = (classifier(test.images).argmax(1) == test.shape).float().mean()
        known["teacher_accuracy"] = float(accuracy)
        print(f"  teacher's accuracy on held-out scenes {accuracy:.3f}", flush=True)
        tokenizer.teach(frozen(classifier.body))
        tokenizer.semantic_encoder.load_state_dict(classifier.body.state_dict())
    fit(TokenizerTraining(tokenizer), train.images, steps=steps, seed=seed, batch_size=BATCH)
    if tokenizer.config.semantic_dim:
        tokens = tokenizer.encode(test.images)
        ranks = tokenizer.quantizer.table.ranks(tokens.features.detach(), tokens.ids)
        known |= {key: float(value) for key, value in ranks.items()}
    return measure(tokenizer, probe, test, known)


def claims(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the issue asks of TokenFlow, decided by the numbers."""

    def right(system: str, what: str) -> Tensor:
        return torch.tensor([each[system]["right"][what] for each in results])

    def error(system: str, prefix: int = -1) -> Tensor:
        return torch.tensor([list(each[system]["prefixes"].values())[prefix] for each in results])

    def paired(one: Tensor, other: Tensor) -> dict[str, Any]:
        return {
            "means": [float(one.mean()), float(other.mean())],
            "per_seed": (one - other).mean(1).tolist(),
            "interval": confidence((one - other).mean(0)),
        }

    def better(system: str, what: str, control: str, its: str, text: str) -> dict[str, Any]:
        numbers = paired(right(system, what), right(control, its))
        shows = numbers["interval"][0] > 0 and min(numbers["per_seed"]) > 0
        return {"claim": f"{system}: {text}", "shows": shows, "numbers": numbers}

    out = []
    for system in TAUGHT:
        for control in ("pixel only", "no teacher"):
            text = f"a linear probe reads the shape better from its ids than from '{control}'"
            out.append(better(system, "ids", control, "ids", text))
        text = (
            "a linear probe reads the shape better from its semantic codes than from pixel-only's"
        )
        out.append(better(system, "semantic", "pixel only", "pixel", text))
        ratios = [float(r) for r in error(system).mean(1) / error("pixel only").mean(1)]
        text = (
            f"{system}: the pixel error is at most 1.1 times that of pixel-only VQ, in every seed"
        )
        out.append({"claim": text, "shows": max(ratios) <= 1.1, "numbers": {"ratios": ratios}})
        counts = len(results[0][system]["prefixes"])
        steps = [paired(error(system, n), error(system, n + 1)) for n in range(counts - 1)]
        shows = all(s["interval"][0] > 0 and min(s["per_seed"]) > 0 for s in steps)
        text = f"{system}: the error falls with every scale"
        out.append({"claim": text, "shows": shows, "numbers": steps})
        used = [each[system]["usage"]["used"] for each in results]
        text = f"{system}: more than half of the codes are used"
        out.append({"claim": text, "shows": min(used) > 0.5, "numbers": {"used": used}})
    return out


def main() -> None:
    """Trains what is not cached, prints the table, writes the result."""
    args = arguments(__doc__ or "", steps=600)
    results: list[dict[str, Any]] = [{} for _ in args.seeds]
    for name, numbers in SYSTEMS.items():
        for seed, result in zip(args.seeds, results, strict=True):
            key = {"seed": seed, "steps": args.steps, "sizes": SIZES, "system": numbers,
                   "teacher": TEACHER_STEPS, "batch": BATCH}  # fmt: skip
            call = partial(run, seed, name, steps=args.steps)
            result[name] = once("tokenflow", key, call)
    table = []
    for name in SYSTEMS:
        rows = [each[name] for each in results]
        row = {"system": name, "error by tokens": {}, "right": {}}
        for count in rows[0]["prefixes"]:
            means = [float(torch.tensor(each["prefixes"][count]).mean()) for each in rows]
            row["error by tokens"][count] = spread(means)
        for what in rows[0]["right"]:
            means = [float(torch.tensor(each["right"][what]).mean()) for each in rows]
            row["right"][what] = spread(means)
        row["codes used"] = spread([each["usage"]["used"] for each in rows])
        for rank in ("rank_0", "rank_1"):
            if rank in rows[0]:
                row[rank] = spread([each[rank] for each in rows])
        table.append(row)
        print(row)
    found = claims(results)
    for claim in found:
        print("shows" if claim["shows"] else "DOES NOT SHOW", "-", claim["claim"])
    teacher = [each["tokenflow"]["teacher_accuracy"] for each in results]
    write_result("tokenflow", {"seeds": args.seeds, "steps": args.steps, "sizes": SIZES,
                               "teacher_accuracy": teacher, "chance": 1 / len(SHAPES),
                               "table": table, "claims": found})  # fmt: skip


if __name__ == "__main__":
    main()
