"""What a run prints: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Line = Mapping[str, Any]


def score(line: Line) -> str:
    """Percent with its 95% interval."""
    return f"{100 * line['score']:.1f} [{100 * line['low']:.1f}, {100 * line['high']:.1f}]"


def number(value: float | None, digits: int = 0) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def metric(line: Line) -> str:
    """Metric and filter in one name, short where the filter says nothing."""
    names = {"strict-match": " strict", "flexible-extract": " flex", "none": "", "create_test": ""}
    return f"{line['metric']}{names.get(line['filter'], ' ' + line['filter'])}"


def print_result(result: Mapping[str, Any], folder: Path) -> None:
    """The result table, the data's fingerprints and where everything is."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    decoder = ", ".join(f"{k}={v}" for k, v in result["decoder"].items() if k != "name")
    console.print(f"{result['model']}  decoder {result['decoder']['name']} ({decoder})")
    if chat := result.get("chat"):
        console.print(f"chat ({', '.join(f'{k}={v}' for k, v in chat.items() if v not in (None, '', {}))})")
    console.print()
    console.print(_table(result["lines"]))
    console.print()
    console.print(_costs(result["lines"]))
    console.print()
    console.print("score: % and its 95% interval   cut: prompts cut from the left to fit the window")
    console.print("tok/s: per worker               limit: answers that hit the length limit")
    console.print("tokens: of answers before their end; forwards by kind, summed over samples")
    for message in result["data"]:
        console.print(f"data: {message}")
    for message in result["notices"]:
        console.print(f"note: {message}")
    for key, reason in result.get("lost", {}).items():
        console.print(f"given up, and in no score: {key} ({reason})")
    console.print(f"run folder: {folder}  (fluid-eval report {folder})", soft_wrap=True)


def _costs(lines: Sequence[Line]) -> Table:
    """What each task's answers cost: forwards by kind, slots fed."""
    firsts = [line for i, line in enumerate(lines) if line["task"] not in {before["task"] for before in lines[:i]}]
    kinds = [
        kind for kind in lines[0]["forwards_by_kind"] if any(line["forwards_by_kind"].get(kind) for line in firsts)
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for name in ("tokens", *kinds, "forwards", "slots/tok"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in firsts:
        by_kind = line["forwards_by_kind"]
        counts = (line["tokens"], *(by_kind.get(kind, 0) for kind in kinds), line["forwards"])
        table.add_row(line["task"], *(f"{count:,}" for count in counts), number(line["slots_per_token"], 1))
    return table


def _table(lines: Sequence[Line]) -> Table:
    """One line a metric; what the answers cost stands on a task's first line."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in ("score", "n", "tok/fwd", "tok/s", "cut", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for line in lines:
        first = line["task"] != before
        cost = (
            number(line["tokens_per_forward"], 2),
            number(line["tokens_per_second"]),
            str(line["truncated_prompts"]),
            str(line["length_limit_hits"]),
        )
        table.add_row(
            line["task"] if first else "", metric(line), score(line), str(line["n"]), *(cost if first else ())
        )
        before = line["task"]
    return table
