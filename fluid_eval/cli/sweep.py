"""`fluid-eval sweep`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .options import add_settings, add_speed_repeats, add_track, exit_code, integer, values_of

HELP = "run a grid of settings: accuracy/throughput frontier"
EXAMPLE = "fluid-eval sweep --sweep decoder.candidates=1,4 --limit 20"
SPEEDS = ("tokens_per_second", "tokens_per_forward", "forwards_per_answer")


def add(sweep: argparse.ArgumentParser) -> None:
    where = add_settings(sweep)
    where.add_argument("--out", type=Path, metavar="DIR", help="sweep folder; default: sweeps/TASKS-MODEL-ID")
    where.add_argument("--resume", action="store_true", help="continue an interrupted sweep")
    where.add_argument("--json", action="store_true", help="print the result as JSON")
    add_speed_repeats(where)
    add_track(where)
    points = sweep.add_argument_group("which points")
    points.add_argument(
        "--sweep", action="append", default=[], metavar="A.B=C,D",
        help="e.g. decoder.confidence=0.5,0.9; several make a grid",
    )  # fmt: skip
    points.add_argument("--sample", type=integer, metavar="N", help="random sample of N points of the grid")
    points.add_argument("--dry-run", action="store_true", help="estimate the cost from a few samples, then stop")
    points.add_argument("--so-far", action="store_true", help="frontier over the documents answered so far, then stop")
    points.add_argument("--stop-dominated", action="store_true", help="stop points early that others dominate")
    points.add_argument(
        "--within", type=float, default=1.0, metavar="POINTS",
        help="name the fastest point at most this far below AR; default: 1",
    )  # fmt: skip
    points.add_argument(
        "--by", default="tokens_per_second", choices=SPEEDS, metavar="SPEED",
        help="tokens_per_second (default), tokens_per_forward or forwards_per_answer",
    )  # fmt: skip


def main(options: argparse.Namespace) -> int:
    from ..sweeps.grid import plan, read_axis

    # 1) the plan, from file and flags
    values = values_of(options)
    sweep = values.setdefault("sweep", {})
    for text in options.sweep:
        name, axis = read_axis(text)
        sweep.setdefault("grid", {})[name] = axis
    if options.sample is not None:
        sweep["sample"] = options.sample
    planned = plan(values)
    from ..output import tracking
    from ..output.terminal_sweeps import print_plan, print_sweep
    from ..sweeps.sweep import Sweep, default_folder

    tracking.check_tracker(options.track)
    # 2) the sweep's folder; only an estimate, or what is answered so far
    folder = options.out or default_folder(planned)
    job = Sweep(planned, folder, resume=options.resume or options.so_far)
    if options.dry_run:
        print_plan(planned, job.estimate(), folder)
        return 0
    if options.so_far:
        print_sweep(job.so_far(by=options.by, within=options.within), folder)
        return 0
    # 3) run it
    result = job.work(
        stop_dominated=options.stop_dominated, by=options.by, within=options.within,
        speed_repeats=options.speed_repeats,
    )  # fmt: skip
    if options.track is not None:
        tracking.track_sweep(options.track, folder, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_sweep(result, folder)
    deciding = (result["baseline"], result["best"])
    return exit_code(result["lost"], [gate for gate in result.get("health", []) if gate["point"] in deciding])
