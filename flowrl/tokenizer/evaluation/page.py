"""The page that compares tokenizers on the same held-out images, and the JSON and PNG beside it.

Every number was read from the records that `write_evaluation` left, and from the files of claims.
Reading order: `write_evaluation`, `read_evaluations`, `make_page`, then a function per section; the
page's words are in `tokenizers.html.j2`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from flowrl.errors import ConfigError, DataError
from flowrl.tokenizer.evaluation.ar_probe import ArSettings
from flowrl.tokenizer.evaluation.curves import figures
from flowrl.tokenizer.evaluation.evaluate import Evaluation, Record
from flowrl.train.plots import NUM_COLORS, lines_png
from flowrl.train.report import light_colors, number, render

RECORD = "eval.json"
_ORIGINAL = "original"
_AR_SETTINGS = tuple(each.name for each in fields(ArSettings))


# --------------------------------------------------------------------------- records on disk


def write_evaluation(evaluation: Evaluation, folder: Path, *, name: str, source: str) -> Path:
    """Writes eval.json and a strip of pictures per number of tokens; returns the record's file."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("tokens_*.png"):
        old.unlink()
    for key, images in evaluation.pictures.items():
        strip = images.permute(2, 0, 3, 1).flatten(1, 2)  # side by side: [H, N * W, 3]
        stem = key if key == _ORIGINAL else f"tokens_{int(key):05d}"
        Image.fromarray(strip.contiguous().numpy()).save(folder / f"{stem}.png")
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    record = {"name": name, "source": source, "made": made, **evaluation.record}
    file = folder / RECORD
    file.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return file


