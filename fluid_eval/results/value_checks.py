"""Schema checks of stored JSON values. A check is a predicate; `wrong` names the first field that fails.

    wrong({"n": -1}, {"n": count, "task": text})   →  "no task"
    wrong({"n": -1, "task": "gsm8k"}, {"n": count, "task": text})   →  "n is -1"

A correct checksum does not make values plausible: a file may be edited by hand or written by another program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
MOST = 1 << 53
"""Above any whole number: larger ones have no exact float."""


def text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def number(value: Any) -> bool:
    """A number; infinity and NaN pass."""
    return isinstance(value, float) or (type(value) is int and abs(value) < MOST)


def amount(value: Any) -> bool:
    """A finite number, 0 or above."""
    return number(value) and 0 <= value < MOST


def count(value: Any) -> bool:
    """A whole number, 0 or above."""
    return type(value) is int and 0 <= value < MOST


def below(most: int) -> Check:
    """A count below a bound."""
    return lambda value: type(value) is int and 0 <= value < most


def maybe(check: Check) -> Check:
    """None, or a value that passes."""
    return lambda value: value is None or check(value)


def each(check: Check) -> Check:
    """A list whose items all pass."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def by_name(check: Check) -> Check:
    """An object whose values all pass."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def row(*checks: Check) -> Check:
    """A list with one item for each check, which passes it."""
    return lambda value: (
        isinstance(value, list) and len(value) == len(checks) and all(c(v) for c, v in zip(checks, value, strict=True))
    )


def table(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with the needed fields; unknown fields are ignored."""
    return lambda value: isinstance(value, dict) and wrong(value, needed, optional) is None


def anything(value: Any) -> bool:
    """Any JSON value."""
    return True


def wrong(
    values: Mapping[str, Any], needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None
) -> str | None:
    """The first field that is missing or fails its check, for an error message; None if there is none."""
    if missing := sorted(needed.keys() - values.keys()):
        return f"no {', '.join(missing)}"
    for name, check in {**needed, **(optional or {})}.items():
        if name in values and not check(values[name]):
            return f"{name} is {values[name]!r:.40}"
    return None
