"""Conflicts between claims, found by rules over the ledger alone: nothing is measured.

Each rule is a function from a ledger to conflicts. Claims of a system's own report (System.own) are the reference that
other claims are compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..common.stats import Z95
from .ledger import Claim, Ledger, PublishedSource, Ranking, published_n

SAME = 0.05
"""Published values have one decimal: closer than this they are equal."""


@dataclass(frozen=True)
class Conflict:
    """Claims that contradict each other. cells: the claims.  kind: the rule.  reason: one sentence."""

    cells: tuple[str, ...]
    kind: str
    reason: str


def find_conflicts(ledger: Ledger) -> list[Conflict]:
    """The conflicts of every rule, in the rules' order."""
    return [conflict for rule in RULES for conflict in rule(ledger)]


def shifted_columns(ledger: Ledger) -> Iterator[Conflict]:
    """A cell equal to the same system's number on another task, in its source or in the system's own report."""
    for claim in _judged(ledger):
        own = _own(ledger, claim)
        if any(other.task == claim.task and _equal(claim, other) for other in own):
            continue  # the authors report the same for this task
        here = [c for c in ledger.claims if (c.source, c.table) == (claim.source, claim.table)]
        by_hand = not ledger.sources[claim.source].generated
        before = [c for c in here[: here.index(claim)] if by_hand and c.system == claim.system]
        for other in [*own, *before]:
            if other.task != claim.task and other.unit == claim.unit and _equal(claim, other):
                where = "what the system's authors report" if other in own else "what the same row has"
                yield Conflict(
                    (claim.cell, other.cell),
                    "equals another column",
                    f"{claim.value:g} on {claim.task} is {where} for {other.task}",
                )


def contradicted(ledger: Ledger) -> Iterator[Conflict]:
    """A score further from every score of the system's own report than the 95% interval at the task's size allows."""
    for claim in _judged(ledger):
        own = [other for other in _own(ledger, claim) if (other.task, other.unit) == (claim.task, "%")]
        half = half_width(claim)
        if claim.unit != "%" or not own or half is None:
            continue
        nearest = min(abs(claim.value - other.value) for other in own)
        if nearest > half:
            theirs = " and ".join(f"{other.value:g}" for other in own)
            yield Conflict(
                (claim.cell, *(other.cell for other in own)),
                "contradicts the system's own report",
                f"{claim.value:g} against {theirs}: {nearest:.1f} points from the nearest, where the 95% half-width at "
                f"{published_n(claim):,} questions is {half:.1f}; its own convention: {claim.stated}",
            )


def missing_parents(ledger: Ledger) -> Iterator[Conflict]:
    """An adapted system whose parent has no row in a table that the ledger holds in full."""
    for source, table in dict.fromkeys((c.source, c.table) for c in ledger.claims):
        rows = {c.system for c in ledger.claims if (c.source, c.table) == (source, table)}
        for name in (name for name in ledger.systems if name in rows and table in ledger.sources[source].complete):
            system = ledger.systems[name]
            if system.parent and system.parent not in rows and not system.same_as:
                yield Conflict(
                    (f"{name} ({source}, {table} table)",),
                    "no row of its parent",
                    f"{name} was adapted from {system.parent}, which has no row there: what it cost cannot be seen",
                )


def unscored_parents(ledger: Ledger) -> Iterator[Conflict]:
    """An adapted system that shares no scored task with its parent anywhere in the ledger."""
    scored: dict[str, dict[str, str]] = {}  # sources by task, by system
    for claim in ledger.claims:
        if claim.unit == "%":
            scored.setdefault(claim.system, {}).setdefault(claim.task, claim.source)
    for name, system in ledger.systems.items():
        tasks, theirs = scored.get(name, {}), scored.get(system.parent, {})
        if system.parent and tasks and not tasks.keys() & theirs.keys():
            yield Conflict(
                (f"{name} ({', '.join(dict.fromkeys(tasks.values()))})",),
                "no score of its parent",
                f"{name} was adapted from {system.parent}, of which the ledger has no score on any of its tasks "
                f"({', '.join(tasks)}): what it cost cannot be seen",
            )


