"""The claim ledger (reports/claims.toml): what was published, by whom, of which weights, under which convention.

[[source]]   where cells stand: a paper's table, a model card, this project's own measurement
[[decoder]]  a way of writing that cells name
[[system]]   weights and how they write: what is needed to measure a claim again
[[claim]]    one published cell
[[ranking]]  what a text says of two systems' cells
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fluid_model.common.errors import ConfigError
from fluid_model.common.fields import at_least, build
from fluid_model.common.files import Nested, read_toml
from fluid_model.settings import check_range

from ..benchmarks.datasets import DATASETS
from ..common.paths import resource

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
KINDS = ("source", "decoder", "system", "claim", "ranking")
UNKNOWN = "unknown: "
SIZES: Mapping[str, int] = {"math": 5000, "mbpp": 500, "ifeval": 541, "mmlu_pro": 12032}
"""Questions of test sets that no task here is of (MBPP: its test split; others use 974, 427 or 378 of it)."""


@dataclass(frozen=True)
class Source:
    """Where cells stand.

    by: whose it is, where they wrote more than one.  whole: tables of it of which the ledger holds every row, so that
    what is missing is missing there.  generated: a program wrote it, so that two equal columns are no slip.  ours: it
    is this project's, so that its cells are no claims of others.  second_hand: read in others' notes, not itself.
    """

    name: str
    cite: str
    by: str = ""
    whole: tuple[Table, ...] = ()
    generated: bool = False
    ours: bool = False
    second_hand: bool = False


@dataclass(frozen=True)
class Decoder:
    """A way of writing. run: a run's decoder settings for it."""

    name: str
    about: str
    run: dict[str, Any]

    @property
    def verifies(self) -> bool:
        """Whether its text is greedy AR's of the same weights, so that no setting of it moves a score."""
        return self.run.get("name") == "fluid" and bool(self.run.get("verify", True))


@dataclass(frozen=True)
class System:
    """Weights, and how they write.

    weights: the model's folder below --models-dir, or a bundled checkpoint.  hub: its id, where known.  parent: the
    system it was adapted from.  own: the sources in which its authors report on it.  same_as: the system that this row
    of an ablation is.  stride_of: the system that this one differs from in its stride alone, as its source tells it.
    decoders: how it writes is a matter of dispute, so that each cell of it says which way it means.  device: what it
    takes at least.  run: settings of runs that measure it.
    """

    name: str
    weights: str
    hub: str = ""
    parent: str = ""
    own: tuple[str, ...] = ()
    same_as: str = ""
    stride_of: str = ""
    decoders: bool = False
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
    neither it is not stated.  decoder: the way of writing it means, by name, or "unknown: " and why that is.  where: in
    its source.  parts: tasks that a mean is over.  n: questions behind it, where not the whole test set.  margin:
    within which a measured value is the same, in its unit.  hardware: of speeds.  decimals: as published, where the
    value as a number does not show them (2.00, 3700).  run: settings beside the system's.
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
    decoder: str = ""
    where: str = ""
    parts: tuple[str, ...] = ()
    n: int | None = None
    margin: float | None = None
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
        at_least("n", self.n, 1)
        if self.margin is not None:
            check_range("margin", self.margin, 0, 10**6, open_low=True)
        if self.decimals is not None:
            check_range("decimals", self.decimals, 0, 9)
        if self.metric != NOT_A_SCORE.get(self.unit, self.metric):
            raise ConfigError(f"metric={self.metric!r}: unit {self.unit} is of {NOT_A_SCORE[self.unit]}")
        if self.profile and self.convention:
            raise ConfigError(
                f"convention={self.convention!r}: profile={self.profile!r} says it; leave one of both out"
            )

    @property
    def decoder_unknown(self) -> bool:
        """Whether its source leaves open how it was written."""
        return self.decoder.startswith(UNKNOWN)

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
        where = f", {self.where}" if self.where else ""
        return f"{self.system} {self.task} {self.value:g}{until}{unit} ({self.source}{where})"