def read_evaluations(folders: Sequence[Path]) -> list[tuple[Path, Record]]:
    """The records of folders, or of the folders in them, in the order given.

    Raises:
        ConfigError: there are none; two of one name; or they were measured on other images or by
            other networks, so that they do not compare.
    """
    found: list[tuple[Path, Record]] = []
    for folder in folders:
        files = [folder / RECORD] if (folder / RECORD).is_file() else []
        files = files or sorted(folder.glob(f"*/{RECORD}"))
        if not files:
            raise ConfigError(f"{folder} holds no {RECORD}; run flowrl tokenizer eval first")
        found += [(file.parent, _json(file)) for file in files]
    names = [record["name"] for _, record in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two evaluations are called {', '.join(twice)}; rename one by --name")
    first = found[0][1]
    for key, what in (
        ("fingerprint", "on other images"),
        ("features", "with another feature network"),
        ("lpips", "with another LPIPS network"),
    ):
        for _, record in found:
            if record["data"][key] != first["data"][key]:
                raise ConfigError(
                    f"{record['name']} was measured {what} than {first['name']} "
                    f"({record['data'][key]}, not {first['data'][key]}), so they do not compare; "
                    "evaluate both in the same way"
                )
    return found


def read_claims(folder: Path) -> list[Record]:
    """What the scripts of benchmarks/tokenizers found, by name.

    Raises:
        DataError: a file without claims, or a claim without its parts.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        content = _json(file)
        claims = content.get("claims")
        if not isinstance(claims, list) or not all(
            isinstance(each, dict) and isinstance(each.get("shows"), bool) and "claim" in each
            for each in claims
        ):
            raise DataError(
                f"{file}: expected 'claims', a list of records of claim, shows (true or false) and "
                "numbers"
            )
        about = {key: content[key] for key in ("seeds", "steps") if key in content}
        found.append({"name": file.stem, "claims": claims, **about})
    return found


# --------------------------------------------------------------------------- the page


def make_page(folders: Sequence[Path], out: Path, *, claims: Path | None = None) -> list[Path]:
    """Writes OUT and, beside it under its name, a .json with all numbers and a .png of curves.

    Args:
        folders: of evaluations, or folders that hold such.
        out: the page, .html.
        claims: folder of the claims' files; None = the section is left out.

    Returns:
        The files written.

    Raises:
        ConfigError, DataError: see `read_evaluations` and `read_claims`.
    """
    found = read_evaluations(folders)
    records = [record for _, record in found]
    tried = read_claims(claims) if claims is not None else []
    out.parent.mkdir(parents=True, exist_ok=True)
    data, picture = out.with_suffix(".json"), out.with_suffix(".png")
    everything = {"records": records, "claims": tried}
    data.write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    panels, plots = figures(records)
    written = [out, data]
    if plots:
        lines_png(plots, picture, colors=light_colors(), x_log=True)
        written.append(picture)
    render(
        Path(__file__).parent / "tokenizers.html.j2",
        out,
        date=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC"),
        facts=facts(records),
        notes=notes(records),
        entries=entries(records),
        overview=overview(records),
        panels=panels,
        counts=count_rows(records),
        pictures=pictures(found),
        usage=usage_table(records),
        speed=speed_table(records),
        labels=list(records[0]["linear_probe"]),
        claims=[_claim_card(each) for each in tried],
        folders=[str(folder) for folder in folders],
        data=data.name,
    )
    return written


def facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What all records share."""
    data, device = records[0]["data"], records[0]["speed"]["device"]
    reading = data["strict_of_originals"]
    return [
        ("held-out images", str(data["num_held_out"])),
        ("images for the probes", str(data["num_train"])),
        ("Fréchet distance by", data["features"]),
        ("LPIPS", data["lpips"] or "absent"),
        ("originals read strictly", number(reading["mean"]) if reading else "–"),
        ("device of the timings", f"{device}, {records[0]['speed']['threads']} threads"),
        ("seed", str(records[0]["settings"]["seed"])),
    ]


def notes(records: Sequence[Record]) -> list[str]:
    """What has to be known before a number is believed."""
    data = records[0]["data"]
    found = [f"{data['about']}.", f"Fréchet distance: {data['features_about']}"]
    shape = records[0]["tokenizer"]["sample_shape"]
    if len(shape) == 4:
        found.append(
            f"The samples are clips of {shape[0]} frames: where this page says image, it means a "
            "clip. Fréchet distance, LPIPS and SSIM are those of single frames; no network of "
            "videos looked at the motion, so there is no Fréchet video distance. Pictures show a "
            "few frames of a clip side by side."
        )
    if data["lpips"] is None:
        found.append("LPIPS is absent: no weights were given for it.")
    if data["strict_of_originals"] is None:
        found.append("Strict reading is absent: it needs Shapes on a canvas of 64 x 64.")
    threads = {(r["speed"]["device"], r["speed"]["threads"]) for r in records}
    if len(threads) > 1:
        found.append("Timings were taken on different devices or threads: they do not compare.")
    probes = [record["ar_probe"] for record in records if record["ar_probe"]]
    settings = {tuple(probe[key] for key in _AR_SETTINGS) for probe in probes}
    if len(settings) > 1:
        found.append("The autoregressive probes had different settings: bits do not compare.")
    return found


def entries(records: Sequence[Record]) -> list[Record]:
    """Per tokenizer: its colour and what it is, in a line."""
    found = []
    for index, record in enumerate(records):
        made = record["tokenizer"]
        segments = ", ".join(f"{n} {' x '.join(map(str, shape))}" for n, shape in made["segments"])
        books = ", ".join(_codebook(each) for each in made["codebooks"])
        words = [f"{made['name']}: {segments} ({books})"]
        if made["is_generative"]:
            solver = made["solver"]
            words.append(f"decoder of {solver['num_steps']} steps, guidance "
                         f"{solver['guidance_scale']:g}")  # fmt: skip
        found.append(
            {
                "name": record["name"],
                "color": 1 + index % NUM_COLORS,
                "about": "; ".join(words),
                "source": record["source"],
            }
        )
    return found


def overview(records: Sequence[Record]) -> Record:
    """A row per tokenizer, at all of its tokens."""
    labels = list(records[0]["linear_probe"])
    heads = ["tokens", "bits per image", "AR bits per token", "AR bits per image", "PSNR, dB",
             "SSIM", "LPIPS", "Fréchet", "strict reading"]  # fmt: skip
    rows = []
    for record in records:
        last, ar = record["counts"][-1], record["ar_probe"]
        cells = [
            last["num_tokens"], _whole(last["bits"]), _mean(ar and ar["bits_per_token"]),
            _mean(ar and ar["bits_per_image"]), _mean(last["psnr"]), _mean(last["ssim"]),
            _mean(last["lpips"]), _mean(last["frechet"]), _mean(last["strict"]),
        ]  # fmt: skip
        for label in labels:
            probe = record["linear_probe"].get(label)
            cells.append(_mean(probe and probe["counts"][str(last["num_tokens"])]))
        rows.append({"name": record["name"], "cells": [number(cell) for cell in cells]})
    first = records[0]["linear_probe"]
    chance = [
        f"{label}: chance {number(each['chance'])}, pixels {number(each['pixels']['mean'])}"
        for label, each in first.items()
    ]
    return {"heads": heads + [f"probe: {each}" for each in labels], "rows": rows, "chance": chance}


def count_rows(records: Sequence[Record]) -> list[Record]:
    """A row per tokenizer and number of tokens, with intervals."""
    rows = []
    for record in records:
        for row in record["counts"]:
            cells = [
                number(row["num_tokens"]),
                number(_whole(row["bits"])),
                number(row["entropy_bits"]),
            ]
            keys = ("ar_bits", "psnr", "psnr_gain", "ssim", "lpips", "frechet", "strict")
            cells += [_with_interval(row[key]) for key in keys]
            cells += [
                _with_interval(probe["counts"][str(row["num_tokens"])])
                for probe in record["linear_probe"].values()
            ]
            rows.append({"name": record["name"], "cells": cells})
    return rows


def pictures(found: Sequence[tuple[Path, Record]]) -> Record:
    """The strips of every tokenizer, coarse to fine, below the originals."""
    groups = []
    for folder, record in found:
        strips = []
        for row in record["counts"]:
            file = folder / f"tokens_{row['num_tokens']:05d}.png"
            if file.is_file():
                ratio = row["psnr"]["mean"]
                words = f"{row['num_tokens']} token{'s' if row['num_tokens'] > 1 else ''}"
                strips.append({"label": words, "note": f"{number(ratio)} dB", "source": _png(file)})
        groups.append({"name": record["name"], "strips": strips})
    original = found[0][0] / f"{_ORIGINAL}.png"
    return {"original": _png(original) if original.is_file() else "", "groups": groups}


def usage_table(records: Sequence[Record]) -> Record:
    """Codebook statistics, a row per tokenizer."""
    keys = list(dict.fromkeys(key for record in records for key in record["usage"]))
    rows = [
        {"name": r["name"], "cells": [number(r["usage"].get(key)) for key in keys]} for r in records
    ]
    return {"heads": [key.replace("_", " ") for key in keys], "rows": rows}


def speed_table(records: Sequence[Record]) -> Record:
    """Times, evaluations, parameters and memory, a row per tokenizer."""
    heads = ["parameters, M"]
    keys = (("images_per_s", "images/s"), ("tokens_per_s", "tokens/s"),
            ("evaluations", "network evaluations"), ("peak_mb", "peak, MB"))  # fmt: skip
    heads += [f"{part}: {title}" for part in ("encode", "decode") for _, title in keys]
    rows = []
    for record in records:
        speed = record["speed"]
        cells = [speed["parameters"] / 1e6]
        for part in ("encode", "decode"):
            cells += [(speed[part] or {}).get(key) for key, _ in keys]
        rows.append({"name": record["name"], "cells": [_three_digits(cell) for cell in cells]})
    batch = records[0]["speed"]["batch_size"]
    return {"heads": heads, "rows": rows, "batch": batch}


# --------------------------------------------------------------------------- words


def _claim_card(found: Record) -> Record:
    about = [f"{key} {_words(found[key])}" for key in ("seeds", "steps") if key in found]
    rows = [
        {"claim": each["claim"], "shows": each["shows"], "numbers": _words(each.get("numbers"))}
        for each in found["claims"]
    ]
    return {"name": found["name"], "about": "; ".join(about), "rows": rows,
            "shown": sum(each["shows"] for each in rows)}  # fmt: skip


def _words(value: Any) -> str:
    """Numbers of any nesting as text: "a: 0.123; b: 1, 2; c (d: 3)"."""
    if isinstance(value, dict):
        names = (str(key).replace("_", " ") for key in value)
        pairs = zip(names, value.values(), strict=True)
        return "; ".join(
            f"{name} ({_words(each)})" if isinstance(each, dict) else f"{name}: {_words(each)}"
            for name, each in pairs
        )
    if isinstance(value, list | tuple):
        inner = ", ".join(_words(each) for each in value)
        return f"[{inner}]" if any(isinstance(each, list | dict) for each in value) else inner
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value)


def _whole(value: float | None) -> float | None:
    """80 where it is 80.0, as bits of a power of two are."""
    return int(value) if value is not None and value == int(value) else value


def _codebook(book: Record) -> str:
    if book["vocab"] is None:
        return f"continuous, {book['dim']} wide"
    groups = f"{book['groups']} x " if book["groups"] > 1 else ""
    return f"{book['kind']}, {groups}{book['vocab']} codes"


def _three_digits(value: float | None) -> str:
    """A time or a size: 0.0712, 1.23, 45.6, 1230, 86600."""
    if value is None:
        return "–"
    return str(round(value)) if value >= 100 else f"{value:.3g}"


def _mean(value: Record | None) -> float | None:
    return None if value is None else value["mean"]


def _with_interval(value: Record | None) -> str:
    if value is None:
        return "–"
    if value["low"] is None:
        return number(value["mean"])
    return f"{number(value['mean'])} [{number(value['low'])}, {number(value['high'])}]"


def _png(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _json(file: Path) -> Record:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a record, got {type(content).__name__}")
    return content


def file_name(name: str) -> str:
    """A name as a folder's."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_.") or "tokenizer"
