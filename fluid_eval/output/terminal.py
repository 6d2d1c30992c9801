"""What commands print: tables that fit 80 columns. Here what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Line = Mapping[str, Any]


def screen() -> Console:
    """Standard output: as wide as the terminal, 80 columns where there is none."""
    return Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)


def bare_table() -> Table:
    """A table without lines around its cells."""
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))


def score(line: Line) -> str:
    """Percent with its 95% interval."""
    return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def number(value: float | None, digits: int = 0) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def difference(found: Line) -> str:
    """A difference of shares in points with its interval, such as "-2.4 [-4.8, 0.1]"."""
    mean, low, high = (round(100 * found[name], 1) + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def ratio(found: Line) -> str:
    """A ratio with its interval, where it has one, such as "1.05 [1.02, 1.07]"."""
    if found["low"] is None:
        return f"{found['ratio']:.2f}"
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def speed(found: Line, digits: int = 0) -> str:
    """A speed with its interval, where it has one, such as "7,325 [7,100, 7,560]"."""
    if found.get("low") is None:
        return number(found["mean"], digits)
    return f"{number(found['mean'], digits)} [{number(found['low'], digits)}, {number(found['high'], digits)}]"


def probability(p: float | None) -> str:
    """A p value, as far as it says something; a dash where there is none."""
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001"


def metric(line: Line) -> str:
    """Metric and filter in one name, short where the filter says nothing."""
    names = {"strict-match": " strict", "flexible-extract": " flex", "none": "", "create_test": ""}
    return f"{line['metric']}{names.get(line['filter'], ' ' + line['filter'])}"
