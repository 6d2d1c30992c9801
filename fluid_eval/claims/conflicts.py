"""Claims that clash, found in the ledger alone: nothing is measured, and no finding is written down beforehand.

Each rule is a function from a ledger to its findings; a claim of a system's own report (System.own) is what others are
held against, and is not itself held against anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..common.stats import Z95
from .ledger import Claim, Ledger, Ranking, Source, published_n

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
                f"{published_n(claim):,} questions is {half:.1f}; its own convention: {claim.stated}",
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


def two_numbers_of_one_author(ledger: Ledger) -> Iterator[Clash]:
    """A cell that one author gives two numbers for, in two places; not where stated conventions or decoders tell them
    apart.
    """
    for claim, other in _pairs(ledger):
        here, there = (ledger.sources[one.source] for one in (claim, other))
        cell = (claim.system, claim.task, claim.unit) == (other.system, other.task, other.unit)
        one_author = claim.source != other.source and here.by and here.by == there.by
        if cell and one_author and not _equal(claim, other) and not _told_apart(claim, other):
            yield Clash(
                (claim.cell, other.cell),
                "one author, two numbers",
                f"{claim.value:g} in {_read(here)} and {other.value:g} in {_read(there)}, both by {here.by}; "
                + _conventions(claim, other),
            )


def text_against_table(ledger: Ledger) -> Iterator[Clash]:
    """A source that gives one cell two numbers in two places, or whose text ranks what its table has the other way."""
    for claim, other in _pairs(ledger):
        cell = (claim.source, claim.system, claim.task, claim.unit)
        if cell != (other.source, other.system, other.task, other.unit) or claim.where == other.where:
            continue
        if not _equal(claim, other) and not _told_apart(claim, other):
            yield Clash(
                (claim.cell, other.cell),
                "text against table",
                f"{claim.value:g} in {claim.where or 'its table'} and {other.value:g} in {other.where or 'its table'} "
                f"of {_read(ledger.sources[claim.source])}; {_conventions(claim, other)}",
            )
    for ranking, better, than in _ranked(ledger):
        if better.value < than.value - SAME:
            yield Clash(
                (better.cell, than.cell),
                "text against table",
                f"{_says(ledger, ranking)}; on {better.task} its table has {better.value:g} below {than.value:g}",
            )


def ranked_inside_chance(ledger: Ledger) -> Iterator[Clash]:
    """A ranking whose difference is inside its own 95% interval at the task's size."""
    for ranking, better, than in _ranked(ledger):
        halves = [half_width(one) for one in (better, than)]
        if None in halves or better.value < than.value - SAME:
            continue
        half, n = math.hypot(*(one or 0.0 for one in halves)), published_n(better) or 0
        if better.value - than.value <= half:
            yield Clash(
                (better.cell, than.cell),
                "ranking inside its own interval",
                f"{_says(ledger, ranking)}; {better.value - than.value:.1f} points apart, where the difference's 95% "
                f"half-width at {n:,} questions is {half:.1f}, unpaired; paired answers, not published, may tell more",
            )


def moves_with_stride(ledger: Ledger) -> Iterator[Clash]:
    """Scores that differ between systems that differ in stride alone, where what is written is verified."""
    for claim, other in _pairs(ledger):
        strides = {ledger.systems[claim.system].stride_of, ledger.systems[other.system].stride_of}
        cells = {(one.source, one.table, one.task, one.unit) for one in (claim, other)}
        if len(cells) > 1 or not strides & {claim.system, other.system} or _equal(claim, other) or claim.unit != "%":
            continue
        means = [ledger.decoders.get(one.decoder) for one in (claim, other)]
        verified = all(one is not None and one.verifies for one in means)
        if verified or any(one.decoder_unknown for one in (claim, other)):
            unsure = "" if verified else "unsure: which decoder wrote them is not stated; "
            yield Clash(
                (claim.cell, other.cell),
                "accuracy moves with stride",
                f"{unsure}verified greedy text does not depend on the stride, so {claim.value:g} and {other.value:g} "
                + ("cannot both be of it" if verified else "are of unverified text, or of weights that differ too"),
            )


def not_the_mean(ledger: Ledger) -> Iterator[Clash]:
    """A mean that is not that of its parts, beyond what rounding explains; only where the ledger has every part."""
    for claim in (claim for claim in ledger.claims if claim.parts):
        row = (claim.system, claim.source, claim.table, claim.where)
        held = {c.task: c for c in ledger.claims if (c.system, c.source, c.table, c.where) == row}
        if not held.keys() >= set(claim.parts):
            continue
        parts = [held[task] for task in claim.parts]
        mean = math.fsum(part.value for part in parts) / len(parts)
        allowed = claim.rounding + math.fsum(part.rounding for part in parts) / len(parts)
        if abs(mean - claim.value) > allowed + 1e-9:
            yield Clash(
                (claim.cell, *(part.cell for part in parts)),
                "mean is not its parts'",
                f"{claim.value:g} is given as the mean of {', '.join(claim.parts)}, whose mean is {mean:.2f}",
            )


RULES: tuple[Callable[[Ledger], Iterator[Clash]], ...] = (
    shifted_columns, contradicted, missing_parents, unscored_parents, no_hardware, unlike_the_main_row,
    two_numbers_of_one_author, text_against_table, ranked_inside_chance, moves_with_stride, not_the_mean,
)  # fmt: skip


def half_width(claim: Claim) -> float | None:
    """Half of the 95% normal interval of a score, in points, at the size of its task."""
    n, share = published_n(claim), claim.value / 100
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


def _pairs(ledger: Ledger) -> Iterator[tuple[Claim, Claim]]:
    """Claims two by two, each pair once, in the ledger's order."""
    return itertools.combinations(ledger.claims, 2)


def _told_apart(claim: Claim, other: Claim) -> bool:
    """Whether both state how they were asked, or how they were written, and not alike."""
    asked = {one.profile or one.convention for one in (claim, other)}
    written = {one.decoder for one in (claim, other) if one.decoder and not one.decoder_unknown}
    return ("" not in asked and len(asked) > 1) or len(written) > 1


def _conventions(claim: Claim, other: Claim) -> str:
    """Whether the convention may be what is between them."""
    stated = [one.profile or one.convention for one in (claim, other)]
    return "one convention, as stated" if all(stated) else "unsure: conventions are not stated for both, and may differ"


def _read(source: Source) -> str:
    """A source's name, and whether it was read itself."""
    return f"{source.name}{' (read at second hand)' if source.second_hand else ''}"


def _ranked(ledger: Ledger) -> Iterator[tuple[Ranking, Claim, Claim]]:
    """Each ranking with the pairs of scores it is about, of one source, table and task."""
    for ranking in ledger.rankings:
        scores = [c for c in ledger.claims if c.source == ranking.source and c.unit == "%" and not c.parts]
        for better in (c for c in scores if c.system == ranking.better):
            for than in (c for c in scores if c.system == ranking.than):
                same = (better.table, better.task, better.where) == (than.table, than.task, than.where)
                if same and (not ranking.tasks or better.task in ranking.tasks):
                    yield ranking, better, than


def _says(ledger: Ledger, ranking: Ranking) -> str:
    """What a text says, and whether it was read itself."""
    known = ", read at second hand," if ledger.sources[ranking.source].second_hand else ""
    return f"its text{known} says: {ranking.says}"
