"""The content of a report in any format: the rows of its tables and the summary above them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from fluid_model.registry import claims_lossless

from ...analysis.acceptance import acceptance_by_task
from ...analysis.compare import compare, protocol_difference, significant
from ...common.stats import Interval
from ...sweeps import pareto
from ...sweeps.points import as_point, method_of
from ..claims_tables import external, kind, verdict_counts
from ..terminal import difference, probability, ratio
from .runs import Nested, ReportRun

State = Literal["good", "bad", "warn", "none"]
SIGNS: Mapping[State, str] = {"good": "✓", "bad": "✗", "warn": "!", "none": "–"}
"""A state's sign, so that no state shows by colour alone."""
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
"""For other verdicts see `audit_state`."""


@dataclass(frozen=True)
class SummaryLine:
    """One line of the summary.

    about: its subject.  word: the verdict.  text: the reason.  tab: section with the details.
    runs: letters of the runs it is about.
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
    """The runs of a report, compared and judged.

    comparison: result of `compare`, None if there is no pair.  claims: content of claims.json.
    apart: letters of the runs that answered the base's documents under another protocol, with the differences. No
    summary line calls such a run better or worse.
    why: reason for the choice of the base, the first run.
    """

    runs: Sequence[ReportRun]
    comparison: Nested | None
    claims: Nested | None
    apart: Mapping[str, Sequence[str]]
    why: str = "the run named first"

    @cached_property
    def verdicts(self) -> list[SummaryLine]:
        """The summary: differing protocols, claims, comparisons, then each run. Equal lines of several runs are one."""
        # 1) of all runs together
        summary = _of_protocols(self.apart, self.runs[0].mark, self.comparison, self.marks)
        summary += _of_claims(self.claims, self.runs) if self.claims else []
        for line in _of_comparison(self.comparison, self.marks) if self.comparison else []:
            is_apart = self.apart.keys() & set(line.runs)
            summary.append(replace(line, state="none", word="other protocol") if is_apart else line)
        # 2) of each run
        marks_of: dict[SummaryLine, list[str]] = {}
        for run in self.runs:
            for line in _of_run(run):
                marks_of.setdefault(line, []).append(run.mark)
        order = list(dict.fromkeys(line.about for line in marks_of))
        own = [replace(line, runs=tuple(marks)) for line, marks in marks_of.items()]
        return summary + sorted(own, key=lambda line: order.index(line.about))

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks of any run, in the order of their first result."""
        return list(dict.fromkeys(line["task"] for run in self.runs for line in run.result["lines"]))

    def lines_of(self, task: str) -> list[tuple[ReportRun, Nested, bool, int]]:
        """A task's result lines as (run, line, is the run's first of this task, number of the run's lines)."""
        rows = []
        for run in self.runs:
            lines = [line for line in run.result["lines"] if line["task"] == task]
            rows += [(run, line, place == 0, len(lines)) for place, line in enumerate(lines)]
        return rows

    @cached_property
    def acceptance(self) -> list[tuple[ReportRun, dict[str, Nested]]]:
        """Runs with draft tokens or K-head diagnostics, with their predicted strides and accepted lengths by task."""
        tables = [(run, acceptance_by_task(run.records)) for run in self.runs]
        return [(run, table) for run, table in tables if table or run.khead]

    def mean_of(self, counts: Sequence[int], first: int) -> float:
        """Mean of a histogram. counts: of the numbers first, first + 1, .."""
        return sum(n * count for n, count in enumerate(counts, first)) / max(1, sum(counts))

    @property
    def timed(self) -> bool:
        """Whether all runs have speed repeats, so that tokens/s have intervals."""
        return all(place.repeats > 1 for place in self.placed if place.tokens_per_second is not None)

    @cached_property
    def marks(self) -> dict[str, str]:
        """Folder, as the comparison names it -> the run's letter."""
        return {str(run.folder): run.mark for run in self.runs}

    @cached_property
    def areas(self) -> list[Nested]:
        """AUP of the runs that the comparison is about, see `sweeps.aup`."""
        return list(self.comparison["areas"]) if self.comparison else []

    @cached_property
    def placed(self) -> list[pareto.Placed]:
        """Runs by score and speed, dominated only by runs of the same protocol. Of one run: its tasks."""
        if len(self.runs) == 1:
            return _tasks_placed(self.runs[0])
        by_protocol: dict[tuple[str, ...], list[ReportRun]] = {}
        for run in self.runs:
            by_protocol.setdefault(tuple(self.apart.get(run.mark, ())), []).append(run)
        groups = [
            [
                as_point(
                    f"{run.mark} {run.name}", {}, run.records, run.owners, repeats=run.repeats,
                    method=method_of(run.spec["decoder"]["name"], run.spec["decoder"].get("verify")),
                )
                for run in those
            ]
            for those in by_protocol.values()
        ]  # fmt: skip
        placed = {place.name: place for group in groups for place in pareto.measure(group)}
        return [placed[f"{run.mark} {run.name}"] for run in self.runs]


