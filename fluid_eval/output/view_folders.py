"""The runs and sweeps below a folder, as `fluid-eval view` lists them. Reads files alone, and writes none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested, read_json

from ..results.run_folder import POINTS, RESULT, SAMPLES, SPEC, SWEEP
from ..sweeps.points import method_of

Kind = Literal["run", "sweep", "point"]
State = Literal["finished", "running", "stopped", "damaged"]
DEPTH = 4
"""Folders below the first one that are looked into."""
SILENT = 120.0
"""Seconds without a new sample after which an unfinished run counts as stopped."""


@dataclass(frozen=True)
class Entry:
    """A run, a sweep, or a point of one.

    name: its path below the folder that is served; no other path is ever opened.  about: a point's name in its sweep.
    answered: samples stored so far, of an unfinished run.  age: seconds since the last write.
    scores: (task, metric, score, low, high) of the first metric of each task.
    """

    name: str
    kind: Kind
    state: State
    folder: Path
    model: str = ""
    decoder: str = ""
    tasks: tuple[str, ...] = ()
    started: str = ""
    age: float = 0.0
    answered: int = 0
    scores: tuple[tuple[str, str, float | None, float | None, float | None], ...] = ()
    tokens_per_forward: float | None = None
    points: int = 0
    problem: str = ""
    about: str = ""

    def matches(self, words: str) -> bool:
        """Whether every word occurs in its name, model, decoder, tasks or state."""
        text = " ".join((self.name, self.about, self.kind, self.model, self.decoder, *self.tasks, self.state)).lower()
        return all(word in text for word in words.lower().split())


def entries(root: Path) -> dict[str, Entry]:
    """Everything below a folder by name, last written first. Links are not followed: nothing leads out of it."""
    listed = [entry for folder in _folders(root) for entry in _entries(root, folder)]
    listed.sort(key=lambda entry: entry.age)
    return {entry.name: entry for entry in listed}


def _folders(root: Path) -> Iterator[Path]:
    """Folders below root that hold a run or a sweep, points of sweeps left out."""
    for place, below, files in os.walk(root, followlinks=False):
        folder = Path(place)
        below[:] = sorted(name for name in below if not name.startswith(".") and not (folder / name).is_symlink())
        if SWEEP in files or SPEC in files:
            below[:] = []
            yield folder
        elif len(folder.relative_to(root).parts) >= DEPTH:
            below[:] = []


def _entries(root: Path, folder: Path) -> Iterator[Entry]:
    """A run, or a sweep with its points."""
    name = folder.relative_to(root).as_posix()
    if not (folder / SWEEP).is_file():
        yield _run(name, folder, "run")
        return
    try:
        planned = {Path(str(p["folder"])).name: str(p["name"]) for p in read_json(folder / SWEEP).get("points", [])}
    except (ConfigError, OSError, KeyError, TypeError):
        planned = {}  # a sweep whose file is damaged still has its points
    points = [
        replace(_run(f"{name}/{POINTS}/{point.name}", point, "point"), about=planned.get(point.name, ""))
        for point in sorted((folder / POINTS).glob("*"))
        if (point / SPEC).is_file() and not point.is_symlink()
    ]
    yield _sweep(name, folder, points)
    yield from points


def _sweep(name: str, folder: Path, points: list[Entry]) -> Entry:
    is_finished = (folder / RESULT).is_file()
    age = min((point.age for point in points), default=_age(folder / SWEEP))
    return Entry(
        name=name,
        kind="sweep",
        state="finished" if is_finished else "running" if age < SILENT else "stopped",
        folder=folder,
        model=", ".join(dict.fromkeys(point.model for point in points)),
        decoder=", ".join(dict.fromkeys(point.decoder for point in points)),
        tasks=points[0].tasks if points else (),
        started=min((point.started for point in points if point.started), default=""),
        age=age,
        answered=sum(point.answered for point in points),
        points=len(points),
    )


def _run(name: str, folder: Path, kind: Kind) -> Entry:
    age = _age(folder / SAMPLES, folder / SPEC)
    try:
        spec = read_json(folder / SPEC)
        result = read_json(folder / RESULT) if (folder / RESULT).is_file() else None
        return _described(name, folder, kind, spec, result, age)
    except (ConfigError, RunError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Entry(name, kind, "damaged", folder, age=age, problem=str(error) or type(error).__name__)


def _described(name: str, folder: Path, kind: Kind, spec: Nested, result: Nested | None, age: float) -> Entry:
    decoder: Mapping[str, Any] = spec["decoder"]
    lines: dict[str, Mapping[str, Any]] = {}
    for line in (result or {}).get("lines", []):
        lines.setdefault(line["task"], line)
    counted = [line for line in lines.values() if line.get("tokens_per_forward")]
    tokens = sum(line["tokens"] for line in counted)
    forwards = sum(line["forwards"] for line in counted)
    return Entry(
        name=name,
        kind=kind,
        state="finished" if result else "running" if age < SILENT else "stopped",
        folder=folder,
        model=Path(str(spec["model"]["path"]).rstrip("/")).name,
        decoder=method_of(str(decoder["name"]), decoder.get("verify")),
        tasks=tuple(map(str, spec["tasks"])),
        started=str((result or {}).get("started", "")),
        age=age,
        answered=0 if result else _lines(folder / SAMPLES),
        scores=tuple(
            (line["task"], line["metric"], line.get("score"), line.get("low"), line.get("high"))
            for line in lines.values()
        ),
        tokens_per_forward=tokens / forwards if forwards else None,
    )


def _age(*files: Path) -> float:
    """Seconds since the last write of the first file that exists."""
    for file in files:
        try:
            return max(0.0, time.time() - file.stat().st_mtime)
        except OSError:
            continue
    return float("inf")


def _lines(file: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    try:
        with file.open("rb") as samples:
            return sum(block.count(b"\n") for block in iter(lambda: samples.read(1 << 20), b""))
    except OSError:
        return 0
