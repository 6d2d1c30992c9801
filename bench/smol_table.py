"""The benchmark tables of docs/smol.md: finished sweeps and runs of the parent and its child, a row a system."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import fluid_eval
from fluid_eval import Result, SweepResult
from fluid_eval.results.metrics import TableRow
from fluid_eval.results.run_folder import SPEC, SWEEP
from fluid_eval.results.stored_values import read_spec
from fluid_model import ConfigError

from . import bars

METRICS = {
    "gsm8k": ("exact_match", "flexible-extract"),
    "math500": ("math_verify", "none"),
    "humaneval_instruct": ("pass@1", "create_test"),
    "mmlu": ("acc", "none"),
}
"""Task -> the metric and filter it is judged by here."""
PARENT = "smollm2-135m, ar"
"""The row that other rows' texts are compared with."""


def table(folders: Sequence[Path]) -> str:
    """Scores in % with 95% interval and n, and tokens/forward in brackets behind those of written answers.

    folders: of finished sweeps and runs. Runs of the same model, decoder and backend share a row.
    Raises ConfigError if a folder is not finished, or if two runs of a row answered the same task.
    """
    cells: dict[str, dict[str, str]] = {}
    for result in results(folders):
        row = cells.setdefault(label(result), {})
        for task, line in judged(result):
            if task in row:
                raise ConfigError(f"{result.folder}: {task} of {label(result)!r} is in two folders; name one of them")
            row[task] = cell(line)
    tasks = [task for task in METRICS if any(task in row for row in cells.values())]
    rows = [[name, *(cells[name].get(task, "") for task in tasks)] for name in in_order(cells)]
    return bars.table(["system", *tasks], rows)


def agreement(folders: Sequence[Path]) -> str:
    """Share of answers that are the parent's AR text to the letter, in %, by task.

    Raises ConfigError if the folders hold no run of the parent with ar.
    """
    runs = list(results(folders))
    parents = [run for run in runs if label(run) == PARENT]
    if not parents:
        raise ConfigError(f"no run of {PARENT} in {', '.join(map(str, folders))}; other texts are compared with its")
    texts = {(s.task, s.doc_id): s.output for run in parents for s in run.samples if s.output is not None}
    same: dict[str, dict[str, list[bool]]] = {}
    for run in runs:
        for s in run.samples:
            if run not in parents and s.task in METRICS and (s.task, s.doc_id) in texts:
                row = same.setdefault(label(run), {}).setdefault(s.task, [])
                row.append(s.output == texts[s.task, s.doc_id])
    tasks = [task for task in METRICS if any(task in row for row in same.values())]
    shares = {name: {task: f"{100 * mean(row[task]):.1f}" for task in row} for name, row in same.items()}
    rows = [[name, *(shares[name].get(task, "") for task in tasks)] for name in in_order(shares)]
    return bars.table([f"the text of {PARENT}, %", *tasks], rows)


def in_order(names: Iterable[str]) -> list[str]:
    """The parent first, then by name."""
    return sorted(names, key=lambda name: (name != PARENT, name))


def results(folders: Iterable[Path]) -> Iterable[Result]:
    """The runs of folders, those of a sweep in its order."""
    for folder in folders:
        if (folder / SWEEP).is_file():
            sweep: SweepResult = fluid_eval.load_sweep(folder)
            yield from (sweep.run(point.name) for point in sweep.points)
        else:
            yield fluid_eval.load_run(folder)


def judged(result: Result) -> Iterable[tuple[str, TableRow]]:
    """The table's tasks that a run answered, each with the row it is judged by."""
    for row in result.rows:
        if METRICS.get(row.task) == (row.metric, row.filter):
            yield row.task, row


def label(result: Result) -> str:
    """A system in words: model, decoder, and what of the decoder's settings the table varies; or model and backend."""
    model, decoder = Path(result.model).name, result.decoder
    if backend := read_spec(result.folder / SPEC).get("backend"):
        return f"{model}, lm-eval's {backend['name']}"
    if decoder["name"] != "fluid":
        return f"{model}, {decoder['name']}"
    if not decoder["verify"]:
        return f"{model}, unverified, γ {decoder['confidence']:g}, K {decoder['max_horizon']}"
    budget = decoder["slot_budget"]
    return f"{model}, verified, " + ("timed drafts" if budget is None else f"slot budget {budget}")


def cell(row: TableRow) -> str:
    """Score and interval in %, n, tokens/forward where text was written."""
    numbers: list[Any] = [row.score, row.low, row.high]
    score, low, high = (100 * number for number in numbers)
    speed = row.cost.tokens_per_forward
    return f"{score:.1f} [{low:.1f}, {high:.1f}], n {row.n}" + ("" if speed is None else f" ({speed:.2f})")
