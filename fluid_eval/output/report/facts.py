"""What a report states, whatever it is written in: rows of its tables and the verdicts above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from ...analysis.acceptance import acceptance_by_task
from ...analysis.compare import compare, protocol_difference, significant
from ...common.stats import Interval
from ...sweeps import pareto
from ...sweeps.points import as_point
from ..claims_tables import external, kind, summary
from ..terminal import difference, probability, ratio
from .runs import Nested, Stored

State = Literal["good", "bad", "warn", "none"]
SIGNS: Mapping[State, str] = {"good": "✓", "bad": "✗", "warn": "!", "none": "–"}
"""A state's sign, so that no verdict is told by colour alone."""
CLAIM_STATES: Mapping[str, State] = {
    "reproduced": "good",
    "not reproduced": "bad",
    "cannot tell": "warn",
    "different convention": "warn",
    "re-run, equal": "good",
    "re-run, differs": "bad",
}
AUDIT_STATES: Mapping[str, State] = {
    "identical": "good",
    "no difference found": "good",
    "numerical near-tie": "warn",
    "undecided": "warn",
}
"""Of the others see `audit_state`."""


@dataclass(frozen=True)
class Verdict:
    """One line of the summary. about: what was asked.  word: the answer.  text: what it rests on.  tab: where more is.

    runs: the letters of those it is about.
    """

    state: State
    about: str
    word: str
    text: str
    tab: str
    runs: tuple[str, ...] = ()

    @property
    def sign(self) -> str:
        return SIGNS[self.state]


@dataclass(frozen=True)
class Facts:
    """Runs with what follows from them. comparison: as `compare` gives it, None where there is no pair.

    why: why the first run is the base.  claims: of reproduce.  apart: letters of the runs that answered the first run's
    documents under another protocol, with what differs. No verdict holds one of them against a run that was asked
    otherwise, compared or not.
    """

    runs: Sequence[Stored]
    comparison: Nested | None
    claims: Nested | None
    apart: Mapping[str, Sequence[str]]
    why: str = "the run named first"

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Protocols that differ first, then claims, then what the comparison says, then each run's.

        What runs have in common is said once.
        """
        found = _of_protocols(self.apart, self.runs[0].mark, self.comparison, self.marks)
        found += _of_claims(self.claims, self.runs) if self.claims else []
        for verdict in _of_comparison(self.comparison, self.marks) if self.comparison else []:
            other = self.apart.keys() & set(verdict.runs)
            found.append(replace(verdict, state="none", word="asked otherwise") if other else verdict)
        alike: dict[Verdict, list[str]] = {}
        for run in self.runs:
            for verdict in _of_run(run):
                alike.setdefault(verdict, []).append(run.mark)
        order = list(dict.fromkeys(verdict.about for verdict in alike))
        told = [replace(verdict, runs=tuple(marks)) for verdict, marks in alike.items()]
        return found + sorted(told, key=lambda verdict: order.index(verdict.about))

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks of any run, in the order in which they first stand in a result."""
        return list(dict.fromkeys(line["task"] for run in self.runs for line in run.result["lines"]))

    def lines_of(self, task: str) -> list[tuple[Stored, Nested, bool, int]]:
        """A task's lines: the run, its line, whether it is the run's first of this task, and how many it has."""
        found = []
        for run in self.runs:
            lines = [line for line in run.result["lines"] if line["task"] == task]
            found += [(run, line, place == 0, len(lines)) for place, line in enumerate(lines)]
        return found

    @cached_property
    def strides(self) -> list[tuple[Stored, dict[str, Nested]]]:
        """Runs whose decoder drafts strides, with what their samples tell of them by task."""
        found = [(run, acceptance_by_task(run.records)) for run in self.runs]
        return [(run, told) for run, told in found if told or run.khead]

    def mean_of(self, counts: Sequence[int], first: int) -> float:
        """Mean of numbers from `first` on that were met so often."""
        return sum(n * count for n, count in enumerate(counts, first)) / max(1, sum(counts))

    @property
    def timed(self) -> bool:
        """Whether every run's answers were timed again, so that tokens/s have intervals."""
        return all(place.repeats > 1 for place in self.placed if place.tokens_per_second is not None)

    @cached_property
    def marks(self) -> dict[str, str]:
        """Folder, as the comparison names it -> the run's letter."""
        return {str(run.folder): run.mark for run in self.runs}

    @cached_property
    def placed(self) -> list[pareto.Placed]:
        """Runs by score and speed, beaten only by runs that were asked alike; of one run, its tasks."""
        if len(self.runs) == 1:
            return _tasks_placed(self.runs[0])
        alike: dict[tuple[str, ...], list[Stored]] = {}
        for run in self.runs:
            alike.setdefault(tuple(self.apart.get(run.mark, ())), []).append(run)
        groups = [
            [
                as_point(f"{run.mark} {run.name}", {}, run.records, run.owners, repeats=run.repeats) for run in those
            ]
            for those in alike.values()
        ]  # fmt: skip
        found = {place.name: place for group in groups for place in pareto.measure(group)}
        return [found[f"{run.mark} {run.name}"] for run in self.runs]


