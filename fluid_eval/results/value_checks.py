"""What stored values must look like before they are worked with: a check says yes or no, `wrong` what is not so.

A file under its right checksum may still be somebody else's: numbers below zero, texts where counts belong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
MOST = 1 << 53
"""Of whole numbers: above it, floats lose count."""


def text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def number(value: Any) -> bool:
    """A number, infinite ones and NaN among them."""
    return isinstance(value, float) or (type(value) is int and abs(value) < MOST)


def amount(value: Any) -> bool:
    """A finite number from 0 on."""
    return number(value) and 0 <= value < MOST


def count(value: Any) -> bool:
    """A whole number from 0 on."""
    return type(value) is int and 0 <= value < MOST


def below(most: int) -> Check:
    """A count below a bound."""
    return lambda value: type(value) is int and 0 <= value < most


def maybe(check: Check) -> Check:
    """What fits the check, or nothing."""
    return lambda value: value is None or check(value)


def each(check: Check) -> Check:
    """A list whose items all fit."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def by_name(check: Check) -> Check:
    """A table, read from JSON, whose values all fit."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def row(*checks: Check) -> Check:
    """A list of so many items, each fitting its own check."""
    return lambda value: (
        isinstance(value, list) and len(value) == len(checks) and all(c(v) for c, v in zip(checks, value, strict=True))
    )


def table(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A table with these fields; further ones may be anything."""
    return lambda value: isinstance(value, dict) and wrong(value, needed, optional) is None


def anything(value: Any) -> bool:
    """Whatever JSON can say."""
    return True


def wrong(
    values: Mapping[str, Any], needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None
) -> str | None:
    """The first field that is missing or cannot be, in words; None where there is none."""
    if missing := sorted(needed.keys() - values.keys()):
        return f"no {', '.join(missing)}"
    for name, check in {**needed, **(optional or {})}.items():
        if name in values and not check(values[name]):
            return f"{name} is {values[name]!r:.40}"
    return None
