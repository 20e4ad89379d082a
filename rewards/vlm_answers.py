"""What an answer in words means: a number, or one of several verdicts. Strict: in doubt, nothing.

A pattern with one group says where the value stands. It counts only if every match in the answer
says the same, if it is not cut out of something longer ("75" is not 7, nor is "7.5"; "1-5" is
neither), and if the answer did not end for lack of room just there. Otherwise the value is NaN,
which marks the sample as not scored; nothing is guessed. Reading order: `stated`, `number`,
`verdict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from rewards.vlm import Answer

NOTHING = float("nan")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_GOES_ON = re.compile(r"[\w%]|\s*[-–—~]\s*\d|[.,/:]\d")
_BEGINS_BEFORE = re.compile(r"[\d.,−–-]$")


def compile_pattern(pattern: str, *, argument: str = "pattern") -> re.Pattern[str]:
    """The pattern, blind to upper case.

    Raises:
        ValueError: not a regular expression, or not one group.
    """
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{argument} {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(
            f"{argument} {pattern!r} must have one group, around the value; it has "
            f"{compiled.groups} (write (?:...) for a group that is none)"
        )
    return compiled


def stated(answer: Answer, pattern: re.Pattern[str]) -> str | None:
    """What the group of `pattern` matched, in lower case; None if nothing or different things."""
    matches = list(pattern.finditer(answer.text))
    values = {(match[1] or "").lower() for match in matches}
    if len(values) != 1:
        return None
    for match in matches:
        before, after = answer.text[: match.start(1)], answer.text[match.end(1) :]
        if _BEGINS_BEFORE.search(before):
            return None
        if match.end() == match.end(1) and _GOES_ON.match(after):
            return None
        if answer.is_cut and not after:
            return None
    return values.pop()


def number(answer: Answer, pattern: re.Pattern[str], low: float, high: float) -> float:
    """The number that `answer` states; NaN without one, or with one outside [low, high]."""
    text = stated(answer, pattern)
    if text is None or _NUMBER.fullmatch(text) is None:
        return NOTHING
    value = float(text)
    return value if low <= value <= high else NOTHING


def verdict(answer: Answer, pattern: re.Pattern[str], verdicts: Mapping[str, float]) -> float:
    """What stands for the verdict that `answer` states; NaN without one.

    Args:
        answer: of the model.
        pattern: finds the verdict.
        verdicts: value of each, in lower case.
    """
    text = stated(answer, pattern)
    return NOTHING if text is None else verdicts.get(text, NOTHING)


def share(yes: float, no: float) -> float:
    """The share yes / (yes + no) of two probabilities; NaN if neither has any."""
    total = yes + no
    return yes / total if total > 0 and math.isfinite(total) else NOTHING
