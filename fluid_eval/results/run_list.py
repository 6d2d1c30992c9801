"""The run folders below a folder, from their own files: what each is, its scores, its state. No model, no samples.

RunEntry(folder=runs/mini_gsm8k+3-tiny-fluid-fluid-901a0c96, state="finished", model="tiny-fluid",
         decoder="fluid", tasks=("mini_gsm8k", …), scores=(TaskScore("mini_gsm8k", "exact_match", 1.0, …), …),
         started="2026-11-28T23:41:07+00:00")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fluid_model.common.errors import ConfigError

from .run_folder import RESULT, SAMPLES, SPEC
from .samples_file import is_locked
from .stored_values import read_result, read_spec

State = Literal["finished", "unhealthy", "incomplete", "unfinished", "running", "unreadable"]
STATES: dict[State, str] = {
    "unhealthy": "a health gate is over its threshold",
    "incomplete": "some samples failed; --resume asks them again",
    "unfinished": "no result yet; --resume goes on",
    "running": "a process writes it now",
    "unreadable": "its files are no run's",
}
"""What each state means, but `finished`."""


@dataclass(frozen=True)
class TaskScore:
    """The first metric of a task. value: share in [0, 1], None if it is no mean over documents; low, high: its 95%
    interval.  n: documents."""

    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class RunEntry:
    """One run folder. started: ISO time in UTC.  problem: why it is unreadable."""

    folder: Path
    state: State
    model: str = ""
    decoder: str = ""
    tasks: tuple[str, ...] = ()
    scores: tuple[TaskScore, ...] = ()
    started: str | None = None
    problem: str | None = None


def list_runs(folder: Path) -> list[RunEntry]:
    """Every run folder below this one, itself among them, the newest first.

    Raises ConfigError without such a folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; fluid-eval run makes runs/, another one is named by its path")
    entries = [_entry(each) for each in _run_folders(folder)]
    return sorted(entries, key=lambda entry: (entry.started or "", str(entry.folder)), reverse=True)


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        if SPEC in files:
            yield Path(place)


def _entry(folder: Path) -> RunEntry:
    """A folder as it stands; one that cannot be read says why."""
    try:
        spec = read_spec(folder / SPEC, ("tasks", "model", "decoder"))
        result = read_result(folder / RESULT, ("lines",), shown=True) if (folder / RESULT).is_file() else None
    except ConfigError as error:
        return RunEntry(folder, "unreadable", problem=str(error))
    begun = datetime.fromtimestamp((folder / SPEC).stat().st_mtime, UTC).isoformat(timespec="seconds")
    return RunEntry(
        folder, _state(folder, result), Path(spec["model"]["path"]).name, spec["decoder"]["name"],
        tuple(spec["tasks"]), _scores(result) if result else (), (result or {}).get("started", begun),
    )  # fmt: skip


def _state(folder: Path, result: Mapping[str, Any] | None) -> State:
    if is_locked(folder / SAMPLES):
        return "running"
    if result is None:
        return "unfinished"
    if result.get("lost"):
        return "incomplete"
    return "finished" if all(gate["ok"] for gate in result.get("health", [])) else "unhealthy"


def _scores(result: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """The first metric of each task."""
    first = {line["task"]: line for line in reversed(result["lines"])}
    return tuple(
        TaskScore(task, line["metric"], line["score"], line["low"], line["high"], line["n"])
        for task, line in reversed(first.items())
    )
