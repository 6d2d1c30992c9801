"""Claims and their verdicts as tables, on the terminal and in docs/claims.md. Reads claims.json; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested, read_json

from ..claims.ledger import TABLES, UNSTATED, UNSTATED_CONVENTION
from .terminal import FORWARDS, screen

ClaimRow = Mapping[str, Any]
"""An entry of claims.json's `rows`."""
TITLES = {
    "tiny": "This project's own",
    "smol": "This project's own: SmolLM2-135M-Instruct and its FLUID",
    "main": "Main tables",
    "ablation": "Ablations",
    "speed": "Speeds and strides",
    "own": "Authors on their own systems",
    "field": "The field's small checkpoints",
}
SHORT = {"%": "", "tok/forward": " tok/fwd"}
_NEEDED = {
    "table", "system", "task", "metric", "published", "published_to", "unit", "profile", "convention", "measured",
    "verdict", "source", "note", "run",
}  # fmt: skip
LEGEND = (
    "reproduced: within the named margin, by two one-sided tests of 5% each; not reproduced: further off, with the "
    "published number's own sampling error at its n, corrected for the number of claims judged (Holm: at most 5% of "
    "tables hold one by chance); cannot tell: neither, with the n that would decide; "
    f"{UNSTATED_CONVENTION}, decoder {UNSTATED}: judged as measured, so that a difference may be due to them; "
    "different convention: measured under another protocol than the stated one, and so not judged; "
    "re-run: this project's own figures, equal to the last published digit or not, which no one else claims; "
    f"scores in %; {FORWARDS}"
)


def read_claims(file: Path) -> Nested:
    """Read the claims.json of `fluid-eval reproduce`. Raises ConfigError naming the fields it lacks."""
    claims = read_json(file)
    rows, conflicts = claims.get("rows"), claims.get("lint")
    if not (isinstance(rows, list) and rows and isinstance(conflicts, list)):
        raise ConfigError(f"{file}: holds no claims (rows and lint); name the claims.json that reproduce wrote")
    for where, needed, entries in (("rows", _NEEDED, rows), ("lint", {"cells", "kind", "reason"}, conflicts)):
        for place, entry in enumerate(entries):
            if missing := needed - (entry.keys() if isinstance(entry, dict) else set()):
                fields = ", ".join(sorted(missing))
                raise ConfigError(f"{file}: {where}[{place}] lacks {fields}; name the claims.json that reproduce wrote")
    return claims


def published(row: ClaimRow) -> str:
    """The published value: a number or a range, with its unit unless it is a score."""
    ends = [end for end in (row["published"], row["published_to"]) if end is not None]
    decimals = row.get("decimals")  # None where the values show them, and in older files
    value = "–".join(str(end) if decimals is None else f"{end:.{decimals}f}" for end in ends)
    return f"{value}{SHORT.get(row['unit'], ' ' + row['unit'])}"


def measured(row: ClaimRow) -> str:
    """The measured value with its interval, if it has one; a dash if nothing was measured."""
    interval = row["measured"]
    if interval is None:
        return "–"
    scale, digits = (100, 1) if row["unit"] == "%" else (1, 2)
    value = f"{scale * interval['score']:.{digits}f}"
    if interval["low"] is None:
        return value
    return f"{value} [{scale * interval['low']:.{digits}f}, {scale * interval['high']:.{digits}f}]"


def convention(row: ClaimRow) -> str:
    """The stated convention; if measured by another one, both: `stated → measured`."""
    conventions = row["convention"]
    name = (conventions["measured"] or "").rpartition(" ")[0]
    if row["profile"] and name.split("+")[0] == row["profile"]:
        return name
    return f"{conventions['published']} → {name}" if name else str(conventions["published"])


def stands(row: ClaimRow) -> str:
    """The source of a published number, and the place in it."""
    return ", ".join(part for part in (row["source"], row.get("where")) if part)


def kind(verdict: str) -> str:
    """The kind of a verdict, without conditions and reason: `cannot tell`."""
    return verdict.partition(":")[0].partition(" (")[0]


def taken(row: ClaimRow) -> str:
    """Day and commit (or version, if installed) of a measurement; empty if nothing was measured."""
    run = row.get("taken")  # None where nothing was run, and in older files
    if not run:
        return ""
    at = f"commit {run['commit'][:7]}" if run["commit"] else f"version {run['version']}"
    return f"{run['started'][:10]}, {at}{' with changes' if run['dirty'] else ''}"


def occasions(rows: Sequence[ClaimRow]) -> list[str]:
    """A line for each day and commit of measurement, with its systems."""
    systems: dict[str, list[str]] = {}
    for row in rows:
        if at := taken(row):
            systems.setdefault(at, []).append(row["system"])
    return [f"measured {at}: {', '.join(dict.fromkeys(names))}" for at, names in systems.items()]


def in_tables(rows: Sequence[ClaimRow]) -> Iterator[tuple[str, list[ClaimRow]]]:
    """Rows by table, in the tables' order."""
    for table in TABLES:
        if members := [row for row in rows if row["table"] == table]:
            yield TITLES[table], members