def in_one_line(differences: Sequence[str], most: int = 3) -> str:
    """The first differences in one line, each shortened."""
    more = f"; and {len(differences) - most} more" if len(differences) > most else ""
    return "; ".join(line if len(line) <= 120 else f"{line[:120]}…" for line in differences[:most]) + more


def claim_state(verdict: str) -> State:
    """The state of a claim's verdict."""
    return CLAIM_STATES.get(kind(verdict), "none")


def gather(
    runs: Sequence[ReportRun],
    claims: Nested | None,
    *,
    across_protocols: bool = False,
    why: str = "the run named first",
) -> Facts:
    """Compare every run with the first, except those that share no document with it.

    across_protocols: compare runs with other protocols too.
    """
    base = runs[0]

    def documents(run: ReportRun, field: str) -> set[tuple[str, int, str]]:
        return {(record["task"], record["doc_id"], str(record.get(field))) for record in run.records}

    def share(run: ReportRun, field: str) -> bool:
        return bool(documents(base, field) & documents(run, field))

    compared = [run for run in runs[1:] if share(run, "target")]
    apart = {run.mark: lines for run in compared if (lines := protocol_difference(base, run))}
    if not across_protocols:
        compared = [run for run in compared if run.mark not in apart and share(run, "prompt_hash")]
    folders = [base.folder, *(run.folder for run in compared)]
    comparison = compare(folders, across_protocols=across_protocols) if compared else None
    return Facts(runs, comparison, claims, apart, why)


def _tasks_placed(run: ReportRun) -> list[pareto.Placed]:
    """Each task as a point; its score has the interval of the tables."""
    lines = {line["task"]: line for line in reversed(run.result["lines"]) if line["score"] is not None}
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


def _of_run(run: ReportRun) -> list[SummaryLine]:
    """Summary lines of one run: health, losslessness, data, notices, failed samples, coverage."""
    # 1) health gates
    lines = []
    gates = run.result.get("health")
    failed = [gate for gate in gates or [] if not gate["ok"]]
    if gates is None:
        lines.append(SummaryLine("none", "Health", "not recorded", "this run is older than the gates", "health"))
    elif failed:
        text = "; ".join(f"{g['gate']} in {g['task']}: {g['count']:,} of {g['n']:,}" for g in failed)
        lines.append(SummaryLine("bad", "Health", "failed", text, "health"))
    else:
        text = f"all {len(gates)} gates within their thresholds"
        lines.append(SummaryLine("good", "Health", "passed", text, "health"))
    # 2) losslessness
    if run.audit:
        lines.append(_of_audit(run.audit))
    elif claims_lossless(run.result["decoder"]):
        text = f"fluid-eval audit {run.folder} compares it with greedy AR of the same weights"
        lines.append(SummaryLine("none", "Lossless", "not audited", text, "setup"))
    # 3) data and notices
    for message in run.result["data"]:
        if message.startswith("WARNING"):
            lines.append(SummaryLine("warn", "Data", "not canonical", message, "setup"))
    for message in run.result["notices"]:
        lines.append(SummaryLine("warn", "Notice", "note", message, "setup"))
    # 4) failed samples and coverage
    if failures := run.result.get("lost"):
        text = "; ".join(f"{key} ({reason})" for key, reason in list(failures.items())[:5])
        lines.append(SummaryLine("bad", "Failed samples", f"{len(failures)} failed", text, "tasks"))
    if limit := run.spec.get("limit"):
        text = f"limit = {limit}: the first documents of each task, not the whole benchmark"
        lines.append(SummaryLine("warn", "Coverage", "a part", text, "setup"))
    return lines


