"""The page docs/methods.md: every method with its paper, its cost, its arguments and its use.

The texts are the methods' docstrings, the costs are those that `flowrl check` prints; only how
rewards are combined is told here (`_several_rewards`). Reading order: `read_docstring` (what a
method's docstring must say), `cost`, `to_markdown`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple, get_type_hints

from flowrl.commands.check import network_evals
from flowrl.methods import METHODS, Method
from flowrl.methods.forward_plan import ForwardPlan, NeighborPlan
from flowrl.methods.spec import StepPlan, TokenPlan, own_noise, shared_start
from flowrl.strict import type_name

GROUP_SIZE = 24  # Flow-GRPO's, where a method's plan does not fix it
NUM_STEPS = 1000  # training steps looked at for costs that change
_SHARING = {
    own_noise: "one per sample and step",
    shared_start: "one per group up to the first stochastic step, then one per sample and step",
}


class Docstring(NamedTuple):
    """What a method's docstring says: one line; paper, numbers and differences; when to use it."""

    summary: str
    text: str
    use_when: str


class Cost(NamedTuple):
    """Network evaluations per image without guidance, at the first training step and later.

    Attributes:
        rollout, training: of the first step; training with gradient, at most.
        later: the least and the most of a rollout over NUM_STEPS steps.
        words: where they come from.
    """

    rollout: float
    training: float
    later: tuple[float, float]
    words: str


def read_docstring(name: str, docstring: str | None) -> Docstring:
    """The parts of a method's docstring.

    It is a summary line, a paragraph that begins with "Paper:", one that begins with "Use when:"
    and is a sentence, and "Raises:" if need be, in this order and nothing else.

    Raises:
        ValueError: it is not.
    """
    first, *rest = inspect.cleandoc(docstring or "").split("\n\n")
    labels = [paragraph.partition(":")[0] for paragraph in rest]
    texts = [" ".join(paragraph.split()) for paragraph in rest]
    is_ordered = labels[:2] == ["Paper", "Use when"] and labels[2:] in ([], ["Raises"])
    use_when = texts[1].partition(":")[2].strip() if is_ordered else ""
    is_sentence = use_when.endswith(".") and ". " not in use_when
    if not (first and "\n" not in first and is_ordered and is_sentence):
        raise ValueError(
            f"the docstring of {name} has the paragraphs {['summary', *labels]}; write a summary "
            "line, a paragraph 'Paper: ...', a paragraph of one sentence 'Use when: ...' and, if "
            "need be, 'Raises: ...', with empty lines between them"
        )
    return Docstring(first, texts[0], use_when)


def cost(method: Method) -> Cost | None:
    """What `flowrl check` counts, per image; None for tokens, which it does not count."""
    plans: dict[Any, Any] = {}
    for step in range(NUM_STEPS):
        plan = method.plan(step)
        if isinstance(plan, TokenPlan):
            return None
        plans.setdefault(plan.trained if isinstance(plan, StepPlan) else None, plan)
    size = group_size(method)
    counts = [[n / size for n in network_evals(plan, 1, size)] for plan in plans.values()]
    rollouts = [count[0] for count in counts]
    later = (min(rollouts), max(rollouts))
    return Cost(counts[0][0], counts[0][1], later, _words(method.plan(0)))


def group_size(method: Method) -> int:
    """Samples of a prompt for which costs are counted: the plan's own, or GROUP_SIZE."""
    return method.plan(0).group_size or GROUP_SIZE


def to_markdown() -> str:
    """The page docs/methods.md.

    Raises:
        ValueError: a method's docstring is not as `read_docstring` wants it.
    """
    lines = [
        "# Methods",
        "",
        "What `method.name` of a config may say, and what `method.args` may change. A cost is the",
        "number of network evaluations per image at the method's own defaults, as `flowrl check`",
        f"counts it for a config: groups of {GROUP_SIZE} where the method does not fix them, the",
        "first training step, no classifier-free guidance (which doubles every number). Training",
        "is forward and backward, and at most the number given. `reference` and `old` are further",
        "sets of weights: one that scores takes as many forwards again as training, one that is",
        "kept takes memory alone.",
        "Made by `python -m flowrl.methodsdoc > docs/methods.md`.",
        "",
        "| method | what it is | rollout | training | needs |",
        "|---|---|---|---|---|",
    ]
    details = []
    for module, functions in groupby(METHODS.items(), lambda item: item[1].__module__):
        family = module.rpartition(".")[2]
        introduction = inspect.cleandoc(sys.modules[module].__doc__ or "").partition("\n\n")[0]
        details += [f"## methods/{family}.py", "", " ".join(introduction.split()), ""]
        for name, function in functions:
            method, text = function(), read_docstring(name, function.__doc__)
            spent = cost(method)
            numbers = [_number(n) for n in (spent.rollout, spent.training)] if spent else ["–"] * 2
            cells = [f"[`{name}`](#{name})", _cell(text.summary), *numbers, _needs(method)]
            lines.append("| " + " | ".join(cells) + " |")
            details += _section(name, function, method, text, spent)
    return "\n".join([*lines, "", *_several_rewards(), *details]).rstrip() + "\n"