def verdict_counts(rows: Sequence[ClaimRow]) -> str:
    """Number of each verdict, and the chance of a wrong one among them."""
    kinds = [row["verdict"].partition(":")[0] for row in rows]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    tested = sum(bool(row.get("p") and row["p"]["within"] is not None) for row in rows)
    chance = f"; of {tested} judged, chance alone: one 'not reproduced' in at most 5% of such tables" if tested else ""
    return counted + chance


def external(claims: Mapping[str, Any]) -> str:
    """Number of others' claims that were measured; empty for older files."""
    counted = claims.get("external")
    return f"Claims of others measured here: {counted['measured']} of {counted['claims']}" if counted else ""


def print_verdicts(claims: Mapping[str, Any]) -> None:
    """Print the tables in 80 columns, a summary, and conflicts between claims."""
    console = screen()
    for title, rows in in_tables(claims["rows"]):
        console.print(f"{title}\n")
        _print_table(console, rows)
        console.print()
    lines = [verdict_counts(claims["rows"]), external(claims), *occasions(claims["rows"])]
    console.print("\n".join(line for line in lines if line) + f"\n\n{LEGEND}")
    console.print("convention: a profile of docs/protocols.md; other: in the claim's own words (claims.md has them)")
    console.print("NAME/: the model's folder below --models-dir (or FLUID_MODELS_DIR)")
    shown = [conflict for conflict in claims["lint"] if _concerns(conflict, claims["rows"])]
    if shown:
        console.print("\nConflicting claims")
    for conflict in shown:
        console.print(f"- {conflict['kind']}: {conflict['cells'][0]}: {conflict['reason']}")
    if others := len(claims["lint"]) - len(shown):
        console.print(f"\n{others} conflicts between other claims: claims.md")


def _concerns(conflict: Mapping[str, Any], rows: Sequence[ClaimRow]) -> bool:
    """Whether a conflict is about a system of these rows."""
    return any(cell.startswith(f"{row['system']} ") for cell in conflict["cells"] for row in rows)


def _print_table(console: Console, rows: Sequence[ClaimRow]) -> None:
    """Print a table, each system's name above its cells. Without measurements their columns are left out."""
    has_measurements = any(row["measured"] for row in rows)
    console.print(_columns(has_measurements, header=True))
    for system in dict.fromkeys(row["system"] for row in rows):
        console.print(system)
        table = _columns(has_measurements, header=False)
        for row in (row for row in rows if row["system"] == system):
            results = [measured(row), str(row["measured"]["n"]) if row["measured"] else "–"] * has_measurements
            in_words = "other" if row["convention"]["published"] != UNSTATED else "–"
            stated = convention(row) if row["profile"] else in_words
            table.add_row(f" {row['task']}", published(row), *results, stated, row["verdict"])
        console.print(table)
        for note in dict.fromkeys(row["note"] for row in rows if _notes_forwards(row, system)):
            console.print(f" tok/fwd: {note}")


def _notes_forwards(row: ClaimRow, system: str) -> bool:
    """Whether the row's note says how this system's forwards were counted, and at which slot budget."""
    return bool(row["system"] == system and row["unit"] == "tok/forward" and row["note"])


def _columns(has_measurements: bool, *, header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header)
    table.add_column("", width=15, overflow="fold")
    for name, width in (("published", 12), ("measured", 19), ("n", 5)) if has_measurements else (("published", 15),):
        table.add_column(name, justify="right", no_wrap=True, width=width)
    table.add_column("convention", overflow="fold", width=11)
    table.add_column("verdict", overflow="fold")
    return table


def page(claims: Mapping[str, Any]) -> str:
    """The page docs/claims.md: all tables, conflicts and sources in Markdown."""
    # 1) introduction and counts
    parts = [
        "# Claims\n",
        "All of this page is written by `fluid-eval reproduce --docs docs/claims.md`: every cell of "
        "`reports/claims.toml` beside its measurement, with the day and commit of each. With `--measured "
        "docs/claims.json` nothing is run, and the page is written from what was measured before.\n\n"
        f"{LEGEND[0].upper()}{LEGEND[1:]}.\n\n"
        "Conventions are described in [protocols.md](protocols.md).\n",
        f"{verdict_counts(claims['rows'])}. {external(claims)}.\n",
    ]
    # 2) tables
    for title, rows in in_tables(claims["rows"]):
        parts.append(f"## {title}\n")
        head = (
            *("system", "task", "metric", "published", "measured", "n", "convention", "decoder", "verdict"),
            *("measured at", "source", "note"),
        )
        parts.append("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for row in rows:
            n = str(row["measured"]["n"]) if row["measured"] else ""
            cells = (
                row["system"], row["task"], row["metric"], published(row), measured(row), n, convention(row),
                row.get("decoder", ""), row["verdict"], taken(row), stands(row), row["note"],
            )  # fmt: skip
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    # 3) conflicts and sources
    parts.append(
        "## Conflicting claims\n\nFound in the ledger by rules (`fluid_eval/claims/conflicts.py`), without measuring.\n"
    )
    parts.append("| conflict | cells | reason |\n|---|---|---|")
    parts += [f"| {c['kind']} | {'; '.join(c['cells'])} | {c['reason']} |" for c in claims["lint"]]
    parts += ["\n## Sources\n", *(f"- {name}: {cite}" for name, cite in claims["sources"].items())]
    return "\n".join(parts) + "\n"
