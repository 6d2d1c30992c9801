"""Finished runs as the report's pages need them."""

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
from ...results.run_folder import AUDIT, ENVIRONMENT, KHEAD, POINTS, RESULT, SPEC, SWEEP, Record, read_finished
from ...results.speed_repeats import Repeat
from ...results.stored_values import AUDIT_HOLDS, KHEAD_HOLDS, read_beside, read_environment, read_spec
from ...sweeps.frontier_files import short

Nested = dict[str, Any]
_SPEC_NEEDED = ("id", "tasks", "model", "decoder")
_NEEDED = {"model", "decoder", "started", "wall_seconds", "lines", "members", "parts", "data", "notices"}


@dataclass(frozen=True)
class Stored:
    """A run folder, read. mark: its letter on the page.  name: what tells it from the others of the page.

    owners: leaf task -> task of the spec.  audit, khead: None where that was not done.
    repeats: of its answers, for their time.
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


def read_runs(folders: Sequence[Path], base: Path | None = None) -> tuple[list[Stored], str]:
    """The runs of these folders, the base first, the others in order, and why it is the base.

    A sweep's folder stands for its finished points, in its spec's order. base: one of the run folders; else it is the
    first of a sweep's points that writes token by token, if a sweep is named first, else the first run.
    Raises ConfigError naming the folder that holds no run, an unfinished one, or not the samples of its result.
    """
    found, why = _base_first([run for folder in folders for run in _runs_of(folder)], folders[0], base)
    if twice := [folder for folder, count in Counter(folder.resolve() for folder in found).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: is named twice; name each run once")
    finished = [read_finished(folder, _NEEDED, shown=True) for folder in found]
    specs = [read_spec(folder / SPEC, _SPEC_NEEDED) for folder in found]
    named = zip(found, specs, _names(found, specs), finished, strict=True)
    runs = [
        _with_rest(folder, _mark(place), name, spec, result, records)
        for place, (folder, spec, name, (result, records)) in enumerate(named)
    ]
    return runs, why


def _base_first(found: list[Path], first: Path, base: Path | None) -> tuple[list[Path], str]:
    """Run folders with the base in front, and why it is. first: the folder that was named first."""
    if base is not None:
        chosen = next((run for run in found if run.resolve() == base.resolve()), None)
        if chosen is None:
            raise ConfigError(f"--base {base}: is none of the runs: {', '.join(map(str, found))}")
        why = "as --base says"
    elif (first / POINTS).is_dir():
        token_by_token = (run for run in found if first in run.parents and _decoder(run) == "ar")
        chosen = next(token_by_token, found[0])
        why = "the sweep's first AR point" if _decoder(chosen) == "ar" else "the sweep's first point"
    else:
        chosen, why = found[0], "the run named first"
    at = found.index(chosen)
    return [chosen, *found[:at], *found[at + 1 :]], why


def _decoder(run: Path) -> Any:
    return str(read_spec(run / SPEC, _SPEC_NEEDED)["decoder"]["name"]) if (run / SPEC).is_file() else None


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
    held = read_json(folder / SWEEP).get("points", []) if (folder / SWEEP).is_file() else []
    order = [Path(str(point["folder"])).name for point in held]
    finished = sorted(point for point in points.iterdir() if (point / RESULT).is_file())
    found = sorted(finished, key=lambda run: order.index(run.name) if run.name in order else len(order))
    if not found:
        raise ConfigError(f"{folder}: no point of this sweep is finished; go on with fluid-eval sweep --resume")
    return found


def _with_rest(folder: Path, mark: str, name: str, spec: Nested, result: Nested, records: Sequence[Record]) -> Stored:
    """A finished run with what else its folder holds."""
    owners = {leaf: task for task, leaves in result["members"].items() for leaf in leaves}
    audit, khead = read_beside(folder / AUDIT, AUDIT_HOLDS), read_beside(folder / KHEAD, KHEAD_HOLDS)
    environment, again = read_environment(folder / ENVIRONMENT), repeats.read(folder)
    return Stored(folder, mark, name, spec, result, environment, records, owners, audit, khead, again)


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
