"""The claim ledger (reports/claims.toml): published numbers with their source, weights and convention.

[[source]]   a publication: a paper's table, a model card, this project's own measurement
[[decoder]]  a decoder that claims name, with its settings
[[system]]   weights and their decoder: what is needed to measure a claim again
[[claim]]    one published cell
[[ranking]]  a statement of a text that one system is better than another

A claim: the value of one cell, its place, and the convention and decoder that its source states.

    { table = "main", system = "FLUID-7B", task = "gsm8k", metric = "exact_match,none", value = 91.9,
      source = "FLUID README and card", profile = "fluid-paper", decoder = "fluid (b)" }
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
from fluid_model.registry import claims_lossless
from fluid_model.settings import check_range

from ..benchmarks.datasets import DATASETS
from ..common.paths import resource

Table = Literal["tiny", "smol", "main", "ablation", "speed", "own", "field"]
TABLES: tuple[Table, ...] = get_args(Table)
Unit = Literal["%", "tok/s", "tok/forward", "tok/round", "times"]
NOT_A_SCORE: Mapping[Unit, str] = {
    "tok/s": "tokens_per_second",
    "tok/forward": "tokens_per_forward",
    "tok/round": "stride",
    "times": "speed-up",
}
"""Units other than percent, and the metric of each."""

UNSTATED = "not stated"
UNSTATED_CONVENTION = f"convention {UNSTATED}"
KINDS = ("source", "decoder", "system", "claim", "ranking")
UNKNOWN = "unknown: "
SIZES: Mapping[str, int] = {
    "math": 5000, "minerva_math": 5000, "mbpp": 500, "mbpp_instruct": 500, "ifeval": 541, "mmlu_pro": 12032,
    "gsm8k_cot": 1319, "humaneval_instruct": 164, "humaneval_plus": 164, "mbpp_plus": 378, "hellaswag": 10042,
}  # fmt: skip
"""Sizes of test sets without a task here (MBPP: its test split; others use 974, 427 or 378 questions of it)."""


@dataclass(frozen=True)
class PublishedSource:
    """A publication that claims come from.

    by: its authors, where they published more than one.
    complete: its tables of which the ledger holds every row, so that a missing row is missing there.
    generated: written by a program, so that two equal columns are no typing error.
    ours: this project's, so that its cells are not claims of others.
    second_hand: known from others' notes alone.
    """

    name: str
    cite: str
    by: str = ""
    complete: tuple[Table, ...] = ()
    generated: bool = False
    ours: bool = False
    second_hand: bool = False


@dataclass(frozen=True)
class PublishedDecoder:
    """A decoder that claims name. run: its settings in a run."""

    name: str
    about: str
    run: dict[str, Any]

    @property
    def verifies(self) -> bool:
        """Whether it is lossless: its text is greedy AR's of the same weights, whatever its settings."""
        return claims_lossless(self.run)


@dataclass(frozen=True)
class System:
    """Weights and their decoder: one row of a published table.

    weights: the model's folder below --models-dir, a bundled checkpoint, or a packaged model.
    hub: its id, where known.  parent: the system it was adapted from.
    own: sources in which its own authors report on it.
    same_as: the system that this row of an ablation repeats.
    stride_of: the system from which this one differs in its stride alone, by its source.
    decoders: its decoder is disputed, so that each of its claims must name one.
    device: the least it needs.  run: settings of runs that measure it.
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

    task: a task, or a group whose members are measured together.
    metric: "name" or "name,filter" of a score; for other units the name in NOT_A_SCORE.
    value: as published, percent for scores.  to: the upper end of a published range.
    profile: the stated convention, if this package has it.  convention: a stated one in words. With neither, the
    convention is not stated.
    decoder: by name, or "unknown: " and the reason.  where: place in the source.
    parts: tasks that a mean is over.  n: questions behind it, if not the whole test set.
    margin: largest difference that counts as the same value, in its unit.  hardware: of speeds.
    decimals: published digits, where the number does not show them (2.00, 3700).
    run: settings beside the system's.
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
            raise ConfigError(f"metric={self.metric!r}: unit {self.unit} needs {NOT_A_SCORE[self.unit]}")
        if self.profile and self.convention:
            raise ConfigError(
                f"convention={self.convention!r}: profile={self.profile!r} states it too; leave one of both out"
            )

    @property
    def decoder_unknown(self) -> bool:
        """Whether its source leaves the decoder open."""
        return self.decoder.startswith(UNKNOWN)

    @property
    def stated(self) -> str:
        """The stated convention, or "not stated"."""
        return self.profile or self.convention or UNSTATED

    @property
    def rounding(self) -> float:
        """Half a unit of the last published digit: the largest rounding error."""
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
    """A source's statement that one of its systems is better than another.

    says: its words, or their sense.  tasks: the tasks it is about; all common tasks if it names none.
    """

    source: str
    better: str
    than: str
    says: str
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """All claims, in file order, with the systems, sources and decoders they name."""

    claims: tuple[Claim, ...]
    systems: Mapping[str, System]
    sources: Mapping[str, PublishedSource]
    decoders: Mapping[str, PublishedDecoder] = field(default_factory=dict)
    rankings: tuple[Ranking, ...] = ()

    def ours(self, claim: Claim) -> bool:
        """Whether a claim is one of this project's own figures."""
        return self.sources[claim.source].ours


def task_size(task: str) -> int | None:
    """Questions of a benchmark's canonical test set; None where this package does not know it."""
    return DATASETS[task].known["test"][0] if task in DATASETS else SIZES.get(task)


def published_n(claim: Claim) -> int | None:
    """Number of questions behind a published score, None if unknown."""
    return claim.n or task_size(claim.task)


def read_claims(file: Path | None = None) -> Ledger:
    """Read a ledger, by default the bundled one. Raises ConfigError naming the file, the entry and its fault."""
    file = file or resource("reports") / "claims.toml"
    values = read_toml(file)
    if unknown := values.keys() - set(KINDS):
        raise ConfigError(f"{file}: {sorted(unknown)[0]} is no table of a claim ledger; known: {', '.join(KINDS)}")
    sources: dict[str, PublishedSource] = _by_name(_entries(file, values, "source", PublishedSource))
    systems: dict[str, System] = _by_name(_entries(file, values, "system", System))
    decoders: dict[str, PublishedDecoder] = _by_name(_entries(file, values, "decoder", PublishedDecoder))
    claims: list[Claim] = list(_entries(file, values, "claim", Claim))
    rankings: list[Ranking] = list(_entries(file, values, "ranking", Ranking))
    ledger = Ledger(tuple(claims), systems, sources, decoders, tuple(rankings))
    _check_names(file, ledger)
    cells = Counter((c.table, c.system, c.task, c.metric, c.source, c.where, c.convention or c.profile) for c in claims)
    if twice := [" ".join(cell[1:4]) for cell, count in cells.items() if count > 1]:
        raise ConfigError(f"{file}: {twice[0]} stands twice under one convention of one source")
    return ledger


def _by_name(entries: Iterator[Any]) -> dict[str, Any]:
    return {entry.name: entry for entry in entries}


def _check_names(file: Path, ledger: Ledger) -> None:
    """Raise ConfigError if an entry names a missing one, or a claim of a disputed decoder names none."""
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
