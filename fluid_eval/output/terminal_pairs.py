"""Comparisons and the cost of an adaptation on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..analysis.compare import entries
from .terminal import (
    FORWARDS,
    bare_table,
    difference,
    number,
    plain_table,
    print_areas,
    probability,
    ratio,
    score,
    screen,
)

MACHINE = "tok/s: per worker; intervals are of repeats in turns, else there are none"


def print_comparison(comparison: Mapping[str, Any], *, flips: bool = False) -> None:
    """Print every pair of runs: scores, speeds, flips. flips: list all flipped documents, not only the first three."""
    console = screen()
    # 1) the runs and their protocols
    models = {run["folder"]: f"{Path(run['model']).name}, {run['decoder']['name']}" for run in comparison["runs"]}
    _print_protocols(console, comparison["protocol_difference"])
    if len(comparison["runs"]) > 2 and len(comparison["pairs"]) < len(comparison["runs"]):
        console.print("each against the first; --all-pairs compares every two")
        console.print()
    # 2) each pair
    for pair in comparison["pairs"]:
        console.print(f"base:  {pair['base']}  ({models[pair['base']]})", soft_wrap=True)
        console.print(f"other: {pair['other']}  ({models[pair['other']]})", soft_wrap=True)
        console.print()
        console.print(difference_table(pair))
        console.print()
        if pair["speed"]["tokens_per_forward"] or pair["speed"]["tokens_per_second"]:
            console.print(speed_table(pair))
            console.print()
        _notes(console, pair, flips)
        console.print()
    # 3) areas, legend
    if comparison["areas"]:
        print_areas(console, comparison["areas"])
        console.print()
    console.print("score: %, by a task's first metric   all: mean over tasks")
    console.print("difference: other less base, in points, with its paired 95% interval")
    console.print("p: McNemar's exact test   MDE: smallest difference detected with 80% power")
    console.print(f"{MACHINE}\n{FORWARDS}")


def _print_protocols(console: Console, differences: Sequence[str]) -> None:
    if differences:
        console.print("protocols differ (base / other):")
        for line in differences:
            console.print(f"  {line}")
        console.print()


def print_tax(result: Mapping[str, Any], folder: Path) -> None:
    """Print every stage of an adaptation: scores and speeds, over all tasks and of each, then the total."""
    console = screen()
    _print_protocols(console, result["protocol_difference"])
    # 1) each stage against the one before, by task
    steps, last = result["steps"], result["against_parent"][-1]
    tasks = {}
    for name in (entry["task"] for entry in last["tasks"]):
        tasks[name] = [next(entry for entry in step["tasks"] if entry["task"] == name) for step in steps]
    if len(tasks) > 1:
        tasks = {"all": [{**step["all"], "speed": step["speed"]} for step in steps], **tasks}
    scores = plain_table("", ("score", "step", "p"))
    speeds = plain_table("", ("tok/s", "step", "tok/fwd", "step"))
    for task, each in tasks.items():
        _add_scores(scores, task, result["names"], each)
        _add_speeds(speeds, task, result["names"], each)
    for table in (scores, speeds):
        console.print(table)
        console.print()
    # 2) each stage against the parent, over all tasks
    table = plain_table("all, from the parent to", ("score", "p", "tok/s"))
    for total in result["against_parent"]:
        speed = _ratio(total["speed"]["tokens_per_second"])
        table.add_row(
            f"  {total['step']}", difference(total["all"]["difference"]), probability(total["all"]["mcnemar_p"]), speed
        )
    console.print(table)
    console.print()
    # 3) notes
    for step in result["steps"]:
        _notes(console, {**step, "all": {"flips": {"gained": [], "lost": []}}}, False)
    console.print("score: %, with its 95% interval   all: mean over tasks")
    console.print("step: from the line above, in points, paired, or as a ratio   p: McNemar's test")
    console.print(f"{MACHINE}\n{FORWARDS}")
    console.print(f"folder: {folder}  (each run is a folder below points/)", soft_wrap=True)


def _add_scores(table: Table, task: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """A task's score at each stage, the parent's first, and its change from the stage before."""
    table.add_row(task)
    scores = [entries[0]["base"], *(entry["other"] for entry in entries)]
    for name, interval, entry in zip(names, scores, (None, *entries), strict=True):
        change = (difference(entry["difference"]), probability(entry["mcnemar_p"])) if entry else ()
        table.add_row(f"  {name}", score({"score": interval["mean"], **interval}), *change)


def _add_speeds(table: Table, task: str, names: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> None:
    """A task's speeds at each stage; nothing for tasks without generated answers."""
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


def difference_table(pair: Mapping[str, Any]) -> Table:
    """Scores of a pair of runs by task, then over all."""
    table = plain_table("task", ("base", "other", "difference", "p", "MDE", "n", "gained", "lost"))
    for entry in entries(pair):
        means = (f"{100 * entry[run]['mean']:.1f}" for run in ("base", "other"))
        rest = (probability(entry["mcnemar_p"]), f"{100 * entry['mde']:.1f}", entry["n"], entry["c"], entry["b"])
        table.add_row(entry["task"], *means, difference(entry["difference"]), *map(str, rest))
    return table


def speed_table(pair: Mapping[str, Any]) -> Table:
    """Speeds of a pair of runs, two lines for each task with generated answers, then over all."""
    table = bare_table()
    for name in ("task", "speed"):
        table.add_column(name, no_wrap=True)
    for name in ("base", "other", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in [*pair["tasks"], {"task": "all", "speed": pair["speed"]}]:
        task = entry["task"]
        for name, unit, digits in (("tokens_per_second", "tok/s", 0), ("tokens_per_forward", "tok/fwd", 2)):
            if speed := entry["speed"][name]:
                values = (number(speed[run], digits) for run in ("base", "other"))
                table.add_row(task, unit, *values, _ratio(speed))
                task = ""
    return table


def _notes(console: Console, pair: Mapping[str, Any], flips: bool) -> None:
    """Print flips, unpaired documents, cautions about speeds, and failed health gates."""
    # 1) documents
    for name, meaning in (("gained", "right only in other"), ("lost", "right only in base")):
        if keys := pair["all"]["flips"][name]:
            console.print(f"{meaning}: {_listed(keys, None if flips else 3)}")
    for reason, keys in pair["unpaired"].items():
        if keys:
            console.print(f"left out, {reason}: {_listed(keys, 3)}")
    # 2) limits of the speed ratios
    if pair["speed"]["generated"] and pair["speed"]["not_compared"]:
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
    # 3) health
    for folder, over in pair["unhealthy"].items():
        if over:
            console.print(f"over a health gate's threshold in {folder}: {', '.join(over)}")


def _listed(keys: Sequence[str], most: int | None) -> str:
    more = ", …" if most is not None and len(keys) > most else ""
    return f"{len(keys)} ({', '.join(keys[:most])}{more})"
