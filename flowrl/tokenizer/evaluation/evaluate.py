"""All that is measured of one tokenizer, as one record of plain numbers.

Every random number derives from `Settings.seed`, so that only the record's `speed` differs between
two runs. Reading order: `Settings`, `evaluate`, then a function per part of the record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowrl.data.seeds import derive_seed
from flowrl.errors import ConfigError
from flowrl.tokenizer.evaluation.ar_probe import ArSettings, ar_bits
from flowrl.tokenizer.evaluation.distances import frechet, lpips_mean, strict
from flowrl.tokenizer.evaluation.features import FeatureNetwork, feature_rows
from flowrl.tokenizer.evaluation.metrics import mean_interval, mse, psnr, share_interval, ssim
from flowrl.tokenizer.evaluation.perceptual import Lpips
from flowrl.tokenizer.evaluation.probes import linear_probe, token_features
from flowrl.tokenizer.evaluation.samples import Samples, limited
from flowrl.tokenizer.evaluation.speed import speed
from flowrl.tokenizer.files import kind
from flowrl.tokenizer.images import as_pictures
from tokenizers_vis.tokenizer import Solver, VisualTokenizer
from tokenizers_vis.tokens import Tokens

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a tokenizer is measured.

    Attributes:
        counts: numbers of tokens; None = the powers of two among those it can keep, and all.
        solver: of a generative decoder; None = its own.
        batch_size: images per forward.
        seed: of everything that is drawn.
        ar: the autoregressive probe's numbers; None = it is left out.
        num_shown: images whose reconstructions are returned.
        resamples: of the bootstrap of Frechet distances.
        num_probed: training images of the linear probes, at most.
    """

    counts: tuple[int, ...] | None = None
    solver: Solver | None = None
    batch_size: int = 32
    seed: int = 0
    ar: ArSettings | None = field(default_factory=ArSettings)
    num_shown: int = 8
    resamples: int = 100
    num_probed: int = 2000


@dataclass(frozen=True)
class Evaluation:
    """A record, and the pictures that go with it.

    Attributes:
        record: plain numbers, see `evaluate`.
        pictures: uint8 [num_shown, 3, H, W] by "original" and the number of tokens; of clips a few
            frames side by side.
    """

    record: Record
    pictures: dict[str, Tensor]


@torch.no_grad()
def evaluate(
    tokenizer: VisualTokenizer,
    held_out: Samples,
    train: Samples,
    *,
    features: FeatureNetwork,
    lpips: Lpips | None = None,
    settings: Settings | None = None,
) -> Evaluation:
    """Measures a tokenizer in evaluation mode, on the device where it is.

    Args:
        tokenizer: its weights are not changed.
        held_out: what is measured.
        train: what the probes are trained on.
        features: of the Frechet distance.
        lpips: None = it is left out.
        settings: how.

    Returns:
        A record with `tokenizer` (what it is), `data`, `counts` (distortion and rate for every
        number of tokens), `usage`, `linear_probe`, `ar_probe` and `speed`. What does not exist is
        None: distortion without a decoder, bits of continuous tokens, strict reading where the
        objects are not known or the canvas is not 64 x 64. Of clips, Frechet distance, LPIPS and
        SSIM are those of their frames, and "image" in the name of a number means a clip.

    Raises:
        ConfigError: a number of tokens that it cannot keep, images that it does not take, or a
            solver for a decoder that does not sample.
    """
    settings = settings or Settings()
    counts = chosen_counts(tokenizer, settings.counts)
    _check(tokenizer, held_out, train, settings)
    was_training = tokenizer.training
    tokenizer.eval()
    try:
        tokens = _encoded(tokenizer, held_out, settings)
        train_tokens = _encoded(tokenizer, train, settings)
        ar, ar_per_count = _ar_probe(tokenizer, tokens, train_tokens, counts, settings)
        rows, pictures = _distortion(tokenizer, held_out, counts, features, lpips, settings)
        for row in rows:
            row |= _rate(tokenizer, train_tokens, row["num_tokens"])
            row["ar_bits"] = ar_per_count.get(row["num_tokens"])
        few = slice(0, settings.num_probed)
        probed = train_tokens.select(torch.arange(len(train))[few])
        probes = _linear_probes(
            tokens, probed, held_out, limited(train, settings.num_probed), counts
        )
        sample = held_out.pixels(slice(0, min(16, len(held_out)))).to(_device(tokenizer))
        return Evaluation(
            {
                "tokenizer": describe(tokenizer, settings),
                "data": _data(held_out, train, features, lpips),
                "settings": {"seed": settings.seed, "batch_size": settings.batch_size},
                "counts": rows,
                "usage": _usage(tokenizer, tokens),
                "linear_probe": probes,
                "ar_probe": ar,
                "speed": speed(tokenizer, sample),
            },
            pictures,
        )
    finally:
        tokenizer.train(was_training)


