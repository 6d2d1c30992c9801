"""What a comparison and a tax print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..analysis.compare import entries
from .terminal import bare_table, difference, number, probability, ratio, score, screen

MACHINE = "tok/s: per worker; intervals are of repeats in turns, else there are none"


def print_comparison(comparison: Mapping[str, Any], *, flips: bool = False) -> None:
    """Every pair of runs: scores, speeds, flips. flips: name all that changed, not only the first."""
    console = screen()
    models = {run["folder"]: f"{Path(run['model']).name}, {run['decoder']['name']}" for run in comparison["runs"]}
    _print_protocols(console, comparison["protocol_difference"])
    if len(comparison["runs"]) > 2 and len(comparison["pairs"]) < len(comparison["runs"]):
        console.print("each against the first; --all-pairs holds every two against each other")
        console.print()
    for pair in comparison["pairs"]:
        console.print(f"base:  {pair['base']}  ({models[pair['base']]})", soft_wrap=True)
        console.print(f"other: {pair['other']}  ({models[pair['other']]})", soft_wrap=True)
        console.print()
        console.print(_differences(entries(pair)))
        console.print()
        if pair["speed"]["tokens_per_forward"]:
            console.print(_ratios([*pair["tasks"], {"task": "all", "speed": pair["speed"]}]))
            console.print()
        _notes(console, pair, flips)
        console.print()
    console.print("score: %, by a task's first metric   all: mean over tasks")
    console.print("difference: other less base, in points, with its paired 95% interval")
    console.print("p: McNemar's exact test   MDE: what would be found 4 times of 5, in points")
    console.print(MACHINE)


def _print_protocols(console: Console, differences: Sequence[str]) -> None:
    if differences:
        console.print("asked or read differently (base / other):")
        for line in differences:
            console.print(f"  {line}")
        console.print()


def print_tax(result: Mapping[str, Any], folder: Path) -> None:
    """Every step of an adaptation: scores and speeds, over all tasks and of each."""
    console = screen()
    _print_protocols(console, result["protocol_difference"])
    steps, last = result["steps"], result["against_parent"][-1]
    names = [entry["task"] for entry in last["tasks"]]
    of = {name: [next(e for e in step["tasks"] if e["task"] == name) for step in steps] for name in names}
    whole = {"all": [{**step["all"], "speed": step["speed"]} for step in steps]} if len(of) > 1 else {}
    for title, make in (("score", _steps), ("speed", _paces)):
        table = bare_table()
        table.add_column("", no_wrap=True)
        for name in ("score", "step", "p") if title == "score" else ("tok/s", "step", "tok/fwd", "step"):
            table.add_column(name, justify="right", no_wrap=True)
        for task, each in {**whole, **of}.items():
            make(table, task, result["names"], each)
        console.print(table)
        console.print()
    table = bare_table()
    table.add_column("all, from the parent to", no_wrap=True)
    for name in ("score", "p", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for total in result["against_parent"]:
        pace = _ratio(total["speed"]["tokens_per_second"])
        table.add_row(
            f"  {total['step']}", difference(total["all"]["difference"]), probability(total["all"]["mcnemar_p"]), pace
        )
    console.print(table)
    console.print()
    for step in result["steps"]:
        _notes(console, {**step, "all": {"flips": {"gained": [], "lost": []}}}, False)
    console.print("score: %, with its 95% interval   all: mean over tasks")
    console.print("step: from the line above, in points, paired, or as a ratio   p: McNemar's test")
    console.print(MACHINE)
    console.print(f"folder: {folder}  (each run is a folder below points/)", soft_wrap=True)


def _steps(table: Table, task: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Scores after each step, the parent's first."""
    table.add_row(task)
    scores = [entries[0]["base"], *(entry["other"] for entry in entries)]
    for name, found, entry in zip(names, scores, (None, *entries), strict=True):
        step = (difference(entry["difference"]), probability(entry["mcnemar_p"])) if entry else ()
        table.add_row(f"  {name}", score({"score": found["mean"], **found}), *step)


def _paces(table: Table, task: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """Speeds after each step; nothing of tasks that do not write."""
    speeds = [(entry["speed"]["tokens_per_second"], entry["speed"]["tokens_per_forward"]) for entry in entries]
    if speeds[0][1] is None:
        return
    table.add_row(task)
    table.add_row(f"  {names[0]}", number(speeds[0][0] and speeds[0][0]["base"]), "", number(speeds[0][1]["base"], 2))
    for name, (second, forward) in zip(names[1:], speeds, strict=True):
        cells = (number(second and second["other"]), _ratio(second), number(forward["other"], 2), _ratio(forward))
        table.add_row(f"  {name}", *cells)


def _ratio(speed: Mapping[str, Any] | None) -> str:
    return "–" if not speed else ratio(speed) if speed["low"] is not None else f"{speed['ratio']:.2f} no interval"


def _differences(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = bare_table()
    table.add_column("task", no_wrap=True)
    for name in ("base", "other", "difference", "p", "MDE", "n", "gained", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in rows:
        means = (f"{100 * entry[run]['mean']:.1f}" for run in ("base", "other"))
        rest = (probability(entry["mcnemar_p"]), f"{100 * entry['mde']:.1f}", entry["n"], entry["c"], entry["b"])
        table.add_row(entry["task"], *means, difference(entry["difference"]), *map(str, rest))
    return table


def _ratios(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Speeds, two lines a task that writes."""
    table = bare_table()
    for name in ("task", "speed"):
        table.add_column(name, no_wrap=True)
    for name in ("base", "other", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in rows:
        task = entry["task"]
        for name, unit, digits in (("tokens_per_second", "tok/s", 0), ("tokens_per_forward", "tok/fwd", 2)):
            if speed := entry["speed"][name]:
                values = (number(speed[run], digits) for run in ("base", "other"))
                table.add_row(task, unit, *values, _ratio(speed))
                task = ""
    return table


def _notes(console: Console, pair: Mapping[str, Any], flips: bool) -> None:
    """What flipped, what was left out, and what to mind."""
    for name, what in (("gained", "right only in other"), ("lost", "right only in base")):
        if keys := pair["all"]["flips"][name]:
            console.print(f"{what}: {_listed(keys, None if flips else 3)}")
    for why, keys in pair["unpaired"].items():
        if keys:
            console.print(f"left out, {why}: {_listed(keys, 3)}")
    if pair["speed"]["tokens_per_forward"] and pair["speed"]["not_compared"]:
        console.print(f"tok/s do not compare: {'; '.join(pair['speed']['not_compared'])}")
    for caution in pair["speed"]["cautions"]:
        console.print(f"tok/s: {caution}")
    if pair["speed"]["unequal"]:
        console.print(f"tok/fwd under unequal conditions: {'; '.join(pair['speed']['unequal'])}")
    conditions = {run: text for run, text in pair["speed"]["conditions"].items() if text}
    if len(conditions) == len(pair["speed"]["conditions"]) and len(set(conditions.values())) == 1:
        console.print(f"tok/fwd: at {next(iter(conditions.values()))}")
    else:
        for run, text in conditions.items():
            console.print(f"tok/fwd of {run}: at {text}")
    for folder, over in pair["unhealthy"].items():
        if over:
            console.print(f"over a health gate's threshold in {folder}: {', '.join(over)}")


def _listed(keys: Sequence[str], most: int | None) -> str:
    more = ", …" if most is not None and len(keys) > most else ""
    return f"{len(keys)} ({', '.join(keys[:most])}{more})"