def told(differences: Sequence[str], most: int = 3) -> str:
    """What differs, in a line: the first ones, none of them long."""
    more = f"; and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(line if len(line) <= 120 else f"{line[:120]}…" for line in differences[:most]) + more


def claim_state(verdict: str) -> State:
    """Of a row of the claims."""
    return CLAIM_STATES.get(kind(verdict), "none")


def gather(
    runs: Sequence[Stored], claims: Nested | None, *, across_protocols: bool = False, why: str = "the run named first"
) -> Facts:
    """Hold every run to the first, but those that answered none of its documents.

    across_protocols: hold those that were asked otherwise to it too.
    """
    base = runs[0]

    def share(run: Stored, sign: str) -> bool:
        ours, theirs = ({(r["task"], r["doc_id"], str(r.get(sign))) for r in one.records} for one in (base, run))
        return bool(ours & theirs)

    held = [run for run in runs[1:] if share(run, "target")]
    apart = {run.mark: found for run in held if (found := protocol_difference(base, run))}
    if not across_protocols:
        held = [run for run in held if run.mark not in apart and share(run, "prompt_hash")]
    folders = [base.folder, *(run.folder for run in held)]
    return Facts(runs, compare(folders, across_protocols=across_protocols) if held else None, claims, apart, why)


def _tasks_placed(run: Stored) -> list[pareto.Placed]:
    """Each task as a point, its score with the interval that the table gives."""
    lines = {line["task"]: line for line in reversed(run.result["lines"])}
    points = []
    for task in reversed(lines):
        records = [record for record in run.records if run.owners[record["task"]] == task]
        points.append(as_point(task, {}, records, run.owners, repeats=run.repeats))
    return [
        replace(
            place,
            score=Interval(lines[place.name]["score"], lines[place.name]["low"], lines[place.name]["high"], place.n),
        )
        for place in pareto.measure([point for point in points if point.samples])
    ]


def _of_run(run: Stored) -> list[Verdict]:
    found = []
    gates = run.result.get("health")
    failed = [gate for gate in gates or [] if not gate["ok"]]
    if gates is None:
        found.append(Verdict("none", "Health", "not recorded", "this run is older than the gates", "health"))
    elif failed:
        text = "; ".join(f"{g['gate']} in {g['task']}: {g['count']:,} of {g['n']:,}" for g in failed)
        found.append(Verdict("bad", "Health", "failed", text, "health"))
    else:
        told = f"all {len(gates)} gates within their thresholds"
        found.append(Verdict("good", "Health", "passed", told, "health"))
    if run.audit:
        found.append(_of_audit(run.audit))
    elif run.result["decoder"].get("verify"):
        told = f"fluid-eval audit {run.folder} compares it with greedy AR of the same weights"
        found.append(Verdict("none", "Lossless", "not audited", told, "setup"))
    for message in run.result["data"]:
        if message.startswith("WARNING"):
            found.append(Verdict("warn", "Data", "not canonical", message, "setup"))
    for message in run.result["notices"]:
        found.append(Verdict("warn", "Notice", "note", message, "setup"))
    if lost := run.result.get("lost"):
        text = "; ".join(f"{key} ({reason})" for key, reason in list(lost.items())[:5])
        found.append(Verdict("bad", "Lost samples", f"{len(lost)} given up", text, "tasks"))
    if limit := run.spec.get("limit"):
        told = f"limit = {limit}: the first documents of each task, not the whole benchmark"
        found.append(Verdict("warn", "Coverage", "a part", told, "setup"))
    return found