def _several_rewards() -> list[str]:
    """The lines on the ways to combine rewards."""
    offers = [n for n, f in METHODS.items() if "reward_losses" in inspect.signature(f).parameters]
    names = ", ".join(f"`{name}`" for name in offers)
    return [
        "## Several rewards",
        "",
        "A sample has rewards R_k with weights w_k, and a decision the ratio r of new to old",
        "probability. Normalised is: minus the mean of the group, over a std.",
        "",
        "| combined | a sample's advantage | what is clipped | methods |",
        "|---|---|---|---|",
        "| sum of rewards | A = the sum of w_k R_k, normalised: a reward of larger scale counts "
        "for more | r A, once | all but those below |",
        "| sum of normalised advantages | A = the sum of w_k A_k, where A_k is R_k normalised by "
        "itself: scales do not count. GDPO divides A by its std in the whole rollout, so that it "
        "does not grow with the number of rewards | r A, once | `dance_grpo`, `mix_grpo`, "
        "`mix_grpo_flash`, `pref_grpo`, `g2rpo`, `neighbor_grpo`; GDPO: `flow_gdpo` |",
        "| separate clipped losses | every w_k A_k for itself, A_k clamped to advantage_clip | "
        f"r w_k A_k, each, then added | {names}, each with `reward_losses: separate` |",
        "",
        "Opposite rewards cancel in a sum before the clip sees them. Separate losses have the same",
        "gradient as the sum of normalised advantages while r is within the bounds and nothing is",
        "clamped; beyond a bound those rewards stop that drive r further, and the others pull it",
        "back with their whole weight. So use them where rewards disagree about the same samples",
        "and a rollout is learnt from in two updates or more. With one update, or one reward,",
        "there is nothing to clip apart, and `separate` is refused. With it, a method of the first",
        "row normalises each reward by itself too; a negative weight turns a reward round before",
        "it is clipped.",
        "",
    ]


def _section(
    name: str,
    function: Callable[..., Method],
    method: Method,
    text: Docstring,
    spent: Cost | None,
) -> list[str]:
    """The lines of one method."""
    title, _, rest = text.text.partition(": ")
    assert title == "Paper"
    lines = [
        f"### {name}", "", f"{text.summary}", "", f"**Use it when** {text.use_when}", "",
        f"**Paper.** {rest}", "", f"**Cost.** {_cost_text(method, spent)}", "",
        "| argument | default | value |", "|---|---|---|",
    ]  # fmt: skip
    hints = get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        value = parameter.default
        default = value if isinstance(value, str) else json.dumps(value)
        kind = type_name(hints[parameter.name])
        lines.append(f"| `{parameter.name}` | `{default}` | {_cell(kind)} |")
    return [*lines, ""]


def _cost_text(method: Method, spent: Cost | None) -> str:
    if spent is None:
        return "One evaluation per token; `flowrl check` does not count tokens."
    least, most = (_number(n) for n in spent.later)
    later = "" if least == most else f" ({least} to {most} over training)"
    return (
        f"In groups of {group_size(method)}: {_number(spent.rollout)} evaluations per image in the "
        f"rollout{later}, at most {_number(spent.training)} in training: {spent.words}."
    )


def _words(plan: Any) -> str:
    """Where the numbers of a plan come from."""
    if isinstance(plan, NeighborPlan):
        return (
            f"one per sampler step ({plan.num_steps}); {plan.num_anchors} of {plan.group_size} "
            f"samples are trained, one per each of {len(plan.trained)} steps"
        )
    if isinstance(plan, ForwardPlan) and plan.solver is None:
        return f"nothing is drawn, and one per trained point of a sample ({plan.num_draws})"
    if not isinstance(plan, StepPlan):
        return (
            f"one per sampler step ({plan.num_steps}), and one per trained point of a sample "
            f"({plan.num_draws})"
        )
    keys: Any = plan.keys
    shared = _SHARING.get(keys, "one per distinct state of the group's tree")
    tail = f", and {plan.num_tail_steps} per sample after it" if plan.tail else ""
    return (
        f"{shared}, {plan.num_table_steps} steps{tail}; training one for every such state before "
        f"the {len(plan.trained)} trained steps"
    )


def _needs(method: Method) -> str:
    """What a run must give it beside a model, a reward and prompts."""
    plan = method.plan(0)
    needs = []
    if method.takes_pairs:
        needs.append("pairs of images in `data.train` and no reward")
    if method.policy == "token":
        needs.append("an autoregressive model")
    if plan.needs_whole_groups:
        size = "whole groups" if plan.group_size is None else f"groups of {plan.group_size}"
        needs.append(f"{size} on one rank")
    needs += [f"`{name}` scores" for name in method.objective.needs.sets]
    if method.old_decay is not None and "old" not in method.objective.needs.sets:
        needs.append("`old` is kept")
    return ", ".join(needs) or "–"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(to_markdown(), end="")
