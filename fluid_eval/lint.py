"""Claims that clash, found in the ledger alone: nothing is measured, and no finding is written down beforehand.

Each rule is a function from a ledger to its findings; a claim of a system's own report (System.own) is what others are
held against, and is not itself held against anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .claims import Claim, Ledger
from .data import SOURCES
from .stats import Z95

SAME = 0.05
"""Published values have one decimal: closer than this they are one number."""


@dataclass(frozen=True)
class Clash:
    """What a rule found. cells: the claims concerned.  kind: the rule.  reason: one sentence."""

    cells: tuple[str, ...]
    kind: str
    reason: str


def lint(ledger: Ledger) -> list[Clash]:
    """Findings of every rule, in the rules' order."""
    return [clash for rule in RULES for clash in rule(ledger)]


def shifted_columns(ledger: Ledger) -> Iterator[Clash]:
    """A cell that is the same system's number on another task, in its source or in the system's own report."""
    for claim in _judged(ledger):
        own = _own(ledger, claim)
        if any(other.task == claim.task and _equal(claim, other) for other in own):
            continue  # it is what the authors report for this task
        here = [c for c in ledger.claims if (c.source, c.table) == (claim.source, claim.table)]
        typed = not ledger.sources[claim.source].generated
        before = [c for c in here[: here.index(claim)] if typed and c.system == claim.system]
        for other in [*own, *before]:
            if other.task != claim.task and other.unit == claim.unit and _equal(claim, other):
                where = "what the system's authors report" if other in own else "what the same row has"
                yield Clash(
                    (claim.cell, other.cell),
                    "equals another column",
                    f"{claim.value:g} on {claim.task} is {where} for {other.task}",
                )


def contradicted(ledger: Ledger) -> Iterator[Clash]:
    """A score further from every own-report score of that system and task than chance explains at the task's size."""
    for claim in _judged(ledger):
        own = [other for other in _own(ledger, claim) if (other.task, other.unit) == (claim.task, "%")]
        half = half_width(claim)
        if claim.unit != "%" or not own or half is None:
            continue
        nearest = min(abs(claim.value - other.value) for other in own)
        if nearest > half:
            theirs = " and ".join(f"{other.value:g}" for other in own)
            yield Clash(
                (claim.cell, *(other.cell for other in own)),
                "contradicts the system's own report",
                f"{claim.value:g} against {theirs}: {nearest:.1f} points from the nearest, where the 95% half-width at "
                f"{task_size(claim.task):,} questions is {half:.1f}",
            )


def missing_parents(ledger: Ledger) -> Iterator[Clash]:
    """An adapted system whose parent has no row in a table that the ledger holds whole."""
    for source, table in dict.fromkeys((c.source, c.table) for c in ledger.claims):
        rows = {c.system for c in ledger.claims if (c.source, c.table) == (source, table)}
        for name in (name for name in ledger.systems if name in rows and table in ledger.sources[source].whole):
            system = ledger.systems[name]
            if system.parent and system.parent not in rows and not system.same_as:
                yield Clash(
                    (f"{name} ({source}, {table} table)",),
                    "no row of its parent",
                    f"{name} was adapted from {system.parent}, which has no row there: what it cost cannot be seen",
                )


def unscored_parents(ledger: Ledger) -> Iterator[Clash]:
    """An adapted system that shares no scored task with its parent anywhere in the ledger, whoever reports them."""
    scored: dict[str, dict[str, str]] = {}  # sources by task, by system
    for claim in ledger.claims:
        if claim.unit == "%":
            scored.setdefault(claim.system, {}).setdefault(claim.task, claim.source)
    for name, system in ledger.systems.items():
        tasks, theirs = scored.get(name, {}), scored.get(system.parent, {})
        if system.parent and tasks and not tasks.keys() & theirs.keys():
            yield Clash(
                (f"{name} ({', '.join(dict.fromkeys(tasks.values()))})",),
                "no score of its parent",
                f"{name} was adapted from {system.parent}, of which the ledger has no score on any of its tasks "
                f"({', '.join(tasks)}): what it cost cannot be seen",
            )


def no_hardware(ledger: Ledger) -> Iterator[Clash]:
    """A speed in seconds without the machine it was measured on."""
    for claim in ledger.claims:
        if claim.unit in ("tok/s", "times") and not claim.hardware:
            yield Clash(
                (claim.cell,), "speed without hardware", "no hardware is given with it, as far as the ledger knows"
            )


def unlike_the_main_row(ledger: Ledger) -> Iterator[Clash]:
    """An ablation's row of the whole method that differs from the method's own row in the same source: both are one
    number, by whatever metric either is said to be.
    """
    for claim in ledger.claims:
        whole = ledger.systems[claim.system].same_as
        for other in ledger.claims if whole else ():
            alike = (other.system, other.source, other.task, other.unit) == (
                whole, claim.source, claim.task, claim.unit,
            )  # fmt: skip
            if alike and not _equal(claim, other):
                yield Clash(
                    (claim.cell, other.cell),
                    "ablation differs from the main row",
                    f"one system, {claim.value:g} in the ablation and {other.value:g} in the {other.table} table",
                )


RULES: tuple[Callable[[Ledger], Iterator[Clash]], ...] = (
    shifted_columns, contradicted, missing_parents, unscored_parents, no_hardware, unlike_the_main_row,
)  # fmt: skip


def task_size(task: str) -> int | None:
    """Questions of a benchmark's canonical test set; None where this package does not know it."""
    return SOURCES[task].known["test"][0] if task in SOURCES else None


def half_width(claim: Claim) -> float | None:
    """Half of the 95% normal interval of a score, in points, at the size of its task."""
    n, share = task_size(claim.task), claim.value / 100
    return None if n is None else 100 * Z95 * math.sqrt(share * (1 - share) / n)


def _judged(ledger: Ledger) -> Iterator[Claim]:
    """Claims that are not of the system's own reports."""
    return (c for c in ledger.claims if c.source not in ledger.systems[c.system].own)


def _own(ledger: Ledger, claim: Claim) -> list[Claim]:
    """What the system's authors report of it themselves."""
    own = ledger.systems[claim.system].own
    return [c for c in ledger.claims if c.system == claim.system and c.source in own]


def _equal(one: Claim, other: Claim) -> bool:
    return abs(one.value - other.value) < SAME