def no_hardware(ledger: Ledger) -> Iterator[Conflict]:
    """A speed per second, or a speed-up, without the hardware it was measured on."""
    for claim in ledger.claims:
        if claim.unit in ("tok/s", "times") and not claim.hardware:
            yield Conflict(
                (claim.cell,), "speed without hardware", "no hardware is given with it, as far as the ledger knows"
            )


def unlike_the_main_row(ledger: Ledger) -> Iterator[Conflict]:
    """An ablation's row of the full method that differs from the method's own row in the same source.

    The metrics' names may differ.
    """
    for claim in ledger.claims:
        full = ledger.systems[claim.system].same_as
        for other in ledger.claims if full else ():
            alike = (other.system, other.source, other.task, other.unit) == (
                full, claim.source, claim.task, claim.unit,
            )  # fmt: skip
            if alike and not _equal(claim, other):
                yield Conflict(
                    (claim.cell, other.cell),
                    "ablation differs from the main row",
                    f"one system, {claim.value:g} in the ablation and {other.value:g} in the {other.table} table",
                )


def two_numbers_of_one_author(ledger: Ledger) -> Iterator[Conflict]:
    """Two numbers by one author for one cell, unless their stated conventions or decoders differ."""
    for claim, other in _pairs(ledger):
        here, there = (ledger.sources[one.source] for one in (claim, other))
        same_cell = (claim.system, claim.task, claim.unit) == (other.system, other.task, other.unit)
        one_author = claim.source != other.source and here.by and here.by == there.by
        if same_cell and one_author and not _equal(claim, other) and not _conditions_differ(claim, other):
            yield Conflict(
                (claim.cell, other.cell),
                "one author, two numbers",
                f"{claim.value:g} in {_cited(here)} and {other.value:g} in {_cited(there)}, both by {here.by}; "
                + _conventions(claim, other),
            )


def text_against_table(ledger: Ledger) -> Iterator[Conflict]:
    """Two numbers for one cell in one source, or a ranking in its text that its table reverses."""
    for claim, other in _pairs(ledger):
        cell = (claim.source, claim.system, claim.task, claim.unit)
        if cell != (other.source, other.system, other.task, other.unit) or claim.where == other.where:
            continue
        if not _equal(claim, other) and not _conditions_differ(claim, other):
            yield Conflict(
                (claim.cell, other.cell),
                "text against table",
                f"{claim.value:g} in {claim.where or 'its table'} and {other.value:g} in {other.where or 'its table'} "
                f"of {_cited(ledger.sources[claim.source])}; {_conventions(claim, other)}",
            )
    for ranking, better, than in _ranked(ledger):
        if better.value < than.value - SAME:
            yield Conflict(
                (better.cell, than.cell),
                "text against table",
                f"{_says(ledger, ranking)}; on {better.task} its table has {better.value:g} below {than.value:g}",
            )


def ranked_inside_chance(ledger: Ledger) -> Iterator[Conflict]:
    """A ranking whose difference lies inside its own 95% interval at the task's size."""
    for ranking, better, than in _ranked(ledger):
        halves = [half_width(one) for one in (better, than)]
        if None in halves or better.value < than.value - SAME:
            continue
        half = math.hypot(*(one or 0.0 for one in halves))
        n = published_n(better) or 0
        if better.value - than.value <= half:
            yield Conflict(
                (better.cell, than.cell),
                "ranking inside its own interval",
                f"{_says(ledger, ranking)}; {better.value - than.value:.1f} points apart, where the difference's 95% "
                f"half-width at {n:,} questions is {half:.1f}, unpaired; paired answers, not published, may tell more",
            )


def moves_with_stride(ledger: Ledger) -> Iterator[Conflict]:
    """Different scores of systems that differ in stride alone, although verified text does not depend on it."""
    for claim, other in _pairs(ledger):
        strides = {ledger.systems[claim.system].stride_of, ledger.systems[other.system].stride_of}
        cells = {(one.source, one.table, one.task, one.unit) for one in (claim, other)}
        if len(cells) > 1 or not strides & {claim.system, other.system} or _equal(claim, other) or claim.unit != "%":
            continue
        decoders = [ledger.decoders.get(one.decoder) for one in (claim, other)]
        verified = all(decoder is not None and decoder.verifies for decoder in decoders)
        if verified or any(one.decoder_unknown for one in (claim, other)):
            unsure = "" if verified else "unsure: which decoder wrote them is not stated; "
            yield Conflict(
                (claim.cell, other.cell),
                "accuracy moves with stride",
                f"{unsure}verified greedy text does not depend on the stride, so {claim.value:g} and {other.value:g} "
                + ("cannot both be of it" if verified else "are of unverified text, or of weights that differ too"),
            )


