"""LARP's claim: with its prior an independent model needs fewer bits for a token, at what price?

    python benchmarks/tokenizers/larp.py [--seeds 0 1 2] [--steps 800] [--arms ...]

Paper: LARP, arXiv:2410.21264. The cheap way to fewer bits is to use fewer codes or to draw worse
images, so the claim is gated on three numbers at once, against the same tokenizer without a prior:
bits of a probe fewer by MIN_GAIN or more, entropy of the codes at least KEEP_ENTROPY of it, squared
error at most WORST_ERROR of it ("matched": at most MATCHED_ERROR). A second control without a prior
is trained half as long, and so draws worse: it may match the error of a tokenizer with a prior. The
probe is a causal transformer trained from scratch on frozen ids; it is never the prior. Everything
is measured on scenes of combinations that training never shows. Reading order: `ARMS`, `train`,
`probe`, `claims`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import lab
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.shapes.clips import render_frames
from rewards.shapes.grammar import sample_scene, split
from rewards.shapes.vocabulary import IMAGE_SIZE
from tokenizers_vis.addons.base import AddOn
from tokenizers_vis.addons.prior import ARPrior
from tokenizers_vis.blocks import Transformer, causal_mask
from tokenizers_vis.registry import make_tokenizer
from tokenizers_vis.tokenizer import VisualTokenizer
from tokenizers_vis.training import TokenizerTraining

MIN_GAIN, KEEP_ENTROPY, WORST_ERROR, MATCHED_ERROR = 0.2, 0.95, 1.3, 1.05
NUM_TRAIN, NUM_HELD_OUT, NUM_CLIPS, NUM_FRAMES = 6000, 1024, 3000, 4
SMALL = {
    "image_size": 32, "patch_size": 8, "num_tokens": 8, "vocab": 256, "code_dim": 8, "dim": 64,
    "num_heads": 4, "encoder_depth": 2, "decoder_depth": 2,
    "pixel_l2": 10.0,  # with the L1 of the paper alone it draws medians for long: the background
}  # fmt: skip
CLIP = {**SMALL, "num_frames": NUM_FRAMES, "patch_frames": 2}
PAPER = {"weight": 0.06, "temperature": 1.0}
# Without perceptual and adversarial losses beside it the paper's weight is large. A sharper
# temperature lets a small weight say more: at 1 every prediction costs almost ln 256.
SHARP = {"weight": 0.01, "temperature": 0.1}
LIGHT = {"weight": 0.003, "temperature": 0.1}


@dataclass(frozen=True)
class Arm:
    """A tokenizer, its prior if it has one, and the share of the steps that it is trained for."""

    tokenizer: str
    args: Mapping[str, Any]
    prior: Mapping[str, Any] | None = None
    is_clip: bool = False
    share: float = 1.0


ARMS = {
    "plain": Arm("larp", SMALL),
    "plain, half as long": Arm("larp", SMALL, share=0.5),
    "prior": Arm("larp", SMALL, SHARP),
    "light prior": Arm("larp", SMALL, LIGHT),
    "prior, paper's weight": Arm("larp", SMALL, PAPER),
    "titok": Arm("titok", SMALL),
    "clips: plain": Arm("larp", CLIP, is_clip=True),
    "clips: prior": Arm("larp", CLIP, SHARP, is_clip=True),
}


def clips(num: int, *, frames: int, seed: int, held_out: bool = False, size: int = 32) -> Tensor:
    """[num, frames, 3, size, size]: scenes of one large object that moves at a constant speed.

    Of the skills of single and of coloured objects, as large as fits: eight tokens of a tokenizer
    that trains for minutes draw no more than the background of scenes with objects of few pixels
    (measured: error .0238 of a variance of .0243).
    """
    rng = np.random.default_rng((seed, int(held_out), 7))
    pools = [split(skill, held_out=held_out) for skill in ("single_object", "colors")]
    films = []
    for skill in rng.integers(len(pools), size=num):
        scene = sample_scene(pools[skill][rng.integers(len(pools[skill]))], rng)
        (item,) = scene.objects
        radius = min(1.8 * item.radius, 26.0)
        room = (1.08 * radius + 1.5, IMAGE_SIZE - 1.08 * radius - 1.5)
        start, speed = rng.uniform(*room, size=2), rng.uniform(-6, 6, size=2)
        places = np.clip(start + np.arange(frames)[:, None] * speed, *room)
        large = replace(scene, objects=(replace(item, radius=radius),))
        films.append(render_frames(large, places[:, None], rng))
    pixels = torch.from_numpy(np.stack(films)).flatten(0, 1)
    small = F.interpolate(pixels, size=(size, size), mode="area")
    return small.unflatten(0, (num, frames))


class Probe(nn.Module):
    """A causal transformer over ids that models every token, the first one too."""

    def __init__(self, vocab: int, length: int, *, dim: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.code_in = nn.Embedding(vocab + 1, dim)  # the last one starts a sequence
        self.places = nn.Parameter(0.02 * torch.randn(length, dim))
        self.trunk = Transformer(dim, depth, num_heads=4)
        self.out = nn.Linear(dim, vocab)
        self.vocab = vocab

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] bits of every token."""
        read = torch.cat([torch.full_like(ids[:, :1], self.vocab), ids[:, :-1]], dim=1)
        x = self.trunk(self.code_in(read) + self.places, mask=causal_mask(ids.shape[1]))
        return F.cross_entropy(
            self.out(x).transpose(1, 2), ids, reduction="none"
        ) / math.log(2)  # fmt: skip


