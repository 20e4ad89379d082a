"""Every injected fault in one table: `python -m tests.fault_table > docs/faults.md` makes the page.

A row carries the check that injects its fault and asserts what the row says; the tables are those
of `scoring/test_fault_table.py` and `reward_server/test_faults.py`, which run them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_HEAD = """\
# What rewards do wrong, and what it costs

Made by `python -m tests.fault_table > docs/faults.md` from the tables that the tests run: {num}
faults, each injected for real, none of our own code replaced. Every row asserts that **no sample
has a wrong number and none was lost that could be scored**: the samples in the last column have no
score and are masked, all others have exactly their own (the server's rows assert it of what the
client returns, which is what the trainer reads). Where a run stops, it stops
before it trains on the step. (A masked sample gets no gradient: `tests/training/test_failures.py`.)

"Asked again" is up to `scoring.retries` times, each after a longer pause; "in halves" tries the
halves of a batch until what fails stands alone. A run that loses more than `scoring.max_invalid` of
its samples stops with the last reason, and its report lists what was lost ("Rewards that failed").
"""

_FOOT = """\
## What no table can promise

A reward in process that returns sound numbers in the wrong order, or wrong numbers, cannot be told
from a right one while a run goes on. `flowrl rewards test NAME` (`flowrl.testing.check_reward`)
finds the usual causes beforehand: it scores a batch twice, backwards, and one by one. Over the wire
an order is checked in every answer, by the names of the samples.
"""


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        name: of the fault.
        injected: how it is brought about.
        expected: what must happen.
        cost: the samples that have no score in the end.
        check: brings it about and asserts that.
    """

    name: str
    injected: str
    expected: str
    cost: str
    check: Callable[[], None]


def table(faults: Sequence[Fault]) -> str:
    """The rows in Markdown."""
    rows = [f"| {each.name} | {each.injected} | {each.expected} | {each.cost} |" for each in faults]
    head = ["| fault | how it is injected | what happens | what it costs |", "| --- " * 4 + "|"]
    return "\n".join([*head, *rows])


def page() -> str:
    """The page docs/faults.md."""
    from tests.reward_server.test_faults import FAULTS as SERVER
    from tests.scoring.test_fault_table import FAULTS as TRAINER
    from tests.scoring.test_faults import NUM

    parts = [
        _HEAD.format(num=len(TRAINER) + len(SERVER)),
        "## In process",
        f"Injected into the reward itself by `tests/scoring/test_fault_table.py`: it scores {NUM} "
        "numbered\nsamples, whose true scores are their numbers.",
        table(TRAINER),
        "## Between a run and its reward server",
        "Injected on real sockets and processes by `tests/reward_server/test_faults.py`, with\n"
        "five samples in a call unless a row says otherwise.",
        table(SERVER),
        _FOOT,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
