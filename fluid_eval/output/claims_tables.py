"""Claims and their verdicts as tables: on a terminal, and as a page of docs. Reads what claims.json holds; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested, read_json

from ..claims.ledger import TABLES, UNSTATED, UNSTATED_CONVENTION
from .terminal import screen

Row = Mapping[str, Any]
TITLES = {
    "tiny": "This project's own",
    "main": "Main tables",
    "ablation": "Ablations",
    "speed": "Speeds and strides",
    "own": "Authors on their own systems",
}
SHORT = {"%": "", "tok/forward": " tok/fwd"}
_OF_ROW = {
    "table", "system", "task", "metric", "published", "published_to", "unit", "profile", "convention", "measured",
    "verdict", "source", "note", "run",
}  # fmt: skip
LEGEND = (
    "reproduced: surely within the margin named, by two one-sided tests of 5% each; not reproduced: surely further "
    "off, the published number's own chance at its n counted too, and corrected for how many were judged (Holm: at "
    "most 5% of tables hold one by chance); cannot tell: neither, with the n it would take; "
    f"{UNSTATED_CONVENTION}, decoder {UNSTATED}: judged by those it was measured with, so that a miss may be for them; "
    "different convention: measured under another protocol than the one stated, by what the run did, so not judged; "
    "re-run: this project's own figures, equal to the last digit published or not, which no one else claims; "
    "scores in %"
)


def read_claims(file: Path) -> Nested:
    """What `fluid-eval reproduce` wrote. Raises ConfigError naming what is missing."""
    found = read_json(file)
    rows, clashes = found.get("rows"), found.get("lint")
    if not (isinstance(rows, list) and rows and isinstance(clashes, list)):
        raise ConfigError(f"{file}: holds no claims (rows and lint); name the claims.json that reproduce wrote")
    for where, needed, entries in (("rows", _OF_ROW, rows), ("lint", {"cells", "kind", "reason"}, clashes)):
        for place, entry in enumerate(entries):
            if missing := needed - (entry.keys() if isinstance(entry, dict) else set()):
                told = ", ".join(sorted(missing))
                raise ConfigError(f"{file}: {where}[{place}] lacks {told}; name the claims.json that reproduce wrote")
    return found


def published(row: Row) -> str:
    """As published: a number, or a range, with its unit where it is no score."""
    ends = [end for end in (row["published"], row["published_to"]) if end is not None]
    decimals = row.get("decimals")  # none where the values show them, and in files from before there were any
    value = "–".join(str(end) if decimals is None else f"{end:.{decimals}f}" for end in ends)
    return f"{value}{SHORT.get(row['unit'], ' ' + row['unit'])}"


def measured(row: Row) -> str:
    """As measured, with its interval where it has one; a dash where nothing was."""
    found = row["measured"]
    if found is None:
        return "–"
    scale, digits = (100, 1) if row["unit"] == "%" else (1, 2)
    value, low, high = (
        None if found[name] is None else f"{scale * found[name]:.{digits}f}" for name in ("score", "low", "high")
    )
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def convention(row: Row) -> str:
    """The stated convention and, where it was measured by another, that one; with the run's own settings, if any."""
    told = row["convention"]
    name = (told["measured"] or "").rpartition(" ")[0]
    if row["profile"] and name.split("+")[0] == row["profile"]:
        return name
    return f"{told['published']} → {name}" if name else str(told["published"])


def stands(row: Row) -> str:
    """Where a published number stands: its source, and the place in it."""
    return ", ".join(part for part in (row["source"], row.get("where")) if part)


def kind(verdict: str) -> str:
    """Which a verdict is, without what it adds."""
    return verdict.partition(":")[0].partition(" (")[0]


def taken(row: Row) -> str:
    """When a row was measured, and at which commit of this package (its version, where it was installed)."""
    found = row.get("taken")  # none where nothing was run, and in files from before it was kept
    if not found:
        return ""
    at = f"commit {found['commit'][:7]}" if found["commit"] else f"version {found['version']}"
    return f"{found['started'][:10]}, {at}{' with changes' if found['dirty'] else ''}"