@dataclass(frozen=True)
class Ranking:
    """What a text says of cells of its own: one system is better than another. says: its words or their sense.
    tasks: those it says it of, all tasks of both where it names none.
    """

    source: str
    better: str
    than: str
    says: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """All claims, in file order, with the systems and sources they name."""

    claims: tuple[Claim, ...]
    systems: Mapping[str, System]
    sources: Mapping[str, Source]
    decoders: Mapping[str, Decoder] = field(default_factory=dict)
    rankings: tuple[Ranking, ...] = ()

    def ours(self, claim: Claim) -> bool:
        """Whether a claim is this project's own figure."""
        return self.sources[claim.source].ours


def task_size(task: str) -> int | None:
    """Questions of a benchmark's canonical test set; None where this package does not know it."""
    return DATASETS[task].known["test"][0] if task in DATASETS else SIZES.get(task)


def published_n(claim: Claim) -> int | None:
    """Questions behind a published score, as far as they are known."""
    return claim.n or task_size(claim.task)


def read_claims(file: Path | None = None) -> Ledger:
    """A ledger, default: the bundled one. Raises ConfigError naming the file, the entry and what is wrong with it."""
    file = file or resource("reports") / "claims.toml"
    values = read_toml(file)
    if unknown := values.keys() - set(KINDS):
        raise ConfigError(f"{file}: {sorted(unknown)[0]} is no table of a claim ledger; known: {', '.join(KINDS)}")
    sources: dict[str, Source] = {one.name: one for one in _entries(file, values, "source", Source)}
    systems: dict[str, System] = {one.name: one for one in _entries(file, values, "system", System)}
    decoders: dict[str, Decoder] = {one.name: one for one in _entries(file, values, "decoder", Decoder)}
    claims: list[Claim] = list(_entries(file, values, "claim", Claim))
    rankings: list[Ranking] = list(_entries(file, values, "ranking", Ranking))
    ledger = Ledger(tuple(claims), systems, sources, decoders, tuple(rankings))
    _check_names(file, ledger)
    cells = Counter((c.table, c.system, c.task, c.metric, c.source, c.where, c.convention or c.profile) for c in claims)
    if twice := [" ".join(cell[1:4]) for cell, count in cells.items() if count > 1]:
        raise ConfigError(f"{file}: {twice[0]} stands twice under one convention of one source")
    return ledger


def _check_names(file: Path, ledger: Ledger) -> None:
    """Raise ConfigError where an entry names another that is not there, or a cell of a disputed decoder names none."""
    for system in ledger.systems.values():
        named = [(name, getattr(system, name)) for name in ("parent", "same_as", "stride_of")]
        for name, value in [*named, *(("own", source) for source in system.own)]:
            if value and value not in (ledger.sources if name == "own" else ledger.systems):
                raise ConfigError(f"{file}, system {system.name}: {name}={value!r} is not in the ledger")
    for number, claim in enumerate(ledger.claims, 1):
        where = f"{file}, claim {number} ({claim.cell})"
        for name, value in (("system", claim.system), ("source", claim.source)):
            if value not in (ledger.systems if name == "system" else ledger.sources):
                raise ConfigError(f"{where}: {name}={value!r} is not in the ledger")
        if claim.decoder and not claim.decoder_unknown and claim.decoder not in ledger.decoders:
            raise ConfigError(f"{where}: decoder={claim.decoder!r} is not in the ledger, nor 'unknown: ' with a reason")
        if not claim.decoder and ledger.systems[claim.system].decoders:
            raise ConfigError(f"{where}: decoder is missing: name the one it means, or 'unknown: ' and why")
    for number, ranking in enumerate(ledger.rankings, 1):
        for name in ("source", "better", "than"):
            if getattr(ranking, name) not in (ledger.sources if name == "source" else ledger.systems):
                raise ConfigError(f"{file}, ranking {number}: {name}={getattr(ranking, name)!r} is not in the ledger")


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
        if hasattr(built, "name") and built.name in seen:
            raise ConfigError(f"{where}: stands twice")
        seen.add(getattr(built, "name", number))
        yield built