def audit_state(audit: Nested) -> State:
    """Of an audit's verdict: what a decoder does not promise is no fault of it."""
    worst: State = "bad" if audit.get("promises", True) else "none"
    return AUDIT_STATES.get(audit["verdict"], worst)


def _of_audit(audit: Nested) -> Verdict:
    sampled = audit.get("distribution")
    text = f"{audit['identical']:,} of {audit['n']:,} answers equal "
    text += "AR's with the same random numbers" if sampled else "greedy AR's"
    if sampled:
        text += f"; distribution: p {probability(sampled['p'])} over {sampled['n']:,} tokens"
    if audit.get("divergences"):
        text += f"; {len(audit['divergences'])} diverge"
    if not audit.get("promises", True):
        text += ", which this decoder does not promise"
    return Verdict(audit_state(audit), "Lossless", audit["verdict"], text, "setup")


def _of_claims(claims: Nested, runs: Sequence[Stored]) -> list[Verdict]:
    """One verdict: of the rows that these runs measured, of all if they measured none."""
    ours = {run.folder.resolve() for run in runs}
    rows = [row for row in claims["rows"] if row.get("run") and Path(row["run"]).resolve() in ours] or claims["rows"]
    kinds = {kind(row["verdict"]) for row in rows}
    text = summary(rows)
    if claims.get("lint"):
        text += f"; {len(claims['lint'])} published cells clash"
    if counted := external(claims):
        text += f"; {counted[0].lower()}{counted[1:]}"
    words: dict[str, tuple[State, str]] = {  # the worst first
        "not reproduced": ("bad", "not all hold"),
        "re-run, differs": ("bad", "own figures differ"),
        "cannot tell": ("warn", "not all can be told"),
        "reproduced": ("good", "reproduced"),
        "re-run, equal": ("good", "own figures, re-run"),
    }
    state, word = next((words[each] for each in words if each in kinds), ("none", "none judged"))
    return [Verdict(state, "Claims", word, text, "claims")]


def _of_protocols(
    apart: Mapping[str, Sequence[str]], base: str, comparison: Nested | None, marks: Mapping[str, str]
) -> list[Verdict]:
    """One warning for all runs that differ from the base in the same."""
    compared = {marks[pair["other"]] for pair in (comparison or {"pairs": []})["pairs"]}
    alike: dict[tuple[str, ...], list[str]] = {}
    for mark, lines in apart.items():
        alike.setdefault(tuple(lines), []).append(mark)
    found = []
    for lines, those in alike.items():
        then = (
            "Their scores do not compare." if compared.issuperset(those) else "Not compared; --across-protocols does."
        )
        text = f"{told(lines)}. {then}"
        found.append(Verdict("warn", f"Protocol against {base}", "Protocols differ", text, "setup", tuple(those)))
    return found


def _of_comparison(comparison: Nested, marks: Mapping[str, str]) -> list[Verdict]:
    """One verdict a pair: whether the other is surely better or worse over all tasks, and how much faster."""
    found = []
    for pair in comparison["pairs"]:
        gain, mde = pair["all"]["difference"], pair["all"].get("mde")
        whole = pair["all"] if len(pair["tasks"]) > 1 else pair["tasks"][0]
        sure = any(entry is whole for entry in significant(pair))
        state: State = "none" if not sure else "good" if gain["mean"] > 0 else "bad"
        word = {"good": "better", "bad": "worse", "none": "no difference shown"}[state]
        text = f"{difference(gain)} points"
        if mde is not None and not sure:
            text += f"; detectable with 80% power: {100 * mde:.1f}"
        speed = pair.get("speed") or {}
        if second := speed.get("tokens_per_second"):
            text += f"; tokens/s × {ratio(second)}{'' if second['low'] is not None else ', one run each: no interval'}"
            text += "" if second["interleaved"] else ", not interleaved"
        if unequal := speed.get("unequal"):
            text += f"; tokens/forward under unequal conditions ({'; '.join(unequal)})"
        base, other = (marks.get(pair[name], pair[name]) for name in ("base", "other"))
        found.append(Verdict(state, f"Score against {base}", word, text, "compare", (other,)))
    return found
