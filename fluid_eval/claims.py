"""The claim ledger (reports/claims.toml): what was published, by whom, of which weights, under which convention.

[[source]]   where cells stand: a paper's table, a model card, this project's own measurement
[[system]]   weights and how they write: what is needed to measure a claim again
[[claim]]    one published cell
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fluid_model.errors import ConfigError
from fluid_model.fields import build
from fluid_model.files import Nested, read_toml
from fluid_model.settings import check_range

from .paths import resource

Table = Literal["tiny", "main", "ablation", "speed", "own"]
TABLES: tuple[Table, ...] = get_args(Table)
Unit = Literal["%", "tok/s", "tok/forward", "tok/round", "times"]
NOT_A_SCORE: Mapping[Unit, str] = {
    "tok/s": "tokens_per_second",
    "tok/forward": "tokens_per_forward",
    "tok/round": "stride",
    "times": "speed-up",
}
"""Units that are no shares, and the metric each is of."""

UNSTATED = "not stated"
UNSTATED_CONVENTION = f"convention {UNSTATED}"


@dataclass(frozen=True)
class Source:
    """Where cells stand.

    whole: tables of it of which the ledger holds every row, so that what is missing is missing there.  generated: a
    program wrote it, so that two equal columns are no slip.
    """

    name: str
    cite: str
    whole: tuple[Table, ...] = ()
    generated: bool = False


@dataclass(frozen=True)
class System:
    """Weights, and how they write.

    weights: the model's folder below --models-dir, or a bundled checkpoint.  hub: its id, where known.  parent: the
    system it was adapted from.  own: the sources in which its authors report on it.  same_as: the system that this row
    of an ablation is.  device: what it takes at least.  run: settings of runs that measure it.
    """

    name: str
    weights: str
    hub: str = ""
    parent: str = ""
    own: tuple[str, ...] = ()
    same_as: str = ""
    device: Literal["cpu", "cuda"] = "cuda"
    run: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "," in self.name:
            raise ConfigError(f"name={self.name!r} must hold no comma: --systems lists names between commas")


@dataclass(frozen=True)
class Claim:
    """One published cell.

    task: a task, or a group for what is measured over all its members.  metric: "name" or "name,filter" of a score, or
    what its unit is of (NOT_A_SCORE).  value: as published, percent for scores.  to: the upper end, where a range was.
    profile: the convention it follows, if that is one of this package's; else convention tells it in words, and with
    neither it is not stated.  hardware: of speeds.  decimals: as published, where the value as a number does not show
    them (2.00, 3700).  run: settings beside the system's.
    """

    table: Table
    system: str
    task: str
    metric: str
    value: float
    source: str
    to: float | None = None
    unit: Unit = "%"
    profile: str = ""
    convention: str = ""
    hardware: str = ""
    note: str = ""
    decimals: int | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("system", "task", "metric", "source"):
            if not getattr(self, name):
                raise ConfigError(f"{name}='' must be a name")
        check_range("value", self.value, 0, 100 if self.unit == "%" else 10**6)
        if self.to is not None:
            check_range("to", self.to, self.value, 100 if self.unit == "%" else 10**6)
        if self.decimals is not None:
            check_range("decimals", self.decimals, 0, 9)
        if self.metric != NOT_A_SCORE.get(self.unit, self.metric):
            raise ConfigError(f"metric={self.metric!r}: unit {self.unit} is of {NOT_A_SCORE[self.unit]}")
        if self.profile and self.convention:
            raise ConfigError(
                f"convention={self.convention!r}: profile={self.profile!r} says it; leave one of both out"
            )

    @property
    def stated(self) -> str:
        """The convention, as far as it is known."""
        return self.profile or self.convention or UNSTATED

    @property
    def rounding(self) -> float:
        """Half a unit of the last digit published: what a rounded value may be off by."""
        shown = len(repr(self.value).partition(".")[2])
        return 0.5 * 10.0 ** -(shown if self.decimals is None else self.decimals)

    @property
    def cell(self) -> str:
        """For messages: system, task, value."""
        until = "" if self.to is None else f" to {self.to:g}"
        unit = "" if self.unit == "%" else f" {self.unit}"
        return f"{self.system} {self.task} {self.value:g}{until}{unit} ({self.source})"


@dataclass(frozen=True)
class Ledger:
    """All claims, in file order, with the systems and sources they name."""

    claims: tuple[Claim, ...]
    systems: Mapping[str, System]
    sources: Mapping[str, Source]


def read_claims(file: Path | None = None) -> Ledger:
    """A ledger, default: the bundled one. Raises ConfigError naming the file, the entry and what is wrong with it."""
    file = file or resource("reports") / "claims.toml"
    values = read_toml(file)
    if unknown := values.keys() - {"source", "system", "claim"}:
        raise ConfigError(f"{file}: {sorted(unknown)[0]} is no table of a claim ledger; known: source, system, claim")
    sources: dict[str, Source] = {one.name: one for one in _entries(file, values, "source", Source)}
    systems: dict[str, System] = {one.name: one for one in _entries(file, values, "system", System)}
    claims: list[Claim] = list(_entries(file, values, "claim", Claim))
    for system in systems.values():
        named = [("parent", system.parent), ("same_as", system.same_as), *(("own", source) for source in system.own)]
        for name, value in named:
            if value and value not in (sources if name == "own" else systems):
                raise ConfigError(f"{file}, system {system.name}: {name}={value!r} is not in the ledger")
    for number, claim in enumerate(claims, 1):
        for name, value in (("system", claim.system), ("source", claim.source)):
            if value not in (systems if name == "system" else sources):
                raise ConfigError(f"{file}, claim {number} ({claim.cell}): {name}={value!r} is not in the ledger")
    cells = Counter((c.table, c.system, c.task, c.metric, c.source, c.convention or c.profile) for c in claims)
    if twice := [" ".join(cell[1:4]) for cell, count in cells.items() if count > 1]:
        raise ConfigError(f"{file}: {twice[0]} stands twice under one convention of one source")
    return Ledger(tuple(claims), systems, sources)


def _entries(file: Path, values: Nested, kind: str, cls: type[Any]) -> Iterator[Any]:
    """Entries of one kind, each checked."""
    entries = values.get(kind, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{file}: {kind} must be tables: [[{kind}]]")
    seen = set()
    for number, entry in enumerate(entries, 1):
        called = " ".join(str(entry[name]) for name in ("name", "system", "task") if name in entry)
        where = f"{file}, {kind} {number}{f' ({called})' if called else ''}"
        try:
            built = build(cls, entry)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if kind != "claim" and built.name in seen:
            raise ConfigError(f"{where}: stands twice")
        seen.add(getattr(built, "name", number))
        yield built