def probe(train: Tensor, valid: Tensor, tests: Sequence[Tensor], *, vocab: int, seed: int,
          steps: int = 700) -> list[Tensor]:  # fmt: skip
    """Bits [B] per image of ids [B, L] of each test set, at the step that is best on `valid`."""
    torch.manual_seed(seed)
    model = Probe(vocab, train.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    best, found = math.inf, []
    for step in range(steps):
        bits = model(train[torch.randint(len(train), (128,), generator=generator)]).mean()
        optimizer.zero_grad(set_to_none=True)
        bits.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 8) == 0:
            with torch.no_grad():
                score = float(model(valid).mean())
                if score < best:
                    best, found = score, [model(ids).sum(1) for ids in tests]
    return found


def entropy_bits(ids: Tensor, vocab: int) -> float:
    """Of the codes of ids [...], whatever their place."""
    count = torch.bincount(ids.flatten(), minlength=vocab).double()
    return float(torch.special.entr(count / count.sum()).sum()) / math.log(2)


def train(arm: Arm, data: Mapping[str, Tensor], *, steps: int, seed: int) -> dict[str, Any]:
    """Trains, freezes, probes: numbers of the held-out samples."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(arm.tokenizer, arm.args)
    addons: dict[str, AddOn] = {}
    if arm.prior is not None:
        addons["prior"] = ARPrior(dim=64, depth=2, num_heads=4, **arm.prior)
    training = TokenizerTraining(tokenizer, addons=addons)
    lab.fit(training, data["train"], steps=round(arm.share * steps), seed=seed, lr=2e-3)
    ids = {name: encode(tokenizer, images) for name, images in data.items()}
    vocab, length = arm.args["vocab"], arm.args["num_tokens"]
    held, fresh = probe(
        ids["train"], ids["valid"], [ids["held_out"], ids["fresh"]], vocab=vocab, seed=seed
    )
    with torch.no_grad():
        drawn = tokenizer.decode(tokenizer.tokens_from_ids(ids["held_out"]))
        error = (drawn - data["held_out"]).square().flatten(1).mean(1)
    unigram = entropy_bits(ids["held_out"], vocab)
    by_place = [entropy_bits(column, vocab) for column in ids["held_out"].unbind(1)]
    bits = float(held.mean()) / length
    return {
        "mse": float(error.mean()),
        "used": len(ids["held_out"].unique()) / vocab,
        "entropy": unigram,
        "entropy_by_place": float(np.mean(by_place)),
        "probe_bits": bits,
        "probe_bits_fresh": float(fresh.mean()) / length,
        "information": unigram - bits,
        "bits_per_image": (held / length).tolist(),
        "error_per_image": error.tolist(),
    }


@torch.no_grad()
def encode(tokenizer: VisualTokenizer, images: Tensor) -> Tensor:
    """Ids [N, L], the likeliest codes."""
    found = [tokenizer.encode(batch).ids for batch in images.split(256)]
    return torch.cat([ids for ids in found if ids is not None])


def images_of(is_clip: bool) -> dict[str, Tensor]:
    """Training samples, and three sets beside them: `fresh` and `valid` of known combinations."""
    frames = NUM_FRAMES if is_clip else 1
    found = {
        "train": clips(NUM_CLIPS if is_clip else NUM_TRAIN, frames=frames, seed=0),
        "valid": clips(NUM_HELD_OUT // 2, frames=frames, seed=1),
        "fresh": clips(NUM_HELD_OUT, frames=frames, seed=2),
        "held_out": clips(NUM_HELD_OUT, frames=frames, seed=3, held_out=True),
    }
    return found if is_clip else {name: images[:, 0] for name, images in found.items()}


def compare(plain: Sequence[Mapping[str, Any]], prior: Sequence[Mapping[str, Any]],
            what: str) -> list[dict[str, Any]]:  # fmt: skip
    """The gate on three numbers, seed by seed, with intervals over all pairs of images."""
    gains = [a["probe_bits"] - b["probe_bits"] for a, b in zip(plain, prior, strict=True)]
    pairs = np.concatenate(
        [
            np.subtract(a["bits_per_image"], b["bits_per_image"])
            for a, b in zip(plain, prior, strict=True)
        ]
    )
    errors = [b["mse"] / a["mse"] for a, b in zip(plain, prior, strict=True)]
    entropies = [b["entropy"] / a["entropy"] for a, b in zip(plain, prior, strict=True)]
    richer = [b["information"] - a["information"] for a, b in zip(plain, prior, strict=True)]
    numbers = {
        "gain_bits_per_token": gains,
        "gain_interval": lab.confidence(pairs.tolist()),
        "entropy_ratio": entropies,
        "error_ratio": errors,
        "information_gain_bits": richer,
        "used": [b["used"] for b in prior],
    }
    fewer = min(gains) >= MIN_GAIN and numbers["gain_interval"][0] > 0
    alive = min(entropies) >= KEEP_ENTROPY
    return [
        {
            "claim": f"{what}: the probe needs fewer bits per token with the prior, without "
            f"collapse, at an error of at most {limit:g} of that without",
            "shows": bool(fewer and alive and max(errors) <= limit),
            "numbers": numbers,
        }
        for limit in (WORST_ERROR, MATCHED_ERROR)
    ]


def claims(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Of the arms that were run."""
    found = []
    for plain, prior, what in (
        ("plain", "prior", "LARP on images"),
        ("plain", "light prior", "LARP on images with a light prior"),
        ("plain, half as long", "prior", "LARP on images against one trained half as long"),
        ("plain", "prior, paper's weight", "LARP on images with the paper's weight"),
        ("clips: plain", "clips: prior", "LARP on clips"),
    ):
        if plain in runs and prior in runs:
            found += compare(runs[plain], runs[prior], what)
    return found


