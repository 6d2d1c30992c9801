"""Bars: measured figures with a required bound each, printed as a Markdown table or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Bar:
    """One measured figure and its bound.

    measured: None if not measurable here.  bar: the bound in words.  ok: whether it holds, None without a bound.
    """

    name: str
    measured: float | None
    bar: str
    ok: bool | None


def at_least(name: str, measured: float, bound: float) -> Bar:
    """A bar that holds if measured >= bound."""
    return Bar(name, round(measured, 3), f"at least {bound:g}", measured >= bound)


def at_most(name: str, measured: float, bound: float) -> Bar:
    """A bar that holds if measured <= bound."""
    return Bar(name, round(measured, 3), f"at most {bound:g}", measured <= bound)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows))


def render(bars: Sequence[Bar], *, as_json: bool) -> str:
    """Bars as one JSON object, or as a table."""
    if as_json:
        return json.dumps({"bars": [asdict(bar) for bar in bars]}, ensure_ascii=False)
    words = {True: "yes", False: "**no**", None: ""}
    return table(["bar", "measured", "wanted", "met"], [(b.name, b.measured, b.bar, words[b.ok]) for b in bars])
