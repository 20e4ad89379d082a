"""The page docs/rewards.md: every reward, where its model comes from, and how it was verified.

Nothing in it is typed by hand: the facts are the cards that reward classes carry.
`python -m flowrl.rewardsdoc > docs/rewards.md`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rewards import NAMES
from rewards.base import is_differentiable
from rewards.cards import Card, cards
from rewards.registry import find

_HEAD = """\
# Rewards

Made by `python -m flowrl.rewardsdoc > docs/rewards.md` from what the classes say of themselves;
`flowrl rewards info NAME` prints one of them with its arguments. Memory is that of the weights
alone, in float32 and in bfloat16. "Verified" says what was compared with what: no published weights
can be downloaded where this repository is built, so every model ran on small random weights of its
true architecture and file format. "Gradient" says whether a score has one in what it reads, checked
by `flowrl rewards test`: preprocessing that rounds to 8 bit or goes through PIL leaves none.
Training asks for scores alone, under `no_grad`.
"""


def to_markdown() -> str:
    """The page."""
    known = cards()
    without = [name for name in NAMES if name not in known]
    rows = [_row(known[name]) for name in NAMES if name in known]
    models = _table(
        ("name", "model", "licence", "reads", "range", "gradient", "memory, GB", "preprocessing",
         "verified"),
        rows,
    )  # fmt: skip
    own = _table(("name", "reads", "gradient", "what it is"), [_own(name) for name in without])
    return "\n".join(
        [_HEAD, "## Reward models", "", *models, "", "## Without a model", "", *own, ""]
    )


def _row(card: Card) -> tuple[str, ...]:
    low, high = card.range
    memory = f"{card.gigabytes():.2g}, {card.gigabytes('bfloat16'):.2g}"
    return (
        f"`{card.name}` ({card.paper})",
        card.model,
        card.licence,
        ", ".join(card.inputs),
        f"{low:g} to {high:g}",
        _gradient(card.name),
        memory,
        card.preprocessing,
        card.verified,
    )


def _own(name: str) -> tuple[str, ...]:
    made = find(name)[0]
    summary = (inspect.getdoc(made) or "").split("\n\n")[0].replace("\n", " ")
    inputs = getattr(made, "inputs", None)
    reads = ", ".join(inputs) if isinstance(inputs, tuple) else "as given"
    return f"`{name}`", reads, _gradient(name), summary


def _gradient(name: str) -> str:
    return "yes" if is_differentiable(find(name)[0]) else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


if __name__ == "__main__":
    print(to_markdown(), end="")
