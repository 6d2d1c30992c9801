"""What a run prints: tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .health import RULES
from .pareto import SPEEDS as PACES

if TYPE_CHECKING:
    from .grid import Plan
    from .sweep import Estimate

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
    print_health(console, result.get("health", []))
    for message in result["data"]:
        console.print(f"data: {message}")
    for message in result["notices"]:
        console.print(f"note: {message}")
    if ran := result.get("remote_code"):
        console.print(f"code of the model's repository ran: {', '.join(ran)}")
    for key, reason in result.get("lost", {}).items():
        console.print(f"given up, and in no score: {key} ({reason})")
    console.print(f"run folder: {folder}  (fluid-eval report {folder})", soft_wrap=True)


def print_health(console: Console, health: Sequence[Mapping[str, Any]]) -> None:
    """What the gates counted, where that is anything, and what to do about those over their thresholds."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "health", "task"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "share", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first of them", overflow="fold")
    for gate in (gate for gate in health if gate["count"]):
        keys = gate["keys"][0] + (", …" if gate["count"] > 1 else "")
        counts = f"{gate['count']}/{gate['n']}", f"{gate['share']:.1%}", f"{gate['threshold']:.0%}"
        table.add_row("" if gate["ok"] else "!", gate["gate"], gate["task"], *counts, keys)
    if table.row_count:
        console.print()
        console.print(table)
        console.print()
    if over := next((RULES[gate["gate"]].setting for gate in health if not gate["ok"]), None):
        console.print(f"!: over what is allowed: exit code 3; --set health.{over}=1 turns that gate off")


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


def print_plan(plan: Plan, estimate: Estimate, folder: Path) -> None:
    """What a sweep would do."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("point", no_wrap=True)
    table.add_column("settings")
    for point in plan.points:
        table.add_row(point.name, ", ".join(f"{name}={value}" for name, value in point.settings.items()))
    console.print(table)
    if plan.merged:
        console.print(f"{plan.merged} points of the grid are the same run as another and are run once")
    if not estimate.tried:
        console.print(f"{len(plan.points)} points; no sample is missing")
        return
    hours, minutes = divmod(round(estimate.seconds / 60), 60)
    about = f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{estimate.seconds:.0f} s"
    console.print(
        f"{len(plan.points)} points, {estimate.samples:,} samples to answer, about {estimate.forwards:,.0f} forwards "
        f"and {about} (from {estimate.tried} samples answered just now; larger batches take less)"
    )
    console.print(f"folder: {folder} (nothing is written yet)", soft_wrap=True)


def print_sweep(result: Mapping[str, Any], folder: Path) -> None:
    """A sweep's points, the fastest first, and where everything is."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("point")
    for name in ("score", "tok/s", "tok/fwd", "fwd/ans"):
        table.add_column(name, justify="right", no_wrap=True)
    by, notes = result["by"], list[str]()
    unhealthy = {gate["point"] for gate in result.get("health", []) if not gate["ok"]}
    speed = {p["name"]: (p[by] or {"mean": 0.0})["mean"] for p in result["points"]}
    sign = 1 if by == "forwards_per_answer" else -1
    for point in sorted(result["points"], key=lambda p: sign * speed[p["name"]]):
        place = score({"score": point["score"]["mean"], **point["score"]})
        means = [(point[name] or {"mean": None})["mean"] for name in PACES]
        mark = "*" if point["name"] in result["frontier"] else "-" if point["dominated_by"] else ""
        mark = ("x" if point["stopped"] else mark) + ("!" if point["name"] in unhealthy else "")
        table.add_row(mark, point["name"], place, number(means[0]), number(means[1], 2), number(means[2], 1))
        if point["stopped"]:
            notes.append(f"{point['name']}: ended early, {point['stopped']}")
    console.print(table)
    console.print()
    if "so_far" in result:
        console.print(f"so far: the first {result['so_far']:.0%} of each task's documents")
    console.print("*: on the frontier   -: surely beaten: another is no worse, and faster")
    if notes:
        console.print("x: ended early")
    if unhealthy:
        console.print("!: a health gate is over its threshold; result.json tells which")
    console.print("score: mean over tasks, %, with its 95% bootstrap interval   tok/s: per worker")
    if result["best"] is not None:
        against = result["baseline"] or "the best score"
        console.print(f"fastest that scores at most {result['within']:g} (%) less than {against}: {result['best']}")
    for decoder, area in result["aup"].items():
        console.print(f"area under the accuracy-parallelism curve, {decoder}: {area:.1f}")
    for note in notes:
        console.print(note)
    for key, reason in result["lost"].items():
        console.print(f"given up, and in no score: {key} ({reason})")
    files = "frontier.png .svg .csv .parquet .md .tex" if result["figure"] else "frontier.csv .parquet .md .tex"
    console.print(f"folder: {folder}  ({files}; each point is a run folder below points/)", soft_wrap=True)