def not_the_mean(ledger: Ledger) -> Iterator[Conflict]:
    """A mean that differs from that of its parts by more than rounding, if the ledger has every part."""
    for claim in (claim for claim in ledger.claims if claim.parts):
        row = (claim.system, claim.source, claim.table, claim.where)
        cells = {c.task: c for c in ledger.claims if (c.system, c.source, c.table, c.where) == row}
        if not cells.keys() >= set(claim.parts):
            continue
        parts = [cells[task] for task in claim.parts]
        mean = math.fsum(part.value for part in parts) / len(parts)
        allowed = claim.rounding + math.fsum(part.rounding for part in parts) / len(parts)
        if abs(mean - claim.value) > allowed + 1e-9:
            yield Conflict(
                (claim.cell, *(part.cell for part in parts)),
                "mean is not its parts'",
                f"{claim.value:g} is given as the mean of {', '.join(claim.parts)}, whose mean is {mean:.2f}",
            )


RULES: tuple[Callable[[Ledger], Iterator[Conflict]], ...] = (
    shifted_columns, contradicted, missing_parents, unscored_parents, no_hardware, unlike_the_main_row,
    two_numbers_of_one_author, text_against_table, ranked_inside_chance, moves_with_stride, not_the_mean,
)  # fmt: skip


def half_width(claim: Claim) -> float | None:
    """Half-width of a score's 95% normal interval, in points, at the size of its task. None if that is unknown."""
    n, share = published_n(claim), claim.value / 100
    return None if n is None else 100 * Z95 * math.sqrt(share * (1 - share) / n)


def _judged(ledger: Ledger) -> Iterator[Claim]:
    """Claims that are not from the system's own reports."""
    return (c for c in ledger.claims if c.source not in ledger.systems[c.system].own)


def _own(ledger: Ledger, claim: Claim) -> list[Claim]:
    """Claims of the same system from its own authors."""
    own = ledger.systems[claim.system].own
    return [c for c in ledger.claims if c.system == claim.system and c.source in own]


def _equal(one: Claim, other: Claim) -> bool:
    return abs(one.value - other.value) < SAME


def _pairs(ledger: Ledger) -> Iterator[tuple[Claim, Claim]]:
    """Every pair of claims once, in the ledger's order."""
    return itertools.combinations(ledger.claims, 2)


def _conditions_differ(claim: Claim, other: Claim) -> bool:
    """Whether both state a convention, or a decoder, and these differ."""
    conventions = {one.profile or one.convention for one in (claim, other)}
    decoders = {one.decoder for one in (claim, other) if one.decoder and not one.decoder_unknown}
    return ("" not in conventions and len(conventions) > 1) or len(decoders) > 1


def _conventions(claim: Claim, other: Claim) -> str:
    """Whether different conventions may explain two numbers."""
    stated = [one.profile or one.convention for one in (claim, other)]
    return "one convention, as stated" if all(stated) else "unsure: conventions are not stated for both, and may differ"


def _cited(source: PublishedSource) -> str:
    """A source's name, and a note if it is known at second hand only."""
    return f"{source.name}{' (read at second hand)' if source.second_hand else ''}"


def _ranked(ledger: Ledger) -> Iterator[tuple[Ranking, Claim, Claim]]:
    """Each ranking with the pairs of scores it is about, each of one source, table and task."""
    for ranking in ledger.rankings:
        scores = [c for c in ledger.claims if c.source == ranking.source and c.unit == "%" and not c.parts]
        for better in (c for c in scores if c.system == ranking.better):
            for than in (c for c in scores if c.system == ranking.than):
                same = (better.table, better.task, better.where) == (than.table, than.task, than.where)
                if same and (not ranking.tasks or better.task in ranking.tasks):
                    yield ranking, better, than


def _says(ledger: Ledger, ranking: Ranking) -> str:
    """A ranking in words, with a note if its source is known at second hand only."""
    known = ", read at second hand," if ledger.sources[ranking.source].second_hand else ""
    return f"its text{known} says: {ranking.says}"
