"""docs/methods.md is what the methods say of themselves and `flowrl check` counts of them.

Kills, among others: a method without a sentence on when to use it; a page that was not made again;
a cost of another group or without the tail; an argument that is left out.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from flowrl.methods import METHODS
from flowrl.methodsdoc import cost, read_docstring, to_markdown

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_page_is_what_the_methods_say() -> None:
    assert PAGE.read_text() == to_markdown(), "run python -m flowrl.methodsdoc > docs/methods.md"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_when_to_use_it_and_stands_in_the_page_once(name: str) -> None:
    text = read_docstring(name, METHODS[name].__doc__)
    page = PAGE.read_text()
    (section,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", page, re.S | re.M)
    assert f"**Use it when** {text.use_when}" in section and text.summary in section
    listed = re.findall(r"^\| `(\w+)` \| ", section, re.M)
    assert listed == list(inspect.signature(METHODS[name]).parameters)
    assert page.count(f"| [`{name}`](#{name}) | ") == 1


@pytest.mark.parametrize(
    ("name", "rollout", "training"),
    [
        ("flow_grpo", 10, 9),
        # 24 samples from one start: a step of one state, then 24 steps of 24
        ("mix_grpo", (1 + 24 * 24) / 24, (1 + 3 * 24) / 24),
        # three more steps in the window, and ceil((25 - 4) * 0.4) = 9 after it
        ("mix_grpo_flash", (1 + 3 * 24 + 9 * 24) / 24, (1 + 3 * 24) / 24),
        ("branch_grpo", 203 / 16, (203 - 16) / 16),
        # per seed: 9 steps of the trunk, and from step i 6 branches of 9 - i steps; its last step
        ("tempflow_grpo", (9 + 6 * 45) / 54, 9 / 54),
        ("diffusion_nft", 10, 9),
        ("awm", 14, 6),
    ],
)
def test_costs_are_the_closed_form(name: str, rollout: float, training: float) -> None:
    spent = cost(METHODS[name]())
    assert spent is not None and spent[:2] == pytest.approx((rollout, training))


def test_costs_follow_the_window_over_training() -> None:
    spent = cost(METHODS["mix_grpo"]())
    # at its last place, step 20, the window begins after 20 steps of one state for all 24
    assert spent is not None and spent.later == pytest.approx((21 / 24 + 4, (1 + 24 * 24) / 24))
    assert cost(METHODS["grpo"]()) is None  # tokens are not counted


def test_the_page_names_the_methods_that_normalise_each_reward_by_itself() -> None:
    alone = {"normalized_rewards", "granular_advantages", "quasi_normed", "decoupled_rewards"}
    functions = {name: getattr(make().advantage, "func", None) for name, make in METHODS.items()}
    expected = {n for n, f in functions.items() if getattr(f, "__name__", "") in alone}
    listed = set(re.findall(r"`(\w+)`", page_row("sum of normalised advantages")))
    assert listed == expected and {"dance_grpo", "flow_gdpo"} < listed


def page_row(name: str) -> str:
    """The row of a table of the page."""
    (row,) = re.findall(rf"^\| {name} .*$", PAGE.read_text(), re.M)
    return str(row)


GOOD = """What it is.

    Paper: Its title, arXiv:0000.00000. Differs: in this.

    Use when: it fits.

    Raises:
        ValueError: never.
    """


def test_a_docstring_is_read_in_its_parts() -> None:
    text = read_docstring("it", GOOD)
    assert text.use_when == "it fits." and text.summary == "What it is."
    assert text.text == "Paper: Its title, arXiv:0000.00000. Differs: in this."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    Use when: it fits.\n\n", ""),
        ("Use when:", "Use it when:"),
        ("Use when: it fits.", "Use when: it fits"),
        ("Use when: it fits.", "Use when: it fits. Or not."),
        ("Use when: it fits.", "Use when:"),
        ("Paper:", "Source:"),
        ("Raises:", "Note:"),
        ("What it is.", "What it\n    is."),
    ],
)
def test_another_docstring_is_refused(old: str, new: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=r"docstring of it has the paragraphs .*; write a summary"):
        read_docstring("it", GOOD.replace(old, new))
