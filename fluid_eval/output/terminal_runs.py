"""Run folders on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ..results.run_list import STATES, RunEntry, TaskScore
from .terminal import bare_table, score, screen


def print_runs(entries: Sequence[RunEntry], folder: Path) -> None:
    """Print each run: its folder, then date, model, decoder and a row for each task's score, the newest first."""
    console = screen()
    if not entries:
        console.print(f"no runs below {folder}; fluid-eval run makes one")
        return
    for entry in entries:
        console.print(str(entry.folder), soft_wrap=True)
        if entry.problem is not None:
            console.print(f"  unreadable: {entry.problem}", soft_wrap=True)
            continue
        began = datetime.fromisoformat(entry.started).strftime("%Y-%m-%d %H:%M") if entry.started else ""
        console.print(f"  {began}  {entry.state}  {entry.model}  decoder {entry.decoder}")
        table = bare_table()
        for name in ("", "task", "metric"):
            table.add_column(name, no_wrap=name != "task", overflow="fold")
        for name in ("score", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        table.show_header = False
        for row in entry.scores or [TaskScore(task, "", None, None, None, 0) for task in entry.tasks]:
            shown = "–" if row.value is None else score({"score": row.value, "low": row.low, "high": row.high})
            table.add_row(" ", row.task, row.metric, shown, f"n={row.n}" if row.n else "")
        console.print(table)
    count = f"{len(entries)} run{'s' * (len(entries) != 1)}"
    console.print(f"\n{count}, the newest first (UTC); score: %, its 95% interval, first metric")
    for state in sorted({entry.state for entry in entries} & STATES.keys()):
        console.print(f"{state}: {STATES[state]}")
