"""A report for a paper: a Markdown appendix, and the scores as a LaTeX table."""

from __future__ import annotations

from collections.abc import Iterator

from ...analysis.compare import entries
from ...common import tables
from .. import claims_tables
from ..terminal import difference, metric, number, probability, score, speed
from .facts import Facts, in_one_line
from .runs import Nested, ReportRun
from .setup import environment, protocol, settings, value, versions

Table = tuple[list[str], list[list[str]]]


def markdown_appendix(facts: Facts) -> str:
    """Verdicts, tables with intervals, protocol and environment: all that judging or repeating the runs needs."""
    return "\n".join(line.rstrip("\n") + "\n" for line in _sections(facts))


def latex_table(facts: Facts) -> str:
    """Scores and speeds of every task and run: a tabular that needs the booktabs package."""
    notes = [f"{_against(facts, mark)}: {in_one_line(lines)}." for mark, lines in facts.apart.items()]
    return tables.latex(*_scores(facts), notes=notes)


def _sections(facts: Facts) -> Iterator[str]:
    several = len(facts.runs) > 1
    yield "# Appendix: evaluation"
    yield "\n".join(
        f"- {f'{run.mark}: ' * several}{tables.plain(run.name)} (`{run.folder.name}`)" for run in facts.runs
    )
    yield "## Verdicts"
    rows = [[v.about, " ".join(v.runs) * several, v.word, v.text] for v in facts.verdicts]
    yield tables.markdown(["question", "runs", "verdict", "reason"], rows)
    yield "## Scores"
    yield tables.markdown(*_scores(facts))
    yield (
        "Score in percent with its 95% interval: Wilson's for counts, normal otherwise. Tokens/s per worker: with "
        "Student's interval over repeats of the same answers where there were any, else of one run, without one."
    )
    for mark, lines in facts.apart.items():
        yield "\n".join([f"{_against(facts, mark)}:\n", *(f"- {tables.plain(line)}" for line in lines)])
    if facts.comparison:
        yield "## Differences"
        yield tables.markdown(*_differences(facts, facts.comparison))
        yield (
            f"Every run against {facts.runs[0].mark}, {facts.why}. Paired, in points, with 95% intervals: Bonett and "
            "Price's for counts, normal otherwise, combined over tasks as variances are; p by McNemar's test; "
            "detectable at 80% power and 5%."
        )
    if facts.claims:
        yield "## Claims"
        yield tables.markdown(*_claims(facts.claims))
    for run in facts.runs:
        yield f"## {run.mark}: {tables.plain(run.name)}" if several else "## Protocol and environment"
        yield from _setup(run)


def _against(facts: Facts, mark: str) -> str:
    """A note that a run's protocol differs from the base's."""
    names = {run.mark: run.name for run in facts.runs}
    return f"Protocols differ ({facts.runs[0].name} / {names[mark]}), their scores do not compare"


def _setup(run: ReportRun) -> Iterator[str]:
    if tasks := protocol(run):
        stored = run.result["protocol"]
        yield f"Protocol {stored['name']}, hash {stored['hash']}."
        rows = [[task, name, text] for task, fields in tasks.items() for name, text in fields.items()]
        yield tables.markdown(["task", "setting", ""], rows)
    if gates := run.result.get("health"):
        counted = [
            [
                gate["gate"], gate["task"], f"{gate['count']} of {gate['n']}", f"{100 * gate['threshold']:.1f}%",
                "passed" if gate["ok"] else "failed",
            ]
            for gate in gates
        ]  # fmt: skip
        yield tables.markdown(["health gate", "task", "counted", "threshold", "verdict"], counted)
    for name, pairs in (("environment", environment(run)), ("versions", versions(run)), ("setting", settings(run))):
        yield tables.markdown([name, ""], [[key, value(setting)] for key, setting in pairs.items()])


def _scores(facts: Facts) -> Table:
    several = len(facts.runs) > 1
    heads = ["task", *["run"] * several, "metric", "score (%)", "n", "tokens/forward", "tokens/s"]
    rows = []
    for task in facts.tasks:
        for run, line, first, _ in facts.lines_of(task):
            costs = [number(line["tokens_per_forward"], 2), _speed(line)] if first else ["", ""]
            name = [run.name] * several
            rows.append([task, *name, metric(line), score(line), number(line["n"]), *costs])
    return heads, rows


def _speed(line: Nested) -> str:
    ends = {end: line.get(f"tokens_per_second_{end}") for end in ("low", "high")}
    return speed({"mean": line["tokens_per_second"], **ends})


def _differences(facts: Facts, comparison: Nested) -> Table:
    rows = []
    for pair in comparison["pairs"]:
        who = f"{facts.marks[pair['other']]} - {facts.marks[pair['base']]}"
        for row in entries(pair):
            flips = f"{row['c']} gained, {row['b']} lost"
            tests = [probability(row["mcnemar_p"]), _detectable(row["mde"])]
            rows.append([who, row["task"], number(row["n"]), difference(row["difference"]), *tests, flips])
    return ["runs", "task", "n", "difference", "p", "detectable", "flipped"], rows


def _detectable(share: float | None) -> str:
    return number(share if share is None else 100 * share, 1)


def _claims(claims: Nested) -> Table:
    cells = [
        [
            title, row["system"], row["task"], claims_tables.published(row), claims_tables.measured(row),
            claims_tables.convention(row), row["verdict"],
        ]
        for title, rows in claims_tables.in_tables(claims["rows"])
        for row in rows
    ]  # fmt: skip
    return ["table", "system", "task", "published", "measured", "convention", "verdict"], cells
