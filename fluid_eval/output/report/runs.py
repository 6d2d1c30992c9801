"""Finished run folders, read and named for a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import read_json

from ...results import speed_repeats as repeats
from ...results.finished_runs import read_finished
from ...results.run_folder import AUDIT, ENVIRONMENT, KHEAD, POINTS, RESULT, SPEC, SWEEP, Record
from ...results.speed_repeats import Repeat
from ...results.stored_values import AUDIT_HOLDS, KHEAD_HOLDS, read_beside, read_environment, read_spec
from ...sweeps.label_places import in_short

Nested = dict[str, Any]
_SPEC_NEEDED = ("id", "tasks", "model", "decoder")
_NEEDED = {"model", "decoder", "started", "wall_seconds", "lines", "members", "parts", "data", "notices"}


@dataclass(frozen=True)
class ReportRun:
    """A finished run folder with its place in the report.

    mark: its letter on the page.  name: model, decoder and the settings that distinguish it from the other runs.
    owners: leaf task -> task of the spec.  audit, khead: None where that was not done.
    repeats: its speed repeats.
    """

    folder: Path
    mark: str
    name: str
    spec: Nested
    result: Nested
    environment: Nested
    records: Sequence[Record]
    owners: Mapping[str, str]
    audit: Nested | None
    khead: Nested | None
    repeats: Sequence[Repeat] = ()


def read_runs(folders: Sequence[Path], base: Path | None = None) -> tuple[list[ReportRun], str]:
    """The runs of these folders, the base first and the others in order, and the reason for the choice of the base.

    A sweep's folder stands for its finished points, in its spec's order.
    base: one of the run folders. Default: the first AR point if a sweep is named first, else the first run.
    Raises ConfigError naming a folder without a run, with an unfinished one, or with other samples than its result's.
    """
    # 1) the folders, the base in front
    paths, why = _base_first([run for folder in folders for run in _runs_of(folder)], folders[0], base)
    if twice := [path for path, count in Counter(path.resolve() for path in paths).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: is named twice; name each run once")
    # 2) their results, specs and names
    finished = [read_finished(path, _NEEDED, shown=True) for path in paths]
    specs = [read_spec(path / SPEC, _SPEC_NEEDED) for path in paths]
    names = _names(paths, specs)
    runs = [
        _with_rest(path, _mark(place), names[place], specs[place], *finished[place])
        for place, path in enumerate(paths)
    ]  # fmt: skip
    return runs, why


def _base_first(runs: list[Path], first: Path, base: Path | None) -> tuple[list[Path], str]:
    """Run folders with the base in front, and the reason for it. first: the folder that was named first."""
    if base is not None:
        chosen = next((run for run in runs if run.resolve() == base.resolve()), None)
        if chosen is None:
            raise ConfigError(f"--base {base}: is none of the runs: {', '.join(map(str, runs))}")
        why = "as --base says"
    elif (first / POINTS).is_dir():
        autoregressive = (run for run in runs if first in run.parents and _decoder(run) == "ar")
        chosen = next(autoregressive, runs[0])
        why = "the sweep's first AR point" if _decoder(chosen) == "ar" else "the sweep's first point"
    else:
        chosen, why = runs[0], "the run named first"
    at = runs.index(chosen)
    return [chosen, *runs[:at], *runs[at + 1 :]], why


def _decoder(run: Path) -> Any:
    return str(read_spec(run / SPEC, _SPEC_NEEDED)["decoder"]["name"]) if (run / SPEC).is_file() else None


def flat(values: Nested, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _runs_of(folder: Path) -> list[Path]:
    """The folder itself, or a sweep's finished points in its spec's order."""
    points = folder / POINTS
    if not points.is_dir():
        return [folder]
    planned = read_json(folder / SWEEP).get("points", []) if (folder / SWEEP).is_file() else []
    order = [Path(str(point["folder"])).name for point in planned]
    finished = sorted(point for point in points.iterdir() if (point / RESULT).is_file())
    runs = sorted(finished, key=lambda run: order.index(run.name) if run.name in order else len(order))
    if not runs:
        raise ConfigError(f"{folder}: no point of this sweep is finished; go on with fluid-eval sweep --resume")
    return runs


def _with_rest(
    folder: Path, mark: str, name: str, spec: Nested, result: Nested, records: Sequence[Record]
) -> ReportRun:
    """A finished run with its environment, audit, K-head diagnostics and speed repeats."""
    owners = {leaf: task for task, leaves in result["members"].items() for leaf in leaves}
    audit, khead = read_beside(folder / AUDIT, AUDIT_HOLDS), read_beside(folder / KHEAD, KHEAD_HOLDS)
    environment, timings = read_environment(folder / ENVIRONMENT), repeats.read(folder)
    return ReportRun(folder, mark, name, spec, result, environment, records, owners, audit, khead, timings)


def _mark(place: int) -> str:
    return ascii_uppercase[place] if place < len(ascii_uppercase) else str(place + 1)


def _names(folders: Sequence[Path], specs: Sequence[Nested]) -> list[str]:
    """Model and decoder, the settings in which runs of the same two differ, and the folder where none does."""
    bases = [f"{model_name(spec)} · {spec['decoder']['name']}" for spec in specs]
    settings = [dict(flat(spec)) for spec in specs]
    names = []
    for base, own in zip(bases, settings, strict=True):
        alike = [other for other, of in zip(settings, bases, strict=True) if of == base]
        differing = {key: value for key, value in own.items() if any(o.get(key) != value for o in alike)}
        shown = in_short([{key: value for key, value in differing.items() if key.startswith(("decoder.", "model."))}])
        names.append(f"{base} · {shown}" if shown else base)
    return [
        name if names.count(name) == 1 else f"{name} · {folder.name}"
        for name, folder in zip(names, folders, strict=True)
    ]


def model_name(spec: Nested) -> str:
    """A model's name without its folders."""
    return Path(spec["model"]["path"].rstrip("/")).name
