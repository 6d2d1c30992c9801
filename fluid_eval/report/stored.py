"""Finished runs as the report's pages need them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from fluid_model.errors import ConfigError
from fluid_model.files import read_json

from ..frontier import short
from ..store import AUDIT, ENVIRONMENT, KHEAD, POINTS, RESULT, SAMPLES, SPEC, Record, read_samples

Nested = dict[str, Any]
_NEEDED = {"model", "decoder", "started", "wall_seconds", "lines", "members", "parts", "data", "notices"}


@dataclass(frozen=True)
class Stored:
    """A run folder, read. mark: its letter on the page.  name: what tells it from the others of the page.

    owners: leaf task -> task of the spec.  audit, khead: None where that was not done.
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


def read_runs(folders: Sequence[Path]) -> list[Stored]:
    """The runs of these folders, in order; a sweep's folder stands for its finished points.

    Raises ConfigError naming the folder that holds no run, an unfinished one, or not the samples of its result.
    """
    found = [run for folder in folders for run in _runs_of(folder)]
    if twice := [folder for folder, count in Counter(folder.resolve() for folder in found).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: is named twice; name each run once")
    for folder in found:
        _check_finished(folder)
    specs = [read_json(folder / SPEC) for folder in found]
    return [
        _read(folder, spec, mark=_mark(place), name=name)
        for place, (folder, spec, name) in enumerate(zip(found, specs, _names(found, specs), strict=True))
    ]


def flat(values: Nested, where: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{where}{name}.")
        else:
            yield where + name, value


def _runs_of(folder: Path) -> list[Path]:
    points = folder / POINTS
    if not points.is_dir():
        return [folder]
    found = sorted(point for point in points.iterdir() if (point / RESULT).is_file())
    if not found:
        raise ConfigError(f"{folder}: no point of this sweep is finished; go on with fluid-eval sweep --resume")
    return found


def _check_finished(folder: Path) -> None:
    if not (folder / SPEC).is_file():
        raise ConfigError(f"{folder}: no run here (no {SPEC}); name the folder that fluid-eval run --out wrote")
    if not (folder / RESULT).is_file():
        raise ConfigError(f"{folder}: this run is not finished (no {RESULT}); run it again with --resume first")


def _read(folder: Path, spec: Nested, *, mark: str, name: str) -> Stored:
    result = read_json(folder / RESULT)
    if missing := _NEEDED - result.keys():
        raise ConfigError(f"{folder / RESULT}: lacks {', '.join(sorted(missing))}; run again into another --out")
    records = list(read_samples(folder))
    owners = {leaf: task for task, leaves in result["members"].items() for leaf in leaves}
    _check_whole(folder, result, Counter(owners.get(record["task"]) for record in records))
    others = [folder / ENVIRONMENT, folder / AUDIT, folder / KHEAD]
    environment, audit, khead = (read_json(file) if file.is_file() else None for file in others)
    return Stored(folder, mark, name, spec, result, environment or {}, records, owners, audit, khead)


def _check_whole(folder: Path, result: Nested, found: Mapping[str | None, int]) -> None:
    """Raise ConfigError if the samples, counted by task, are not those the result was made from."""
    for line in result["lines"]:
        if found.get(line["task"], 0) < line["n"]:
            raise ConfigError(
                f"{folder / SAMPLES}: {found.get(line['task'], 0)} samples of {line['task']}, the result has "
                f"{line['n']}; run it again into another --out"
            )
    if None in found:
        raise ConfigError(f"{folder / SAMPLES}: holds samples of tasks that the result does not have")


def _mark(place: int) -> str:
    return ascii_uppercase[place] if place < len(ascii_uppercase) else str(place + 1)


def _names(folders: Sequence[Path], specs: Sequence[Nested]) -> list[str]:
    """Model and decoder, with the settings that tell runs of the same two apart, with the folder where none does."""
    bases = [f"{model_name(spec)} · {spec['decoder']['name']}" for spec in specs]
    settings = [dict(flat(spec)) for spec in specs]
    names = []
    for base, own in zip(bases, settings, strict=True):
        alike = [other for other, of in zip(settings, bases, strict=True) if of == base]
        differing = {key: value for key, value in own.items() if any(o.get(key) != value for o in alike)}
        told = short({key: value for key, value in differing.items() if key.startswith(("decoder.", "model."))})
        names.append(f"{base} · {told}" if told else base)
    return [
        name if names.count(name) == 1 else f"{name} · {folder.name}"
        for name, folder in zip(names, folders, strict=True)
    ]


def model_name(spec: Nested) -> str:
    """A model's last name, without the folders it lies in."""
    return Path(spec["model"]["path"].rstrip("/")).name
