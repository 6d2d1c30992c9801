"""Result tables of a run on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..results import speed_conditions
from ..results.health import RULES
from .terminal import FORWARDS, ResultLine, bare_table, metric, number, score, screen


def print_result(result: Mapping[str, Any], folder: Path, *, settable: bool = True) -> None:
    """Print scores, costs, health, data fingerprints and the run folder. settable: the command takes settings."""
    console = screen()
    # 1) model, decoder, protocol
    decoder = ", ".join(f"{k}={v}" for k, v in result["decoder"].items() if k != "name")
    console.print(f"{result['model']}  decoder {result['decoder']['name']}" + (f" ({decoder})" if decoder else ""))
    if chat := result.get("chat"):
        console.print(f"chat ({', '.join(f'{k}={v}' for k, v in chat.items() if v not in (None, '', {}))})")
    if used := result.get("protocol"):
        console.print(f"protocol {used['name']} {used['hash']}")
    console.print()
    # 2) scores, costs, speeds
    if result["lines"]:
        _print_tables(console, result)
    # 3) health, data, notices, failures, folder
    print_health(console, result.get("health", []), settable=settable)
    for message in result["data"]:
        console.print(f"data: {message}")
    for message in result["notices"]:
        console.print(f"note: {message}")
    if quantization := result.get("quantization"):
        console.print(f"weights: {quantization}")
    if ran := result.get("remote_code"):
        console.print(f"code of the model's repository ran: {', '.join(ran)}")
    for key, reason in result.get("lost", {}).items():
        console.print(f"failed, and in no score: {key} ({reason})")
    console.print(f"run folder: {folder}\nas a page: fluid-eval report {folder}", soft_wrap=True)


def _print_tables(console: Console, result: Mapping[str, Any]) -> None:
    """Print scores, costs and speeds, and what their columns mean."""
    # 1) scores, costs, speeds
    console.print(score_table(result["lines"]))
    console.print()
    console.print(cost_table(result["lines"]))
    console.print()
    if repeats := max((line.get("speed_repeats", 0) for line in result["lines"]), default=0):
        console.print(_speeds(result["lines"]))
        console.print()
    # 2) legend
    console.print("score: % and its 95% interval   cut: prompts cut from the left to fit the window")
    console.print("tok/s: per worker               limit: answers that hit the length limit")
    if any(line["score"] is None for line in result["lines"]):
        console.print("score =: a value that is no mean over documents, as lm-eval computes it")
    console.print("tokens: of answers before their end; forwards by kind, summed over samples")
    console.print(FORWARDS)
    if any(line["forwards"] is None for line in result["lines"]):
        console.print("–: not known; another program wrote these answers and does not say")
    if not repeats and any(line["tokens_per_second"] and line["forwards"] is not None for line in result["lines"]):
        console.print("tok/s of a single run have no interval; --speed-repeats 5 gives one")
    written = any(line["tokens_per_forward"] is not None for line in result["lines"])
    if written and (under := result.get("conditions")) and (conditions := speed_conditions.drafting(under)):
        console.print(f"tok/fwd at {conditions}")


def print_health(console: Console, health: Sequence[Mapping[str, Any]], *, settable: bool = True) -> None:
    """Print health gates that counted anything, and how to change the thresholds that were exceeded."""
    table = bare_table()
    for name in ("", "health", "task"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "share", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first of them", overflow="fold")
    for gate in (gate for gate in health if gate["count"]):
        keys = "".join(gate["keys"][:1]) + (", …" if gate["count"] > 1 else "")
        counts = f"{gate['count']}/{gate['n']}", f"{gate['share']:.1%}", f"{gate['threshold']:.0%}"
        table.add_row("" if gate["ok"] else "!", gate["gate"], gate["task"], *counts, keys)
    if table.row_count:
        console.print()
        console.print(table)
        console.print()
    if over := next((RULES[gate["gate"]].setting for gate in health if not gate["ok"]), None):
        off = f"; turned off by --set health.{over}=1" if settable else ", by the thresholds of the run that was read"
        console.print(f"!: more than allowed, exit code 3{off}")


def cost_table(lines: Sequence[ResultLine]) -> Table:
    """Cost of each task's answers: tokens, forwards by kind, slots fed a token."""
    firsts = [line for i, line in enumerate(lines) if line["task"] not in {before["task"] for before in lines[:i]}]
    kinds = [
        kind for kind in lines[0]["forwards_by_kind"] if any(line["forwards_by_kind"].get(kind) for line in firsts)
    ]
    table = bare_table()
    table.add_column("task", no_wrap=True)
    for name in ("tokens", *kinds, "forwards", "slots/tok"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in firsts:
        by_kind = line["forwards_by_kind"]
        counts = (line["tokens"], *(by_kind.get(kind, 0) for kind in kinds), line["forwards"])
        table.add_row(line["task"], *map(number, counts), number(line["slots_per_token"], 1))
    return table


def _speeds(lines: Sequence[ResultLine]) -> Table:
    """Tokens/s of the tasks with speed repeats, with the interval of the repeats."""
    table = bare_table()
    table.add_column("task", no_wrap=True)
    for name in ("tok/s", "95% interval", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, line in {line["task"]: line for line in reversed(lines) if line.get("speed_repeats")}.items():
        low, high = (number(line[f"tokens_per_second_{end}"]) for end in ("low", "high"))
        table.add_row(task, number(line["tokens_per_second"]), f"[{low}, {high}]", str(line["speed_repeats"]))
    return table


def score_table(lines: Sequence[ResultLine]) -> Table:
    """A line for each metric; speeds and cut prompts are on a task's first line."""
    table = bare_table()
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
            number(line["truncated_prompts"]),
            number(line["length_limit_hits"]),
        )
        table.add_row(
            line["task"] if first else "", metric(line), score(line), str(line["n"]), *(cost if first else ())
        )
        before = line["task"]
    return table
