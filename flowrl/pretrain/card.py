"""What the cards of exported models have in common: measures and the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from flowrl.config import to_dict
from flowrl.strict import Record

_WHERE = ("output_dir", "resume", "max_minutes")  # of the section run: says nothing about a result


def measures(metrics: Mapping[str, float]) -> list[str]:
    """The lines of a table of metrics."""
    rows = [f"| `{name}` | {value:.6g} |" for name, value in metrics.items()]
    return ["| measure | value |", "|---|---|", *rows]


def configuration(config: Record, sections: Sequence[str]) -> list[str]:
    """The lines that show what of a config decides the result."""
    settings = to_dict(config)
    settings["run"] = {k: v for k, v in settings["run"].items() if k not in _WHERE}
    used = {k: settings[k] for k in sections}
    used["compute"] = {k: settings["compute"][k] for k in ("batch_size", "micro_batch_size")}
    return [
        "The configuration:", "", "```yaml",
        yaml.safe_dump(used, sort_keys=False).rstrip(), "```",
    ]  # fmt: skip
