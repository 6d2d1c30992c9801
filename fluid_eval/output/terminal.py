"""Shared by all tables on the terminal, which fit 80 columns: console, table style, formats of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

ResultLine = Mapping[str, Any]
"""A line of a result or comparison: task, score, interval, speeds."""
FORWARDS = "tok/fwd: every forward counts, prefill too, which papers often leave out"
"""Legend of tokens/forward."""


def screen() -> Console:
    """Standard output: as wide as the terminal, 80 columns where there is none."""
    return Console(width=None if Console().is_terminal else 80, highlight=False, markup=False, force_jupyter=False)


def bare_table() -> Table:
    """A table without lines around its cells."""
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))


def plain_table(first: str, others: Sequence[str]) -> Table:
    """A table without lines: names on the left, then right-aligned numbers."""
    table = bare_table()
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def score(line: ResultLine) -> str:
    """Percent with its 95% interval; the value of a metric that is no mean over documents as it is."""
    if line["score"] is None:
        return f"= {line['value']:.4g}"
    return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def number(value: float | None, digits: int = 0) -> str:
    """A number, a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def difference(interval: ResultLine) -> str:
    """A difference of shares in points with its interval, such as "-2.4 [-4.8, 0.1]"."""
    mean, low, high = (round(100 * interval[name], 1) + 0.0 for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def ratio(interval: ResultLine) -> str:
    """A ratio with its interval, if it has one, such as "1.05 [1.02, 1.07]"."""
    if interval["low"] is None:
        return f"{interval['ratio']:.2f}"
    return f"{interval['ratio']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def speed(interval: ResultLine, digits: int = 0) -> str:
    """A speed with its interval, if it has one, such as "7,325 [7,100, 7,560]"."""
    if interval.get("low") is None:
        return number(interval["mean"], digits)
    return f"{number(interval['mean'], digits)} [{number(interval['low'], digits)}, {number(interval['high'], digits)}]"


def print_areas(console: Console, areas: Sequence[Mapping[str, Any]]) -> None:
    """Print AUP of each method, see `sweeps.aup`: mean over tasks, each task's, and why there is none."""
    if not areas:
        return
    console.print("AUP, accuracy under parallelism as d3LLM defines it (arXiv 2601.07568):")
    for row in areas:
        tasks = "  ".join(f"{name} {number(area['value'], 1)}" for name, area in row["tasks"].items())
        console.print(
            f"  {row['method']}: {number(row['mean'], 1)}" + (f"  ({tasks})" if len(row["tasks"]) > 1 else "")
        )
        for name, area in row["tasks"].items():
            if area["why"]:
                console.print(f"    {name}: {area['why']}")


def probability(p: float | None) -> str:
    """A p value to three digits, a dash for None."""
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "<.001"


def metric(line: ResultLine) -> str:
    """Metric and filter in one name; default filters are left out."""
    names = {"strict-match": " strict", "flexible-extract": " flex", "none": "", "create_test": ""}
    return f"{line['metric']}{names.get(line['filter'], ' ' + line['filter'])}"