def audit_state(audit: Nested) -> State:
    """The state of an audit: a difference is no fault of a decoder that does not promise AR's text."""
    worst: State = "bad" if audit.get("promises", True) else "none"
    return AUDIT_STATES.get(audit["verdict"], worst)


def _of_audit(audit: Nested) -> SummaryLine:
    sampled = audit.get("distribution")
    text = f"{audit['identical']:,} of {audit['n']:,} answers equal "
    text += "AR's with the same random numbers" if sampled else "greedy AR's"
    if sampled:
        text += f"; distribution: p {probability(sampled['p'])} over {sampled['n']:,} tokens"
    if audit.get("divergences"):
        text += f"; {len(audit['divergences'])} diverge"
    if not audit.get("promises", True):
        text += ", which this decoder does not promise"
    return SummaryLine(audit_state(audit), "Lossless", audit["verdict"], text, "setup")


def _of_claims(claims: Nested, runs: Sequence[ReportRun]) -> list[SummaryLine]:
    """One line over the claims that these runs measured, or over all if they measured none."""
    ours = {run.folder.resolve() for run in runs}
    rows = [row for row in claims["rows"] if row.get("run") and Path(row["run"]).resolve() in ours] or claims["rows"]
    kinds = {kind(row["verdict"]) for row in rows}
    text = verdict_counts(rows)
    if claims.get("lint"):
        text += f"; {len(claims['lint'])} conflicts between published cells"
    if counted := external(claims):
        text += f"; {counted[0].lower()}{counted[1:]}"
    words: dict[str, tuple[State, str]] = {  # the worst first
        "not reproduced": ("bad", "not all hold"),
        "re-run, differs": ("bad", "own figures differ"),
        "cannot tell": ("warn", "not all decided"),
        "reproduced": ("good", "reproduced"),
        "re-run, equal": ("good", "own figures, re-run"),
    }
    state, word = next((words[each] for each in words if each in kinds), ("none", "none judged"))
    return [SummaryLine(state, "Claims", word, text, "claims")]


def _of_protocols(
    apart: Mapping[str, Sequence[str]], base: str, comparison: Nested | None, marks: Mapping[str, str]
) -> list[SummaryLine]:
    """One warning for all runs with the same differences from the base."""
    compared = {marks[pair["other"]] for pair in (comparison or {"pairs": []})["pairs"]}
    by_differences: dict[tuple[str, ...], list[str]] = {}
    for mark, lines in apart.items():
        by_differences.setdefault(tuple(lines), []).append(mark)
    summary = []
    for lines, those in by_differences.items():
        is_compared = compared.issuperset(those)
        then = "Their scores do not compare." if is_compared else "Not compared; --across-protocols does."
        text = f"{in_one_line(lines)}. {then}"
        summary.append(
            SummaryLine("warn", f"Protocol against {base}", "Protocols differ", text, "setup", tuple(those))
        )  # fmt: skip
    return summary


def _of_comparison(comparison: Nested, marks: Mapping[str, str]) -> list[SummaryLine]:
    """One line a pair: whether the other run is significantly better or worse over all tasks, and how much faster."""
    summary = []
    for pair in comparison["pairs"]:
        # 1) the score over all tasks
        overall = pair["all"] if len(pair["tasks"]) > 1 else pair["tasks"][0]
        gain, mde = pair["all"]["difference"], pair["all"].get("mde")
        is_significant = any(entry is overall for entry in significant(pair))
        state: State = "none" if not is_significant else "good" if gain["mean"] > 0 else "bad"
        word = {"good": "better", "bad": "worse", "none": "no difference shown"}[state]
        text = f"{difference(gain)} points"
        if mde is not None and not is_significant:
            text += f"; detectable with 80% power: {100 * mde:.1f}"
        # 2) the speeds
        speed = pair.get("speed") or {}
        if second := speed.get("tokens_per_second"):
            text += f"; tokens/s × {ratio(second)}{'' if second['low'] is not None else ', one run each: no interval'}"
            text += "" if second["interleaved"] else ", not interleaved"
        if unequal := speed.get("unequal"):
            text += f"; tokens/forward under unequal conditions ({'; '.join(unequal)})"
        base, other = (marks.get(pair[name], pair[name]) for name in ("base", "other"))
        summary.append(SummaryLine(state, f"Score against {base}", word, text, "compare", (other,)))
    return summary
