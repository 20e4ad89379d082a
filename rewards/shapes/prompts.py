"""The prompt sets of the Shapes world: `shapes/train` and `shapes/heldout`, as GenEval rows.

Every skill has the same number of rows, so a mean over rows is GenEval's mean over skills, and a
window of six consecutive rows holds each skill once. Skills with few requests repeat them. The two
sets share no combination (`rewards.shapes.grammar`).

`python -m rewards.shapes.prompts OUT_DIR` writes both as JSONL.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewards.shapes.grammar import SKILLS, Request, split

Row = dict[str, Any]
TRAIN_ROWS = 576  # an epoch: 96 of each skill, all requests of every skill but colour attribution
HELDOUT_PER_SKILL = 16


def train_rows(num: int = TRAIN_ROWS, *, seed: int = 0) -> list[Row]:
    """Training requests, the six skills in turn.

    A skill goes through all its requests in random order before it repeats one.

    Args:
        num: number of rows; a multiple of six is balanced exactly.
        seed: of the order.

    Raises:
        ValueError: if `num` is not positive.
    """
    if num < 1:
        raise ValueError(f"expected at least one row, got num={num}")
    per_skill = -(-num // len(SKILLS))
    columns = []
    for index, skill in enumerate(SKILLS):
        rng = np.random.default_rng([seed, index])
        pool = split(skill, held_out=False)
        order: list[int] = []
        while len(order) < per_skill:
            order += rng.permutation(len(pool)).tolist()
        columns.append([pool[i] for i in order[:per_skill]])
    turns = [request for turn in zip(*columns, strict=True) for request in turn]
    return [request.metadata for request in turns[:num]]


def heldout_rows() -> list[Row]:
    """The evaluation set: 6 x 16 rows, the six skills in turn, always the same.

    Where a skill holds more than 16 requests, those are taken that spread evenly over the words.
    """
    columns = [_spread(split(skill, held_out=True), HELDOUT_PER_SKILL) for skill in SKILLS]
    return [request.metadata for turn in zip(*columns, strict=True) for request in turn]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, one prompt a line, in GenEval's format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _spread(pool: list[Request], num: int) -> list[Request]:
    """`num` of the requests, each next one with the words and the combination used least so far."""
    used: Counter[str] = Counter()
    times: Counter[Request] = Counter()
    chosen: list[Request] = []
    for _ in range(num):
        # All requests once before any twice, then the other wording before the same picture.
        best = min(
            pool, key=lambda r: (times[r], used[r.combination], sum(used[w] for w in _words(r)))
        )
        used.update([best.combination, *_words(best)])
        times[best] += 1
        chosen.append(best)
    return chosen


def _words(request: Request) -> list[str]:
    names = [str(part) for item in request.objects for part in item if part is not None]
    return names + ([request.relation] if request.relation else [])


def main() -> None:
    """Exports the JSONL files."""
    parser = argparse.ArgumentParser(description="Write the Shapes prompt sets as JSONL.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--num", type=int, default=TRAIN_ROWS, help="rows of the train set")
    parser.add_argument("--seed", type=int, default=0, help="order of the train set")
    args = parser.parse_args()
    sets = {"train": train_rows(args.num, seed=args.seed), "heldout": heldout_rows()}
    for name, rows in sets.items():
        path = args.out_dir / f"shapes_{name}.jsonl"
        write(path, rows)
        print(f"{path}: {len(rows)} rows, {len({row['prompt'] for row in rows})} prompts")


if __name__ == "__main__":
    main()
