"""The README.md beside exported weights: what they are, how they were made, what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from flowrl import __version__
from flowrl.config import to_dict
from flowrl.tokenizer.files import kind
from flowrl.tokenizer.schema import TokenizerConfig
from tokenizers_vis.tokenizer import VisualTokenizer

_WHERE = ("output_dir", "resume", "max_minutes")  # of the section run: says nothing about a result


def write_card(
    folder: Path,
    config: TokenizerConfig,
    tokenizer: VisualTokenizer,
    *,
    step: int,
    metrics: Mapping[str, float],
) -> None:
    """Writes README.md.

    Args:
        folder: of the weights.
        config: the run's.
        tokenizer: that was saved there.
        step: steps done.
        metrics: of the held-out evaluation of these weights.
    """
    settings = to_dict(config)
    settings["run"] = {k: v for k, v in settings["run"].items() if k not in _WHERE}
    used = {k: settings[k] for k in ("run", "tokenizer", "dropout", "addons", "data", "optim")}
    used["compute"] = {k: settings["compute"][k] for k in ("batch_size", "micro_batch_size")}
    rows = [f"| `{name}` | {value:.6g} |" for name, value in metrics.items()]
    what = kind(tokenizer.sample_shape)
    lines = [
        f"# {config.run.name}",
        "",
        f"A visual tokenizer, `{tokenizer.name}`: {tokenizer.layout.num_tokens} tokens of one "
        f"{what} {' x '.join(map(str, tokenizer.sample_shape))}, {tokenizer.bits:.6g} bits. Made "
        f"by `flowrl tokenizer train` (flowrl {__version__}), {step} of {config.run.steps} steps.",
        "",
        "```python",
        "from tokenizers_vis.registry import load_pretrained",
        "",
        'tokenizer = load_pretrained("this folder")',
        "```",
        "",
        f"On {config.eval.num_images} held-out {what}s:",
        "",
        "| measure | value |",
        "|---|---|",
        *rows,
        "",
        "The configuration:",
        "",
        "```yaml",
        yaml.safe_dump(used, sort_keys=False).rstrip(),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
