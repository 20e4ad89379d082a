"""The README.md beside exported weights: what they are, how they were made, what they measure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flowrl import __version__
from flowrl.pretrain.card import configuration, measures
from flowrl.tokenizer.files import kind
from flowrl.tokenizer.schema import TokenizerConfig
from tokenizers_vis.tokenizer import VisualTokenizer


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
        *measures(metrics),
        "",
        *configuration(config, ("run", "tokenizer", "dropout", "addons", "data", "optim")),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