def chosen_counts(tokenizer: VisualTokenizer, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of tokens to measure, ascending.

    Raises:
        ConfigError: one that it cannot keep.
    """
    possible = tokenizer.token_counts
    if wanted is None:
        return tuple(c for c in possible if c & (c - 1) == 0 or c == possible[-1])
    refused = sorted(set(wanted) - set(possible))
    if refused or not wanted:
        few = ", ".join(map(str, possible[:12])) + (" ..." if len(possible) > 12 else "")
        raise ConfigError(
            f"{tokenizer.name} keeps {few} tokens, not {', '.join(map(str, refused)) or 'none'}"
        )
    return tuple(sorted(set(wanted)))


def describe(tokenizer: VisualTokenizer, settings: Settings) -> Record:
    """What the tokenizer is."""
    solver = settings.solver or (tokenizer.config.solver if tokenizer.is_generative else None)
    return {
        "name": tokenizer.name,
        "config": tokenizer.config_dict(),
        "sample_shape": list(tokenizer.sample_shape),
        "num_tokens": tokenizer.layout.num_tokens,
        "segments": [[each.name, list(each.shape)] for each in tokenizer.layout.segments],
        "codebooks": [asdict(each) for each in tokenizer.codebooks],
        "bits": _finite(tokenizer.bits),
        "is_generative": tokenizer.is_generative,
        "solver": None if solver is None else asdict(solver),
    }


# --------------------------------------------------------------------------- parts of the record


def _distortion(
    tokenizer: VisualTokenizer,
    held_out: Samples,
    counts: Sequence[int],
    features: FeatureNetwork,
    lpips: Lpips | None,
    settings: Settings,
) -> tuple[list[Record], dict[str, Tensor]]:
    """A row per number of tokens, and the pictures."""
    shown = slice(0, settings.num_shown)
    pictures = {"original": _pictures(held_out.pixels(shown))}
    if not tokenizer.is_decodable:
        empty = dict.fromkeys(("psnr", "psnr_gain", "mse", "ssim", "lpips", "frechet", "strict"))
        return [{"num_tokens": count, **empty} for count in counts], pictures
    originals = held_out.pixels(slice(None))
    clean = feature_rows(features, originals, batch_size=settings.batch_size)
    rows: list[Record] = []
    before: Tensor | None = None
    for count in counts:
        drawn = _reconstructed(tokenizer, held_out, count, settings)
        pictures[str(count)] = _pictures(drawn[shown])
        ratio = psnr(drawn, originals)
        gain = None if before is None else asdict(mean_interval(ratio - before))
        rows.append(
            {
                "num_tokens": count,
                "psnr": asdict(mean_interval(ratio)),
                "psnr_gain": gain,
                "mse": asdict(mean_interval(mse(drawn, originals))),
                "ssim": asdict(mean_interval(ssim(drawn, originals))),
                "lpips": lpips_mean(lpips, drawn, originals, settings.batch_size),
                "frechet": _frechet(features, drawn, clean, settings),
                "strict": strict(drawn, held_out),
            }
        )
        before = ratio
    return rows, pictures


def _frechet(features: FeatureNetwork, drawn: Tensor, clean: Tensor, settings: Settings) -> Record:
    rows = feature_rows(features, drawn, batch_size=settings.batch_size)
    frames = len(rows) // len(drawn)
    seed, resamples = settings.seed, settings.resamples
    return frechet(rows, clean, frames=frames, seed=seed, resamples=resamples)


def _rate(tokenizer: VisualTokenizer, tokens: Tokens, count: int) -> Record:
    """Bits of the first tokens: as stored, and as an ideal code for their frequencies needs them.

    `entropy_bits` is the order-0 entropy of the ids, of every segment and group by itself, pooled
    over positions; measured on the training images, so it is a little low where codes are many.
    """
    if tokens.ids is None:
        return {"bits": None, "entropy_bits": None}
    ids = tokens.ids if tokens.ids.ndim == 3 else tokens.ids[..., None]
    total = 0.0
    for number in range(len(tokenizer.layout.segments)):
        part = tokenizer.layout.slice_of(number)
        cut = ids[:, part.start : min(part.stop, count)]
        for group in cut.flatten(0, 1).unbind(-1) if cut.shape[1] else ():
            share = torch.bincount(group).double() / len(group)
            total += cut.shape[1] * float(torch.special.entr(share).sum()) / math.log(2)
    return {"bits": tokenizer.bits_of(count), "entropy_bits": total}


def _usage(tokenizer: VisualTokenizer, tokens: Tokens) -> dict[str, float]:
    return {} if tokens.ids is None else tokenizer.usage(tokens.ids, tokens.mask)


def _linear_probes(
    tokens: Tokens, train_tokens: Tokens, held_out: Samples, train: Samples, counts: Sequence[int]
) -> Record:
    """Label -> accuracy by number of tokens; chance, and that of a probe on the pixels."""
    if not train.labels:
        return {}

    def accuracies(first: Tensor, second: Tensor) -> dict[str, Record]:
        predicted = linear_probe(first, second, train.labels)
        return {
            name: asdict(share_interval(predicted[name] == held_out.labels[name]))
            for name in train.labels
        }

    pixels = accuracies(
        train.pixels(slice(None)).flatten(1), held_out.pixels(slice(None)).flatten(1)
    )
    by_count = {
        count: accuracies(
            *(token_features(each.embeddings, each.mask, count) for each in (train_tokens, tokens))
        )
        for count in counts
    }
    return {
        name: {
            "counts": {str(count): found[name] for count, found in by_count.items()},
            "pixels": pixels[name],
            "chance": float((held_out.labels[name] == labels.mode().values).double().mean()),
        }
        for name, labels in train.labels.items()
    }


def _ar_probe(
    tokenizer: VisualTokenizer,
    tokens: Tokens,
    train_tokens: Tokens,
    counts: Sequence[int],
    settings: Settings,
) -> tuple[Record | None, dict[int, Record]]:
    """The probe's result, and bits of the first tokens by their number."""
    if settings.ar is None or tokens.ids is None or train_tokens.ids is None:
        return None, {}
    with torch.enable_grad():
        found = ar_bits(
            train_tokens.ids,
            tokens.ids,
            _vocabs(tokenizer),
            masks=(train_tokens.mask, tokens.mask),
            settings=settings.ar,
            seed=settings.seed,
            device=_device(tokenizer),
        )
    per_image = found.bits.sum(1)
    cumulative = found.bits.cumsum(1)
    by_count = {count: asdict(mean_interval(cumulative[:, count - 1])) for count in counts}
    record = {
        "bits_per_token": asdict(mean_interval(per_image / tokens.length)),
        "bits_per_image": asdict(mean_interval(per_image)),
        "train_bits_per_token": found.train_bits,
        "by_position": found.bits.mean(0).tolist(),
        "best_step": found.best_step,
        "parameters": found.num_parameters,
        **asdict(settings.ar),
    }
    return record, by_count


def _data(
    held_out: Samples, train: Samples, features: FeatureNetwork, lpips: Lpips | None
) -> Record:
    """What was measured on, and by which networks."""
    return {
        "about": held_out.about,
        "num_held_out": len(held_out),
        "num_train": len(train),
        "fingerprint": held_out.fingerprint,
        "features": features.name,
        "features_about": features.about,
        "lpips": None if lpips is None else lpips.kind,
        "strict_of_originals": strict(held_out.pixels(slice(None)), held_out),
    }


# --------------------------------------------------------------------------- running the tokenizer


def _encoded(tokenizer: VisualTokenizer, samples: Samples, settings: Settings) -> Tokens:
    """All tokens of all images, on the CPU."""
    device, parts = _device(tokenizer), []
    for start in range(0, len(samples), settings.batch_size):
        images = samples.pixels(slice(start, start + settings.batch_size)).to(device)
        parts.append(tokenizer.encode(images))
    ids = [part.ids for part in parts if part.ids is not None]
    return Tokens(
        torch.cat([part.embeddings.float() for part in parts]).cpu(),
        torch.cat([part.mask for part in parts]).cpu(),
        parts[0].layout,
        torch.cat(ids).cpu() if ids else None,
    )


def _reconstructed(
    tokenizer: VisualTokenizer, samples: Samples, count: int, settings: Settings
) -> Tensor:
    """[N, ...] in [0, 1] on the CPU; a generative decoder starts from equal noise at all counts."""
    device, parts = _device(tokenizer), []
    for start in range(0, len(samples), settings.batch_size):
        images = samples.pixels(slice(start, start + settings.batch_size)).to(device)
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "decode", start))
        tokens = tokenizer.encode(images, count)
        drawn = tokenizer.decode(tokens, solver=settings.solver, generator=generator)
        parts.append(drawn.float().cpu())
    return torch.cat(parts)


def _vocabs(tokenizer: VisualTokenizer) -> Tensor:
    """Int64 [L]: ids of one group at every position."""
    sizes = [
        tokenizer.codebooks[segment.codebook].vocab or 0
        for segment in tokenizer.layout.segments
        for _ in range(segment.num_tokens)
    ]
    return torch.tensor(sizes)


def _pictures(samples: Tensor) -> Tensor:
    return (as_pictures(samples) * 255).round().to(torch.uint8)


def _check(
    tokenizer: VisualTokenizer, held_out: Samples, train: Samples, settings: Settings
) -> None:
    for samples in (held_out, train):
        if not tokenizer.accepts(tuple(samples.images.shape[1:])) or len(samples) < 2:
            raise ConfigError(
                f"{tokenizer.name} takes {kind(tokenizer.sample_shape)}s "
                f"{list(tokenizer.sample_shape)}, two or more; got {list(samples.images.shape)}"
            )
    if settings.solver is not None and not tokenizer.is_generative:
        raise ConfigError(f"{tokenizer.name} decodes in one forward; it takes no solver")


def _device(tokenizer: VisualTokenizer) -> str:
    return str(next(tokenizer.parameters()).device)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