def main() -> None:
    """Trains what is not there yet, prints the table, writes docs/tokenizers/larp.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="of every training")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    data: dict[bool, dict[str, Tensor]] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in args.arms:
        arm = ARMS[name]
        for seed in args.seeds:
            key = {"arm": asdict(arm), "steps": args.steps, "seed": seed, "version": 1}

            def run(arm: Arm = arm, seed: int = seed, name: str = name) -> dict[str, Any]:
                print(f"{name}, seed {seed}", flush=True)
                if arm.is_clip not in data:
                    data[arm.is_clip] = images_of(arm.is_clip)
                return train(arm, data[arm.is_clip], steps=args.steps, seed=seed)

            runs.setdefault(name, []).append(lab.once("larp", key, run))
    columns = ("mse", "used", "entropy", "entropy_by_place", "probe_bits", "probe_bits_fresh",
               "information")  # fmt: skip
    print("arm".ljust(24) + "".join(column.rjust(20) for column in columns))
    for name, found in runs.items():
        cells = (lab.spread([each[column] for each in found]) for column in columns)
        print(name.ljust(24) + "".join(cell.rjust(20) for cell in cells))
    result = claims(runs)
    for each in result:
        print(f"{'shows' if each['shows'] else 'does not show'}: {each['claim']}")
    rows = {
        name: [{key: each[key] for key in columns} for each in found]
        for name, found in runs.items()
    }
    lab.write_result(
        "larp",
        {
            "seeds": args.seeds,
            "steps": args.steps,
            "data": f"Shapes at 32 x 32, one large object: {NUM_TRAIN} scenes ({NUM_CLIPS} clips "
            f"of {NUM_FRAMES} frames) for training, {NUM_HELD_OUT} of held-out combinations",
            "rows": rows,
            "claims": result,
        },
    )


if __name__ == "__main__":
    main()
