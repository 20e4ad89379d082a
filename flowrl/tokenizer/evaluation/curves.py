"""The curves of the tokenizers' page: distortion over rate, and what the tokens tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flowrl.train.curves import Panel, make_panel
from flowrl.train.plots import NUM_COLORS, NUM_DASHES, Series

Record = dict[str, Any]
_Value = Callable[[Record], Any]

_TOKENS, _BITS, _AR_BITS = "tokens", "bits per image, as stored", "bits per image, by the AR probe"


def figures(records: Sequence[Record]) -> tuple[list[Panel], list[tuple[str, str, list[Series]]]]:
    """The page's panels; and (title, label of x, curves) of those that the PNG shows."""
    rates: dict[str, _Value] = {
        _TOKENS: lambda row: row["num_tokens"],
        _BITS: lambda row: row["bits"],
        _AR_BITS: lambda row: (row["ar_bits"] or {}).get("mean"),
    }
    panels, plots = [], []
    for key, rate, title, note, log in (
        ("psnr", _TOKENS, "PSNR over tokens", "dB, higher is better.", False),
        ("psnr", _BITS, "PSNR over bits", "dB; ids as stored. Continuous tokens are left out.",
         False),
        ("psnr", _AR_BITS, "PSNR over modelled bits",
         "dB; what an autoregressive model that was trained on the ids needs for them.", False),
        ("frechet", _BITS, "Fréchet distance over bits", "Logarithmic, lower is better.", True),
        ("strict", _BITS, "Strict reading over bits",
         "Share of scenes whose objects the detector still finds, all and no others.", False),
        ("ssim", _BITS, "SSIM over bits", "Higher is better.", False),
        ("lpips", _BITS, "LPIPS over bits", "Lower is better.", False),
    ):  # fmt: skip
        series = _series(records, rates[rate], lambda row, key=key: row[key])
        if not any(each.points for each in series):
            continue
        panels.append(make_panel(title, note, series, x_label=rate, x_log=True, log=log))
        if title in ("PSNR over tokens", "PSNR over bits"):
            plots.append((title, rate, series))
    return [*panels, *_probe_panels(records), *_position_panel(records)], plots


def _probe_panels(records: Sequence[Record]) -> list[Panel]:
    """Accuracy of the linear probes over tokens, a panel per label."""
    panels = []
    for label in records[0]["linear_probe"]:
        series = []
        for index, record in enumerate(records):
            probe = record["linear_probe"].get(label)
            rows = [] if probe is None else list(probe["counts"].items())
            series.append(
                _one(index, record["name"], [(float(count), found) for count, found in rows])
            )
        first = records[0]["linear_probe"][label]
        note = f"Accuracy on held-out images; chance {first['chance']:.2f}, a probe on the pixels "
        note += f"{first['pixels']['mean']:.2f}."
        panels.append(
            make_panel(f"Linear probe: {label}", note, series, x_label=_TOKENS, x_log=True)
        )
    return panels


def _position_panel(records: Sequence[Record]) -> list[Panel]:
    """What every position costs the autoregressive probe."""
    series = [
        Series(
            record["name"],
            [(float(i), y) for i, y in enumerate(record["ar_probe"]["by_position"], start=1)],
            _color(index),
            dash=_dash(index),
        )
        for index, record in enumerate(records)
        if record["ar_probe"] is not None
    ]
    if not series:
        return []
    note = "Bits that the autoregressive probe needs for the token at a position, held-out mean."
    return [make_panel("Bits by position", note, series, x_label="position", x_log=True)]


def _series(records: Sequence[Record], rate: _Value, value: _Value) -> list[Series]:
    """A curve per tokenizer, over the numbers of tokens where both are known."""
    return [
        _one(
            index,
            record["name"],
            [
                (float(rate(row)), value(row))
                for row in record["counts"]
                if rate(row) and value(row) is not None
            ],
        )
        for index, record in enumerate(records)
    ]


def _one(index: int, name: str, points: Sequence[tuple[float, Record]]) -> Series:
    """A curve with its interval as a band: half of its width, around the mean."""
    has_band = bool(points) and all(found["low"] is not None for _, found in points)
    halves = [(found["high"] - found["low"]) / 2 for _, found in points] if has_band else None
    means = [(x, float(found["mean"])) for x, found in points]
    return Series(name, means, _color(index), halves, dash=_dash(index))


def _color(index: int) -> int:
    """Of the tokenizer at a place."""
    return 1 + index % NUM_COLORS


def _dash(index: int) -> int:
    """Of the tokenizer at a place: more tokenizers than colours are told apart by it."""
    return index // NUM_COLORS % NUM_DASHES