def occasions(rows: Sequence[Row]) -> list[str]:
    """What was measured when: a line for each day and commit, with its systems."""
    systems: dict[str, list[str]] = {}
    for row in rows:
        if at := taken(row):
            systems.setdefault(at, []).append(row["system"])
    return [f"measured {at}: {', '.join(dict.fromkeys(names))}" for at, names in systems.items()]


def in_tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by table, in the tables' order."""
    for table in TABLES:
        if found := [row for row in rows if row["table"] == table]:
            yield TITLES[table], found


def summary(rows: Sequence[Row]) -> str:
    """How many of each verdict, and how many of them chance alone may have made."""
    kinds = [row["verdict"].partition(":")[0] for row in rows]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    tested = sum(bool(row.get("p") and row["p"]["within"] is not None) for row in rows)
    chance = f"; of {tested} judged, chance alone: one 'not reproduced' in at most 5% of such tables" if tested else ""
    return counted + chance


def external(found: Mapping[str, Any]) -> str:
    """How many of others' claims were measured; empty in files from before that was counted."""
    counted = found.get("external")
    return f"Claims of others measured here: {counted['measured']} of {counted['claims']}" if counted else ""


def print_verdicts(found: Mapping[str, Any]) -> None:
    """The tables in 80 columns, then what the linter found."""
    console = screen()
    for title, rows in in_tables(found["rows"]):
        console.print(f"{title}\n")
        _print_table(console, rows)
        console.print()
    lines = [summary(found["rows"]), external(found), *occasions(found["rows"])]
    console.print("\n".join(line for line in lines if line) + f"\n\n{LEGEND}")
    console.print("convention: a profile of docs/protocols.md; other: in the claim's own words (claims.md has them)")
    console.print("NAME/: the model's folder below --models-dir (or FLUID_MODELS_DIR)")
    if found["lint"]:
        console.print("\nClaims that clash")
        for clash in found["lint"]:
            console.print(f"- {clash['kind']}: {clash['cells'][0]}: {clash['reason']}")


def _print_table(console: Console, rows: Sequence[Row]) -> None:
    """Each system's name above its cells; without columns for what was measured where nothing was."""
    ran = any(row["measured"] for row in rows)
    console.print(_columns(ran, header=True))
    for system in dict.fromkeys(row["system"] for row in rows):
        console.print(system)
        table = _columns(ran, header=False)
        for row in (row for row in rows if row["system"] == system):
            results = (measured(row), str(row["measured"]["n"]) if row["measured"] else "–") if ran else ()
            told = convention(row) if row["profile"] else "other" if row["convention"]["published"] != UNSTATED else "–"
            table.add_row(f"  {row['task']}", published(row), *results, told, row["verdict"])
        console.print(table)


def _columns(ran: bool, *, header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header)
    table.add_column("", width=16, overflow="fold")
    for name, width in (("published", 12), ("measured", 19), ("n", 5)) if ran else (("published", 15),):
        table.add_column(name, justify="right", no_wrap=True, width=width)
    table.add_column("convention", overflow="fold", width=11)
    table.add_column("verdict", overflow="fold")
    return table


def page(found: Mapping[str, Any]) -> str:
    """All of it in Markdown."""
    parts = [
        "# Claims\n",
        "Written by `fluid-eval reproduce --docs docs/claims.md`: every cell of `reports/claims.toml` beside what was "
        f"measured, on the day and at the commit that its row tells. {LEGEND[0].upper()}{LEGEND[1:]}.\n\n"
        "Conventions are told in [protocols.md](protocols.md).\n",
        f"{summary(found['rows'])}. {external(found)}.\n",
    ]
    for title, rows in in_tables(found["rows"]):
        parts.append(f"## {title}\n")
        head = (
            "system",
            "task",
            "metric",
            "published",
            "measured",
            "n",
            "convention",
            "decoder",
            "verdict",
            "measured at",
            "source",
            "note",
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
    parts.append(
        "## Claims that clash\n\nFound in the ledger by rules (`fluid_eval/claims/conflicts.py`), without measuring.\n"
    )
    parts.append("| what | cells | why |\n|---|---|---|")
    parts += [f"| {c['kind']} | {'; '.join(c['cells'])} | {c['reason']} |" for c in found["lint"]]
    parts += ["\n## Sources\n", *(f"- {name}: {cite}" for name, cite in found["sources"].items())]
    return "\n".join(parts) + "\n"
