"""Points and frontier of a sweep on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..sweeps.frontier_figure import stem
from ..sweeps.pareto import SPEEDS as PACES
from .terminal import FORWARDS, bare_table, number, print_areas, score, screen
from .terminal import speed as pace

if TYPE_CHECKING:
    from ..sweeps.grid import SweepPlan
    from ..sweeps.sweep import Estimate


def print_plan(plan: SweepPlan, estimate: Estimate, folder: Path) -> None:
    """Print the points of a sweep and its estimated cost."""
    console = screen()
    table = bare_table()
    table.add_column("point", no_wrap=True)
    table.add_column("settings")
    for point in plan.points:
        table.add_row(point.name, ", ".join(f"{name}={value}" for name, value in point.settings.items()))
    console.print(table)
    if plan.note:
        console.print(plan.note)
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


def point_table(result: Mapping[str, Any]) -> Table:
    """The points of a sweep, the fastest first, each with its mark (see the legend of `print_sweep`)."""
    table = bare_table()
    table.add_column("", no_wrap=True)
    table.add_column("point")
    for name in ("score", "tok/s", "tok/fwd", "fwd/ans"):
        table.add_column(name, justify="right", no_wrap=True)
    unhealthy = _unhealthy(result)
    for point in _by_speed(result):
        place = score({"score": point["score"]["mean"], **point["score"]})
        second, forward, answer = (point[name] or {"mean": None} for name in PACES)
        mark = "*" if point["name"] in result["frontier"] else "-" if point["dominated_by"] else ""
        mark = ("x" if point["stopped"] else mark) + ("!" if point["name"] in unhealthy else "")
        table.add_row(
            mark, point["name"], place, pace(second), number(forward["mean"], 2), number(answer["mean"], 1)
        )  # fmt: skip
    return table


def _by_speed(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points, the fastest first, those without that speed last."""
    by = result["by"]
    sign = 1 if by == "forwards_per_answer" else -1
    unknown = {"mean": sign * math.inf}  # behind all others
    return sorted(result["points"], key=lambda point: sign * (point[by] or unknown)["mean"])


def _unhealthy(result: Mapping[str, Any]) -> set[str]:
    """Names of the points with a health gate over its threshold."""
    return {gate["point"] for gate in result.get("health", []) if not gate["ok"]}


def print_sweep(result: Mapping[str, Any], folder: Path) -> None:
    """Print a sweep's points, the fastest first, its frontier and its folder."""
    console = screen()
    # 1) the points
    notes = [f"{p['name']}: stopped early, {p['stopped']}" for p in _by_speed(result) if p["stopped"]]
    console.print(point_table(result))
    console.print()
    # 2) legend
    if "so_far" in result:
        console.print(f"so far: the first {result['so_far']:.0%} of each task's documents")
    console.print("*: on the frontier   -: dominated: another is no worse, and faster (95%)")
    if any(point["tokens_per_second"] and not point.get("repeats") for point in result["points"]):
        console.print("tok/s of one run have no interval: which point is faster is uncertain, and none")
        console.print("is dominated in them; --resume --speed-repeats 5 times all points in turns")
    if notes:
        console.print("x: stopped early")
    if _unhealthy(result):
        console.print("!: a health gate is over its threshold; see result.json")
    console.print("score: mean over tasks, %, with its 95% interval   tok/s: per worker")
    console.print(FORWARDS)
    # 3) conclusions, failures, files
    if result["best"] is not None:
        against = result["baseline"] or "the best score"
        console.print(f"fastest that scores at most {result['within']:g} (%) less than {against}: {result['best']}")
    if result.get("left_out"):  # older results do not have it
        console.print(result["left_out"])
    print_areas(console, result.get("areas", []))
    for note in notes:
        console.print(note)
    for key, reason in result["lost"].items():
        console.print(f"failed, and in no score: {key} ({reason})")
    if result["figure"]:
        console.print()
        console.print(result["caption"])
        console.print(f"figure: {stem(result['by'])}.pdf .svg .png; its caption: .txt .tex")
    files = "frontier.csv .parquet .md .tex; each point is a run folder below points/"
    console.print(f"folder: {folder}  ({files})", soft_wrap=True)
