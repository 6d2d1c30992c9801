"""Claims and their verdicts as tables: on a terminal, and as a page of docs. Reads what claims.json holds; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .claims import TABLES, UNSTATED

Row = Mapping[str, Any]
TITLES = {
    "tiny": "This project's own",
    "main": "Main tables",
    "ablation": "Ablations",
    "speed": "Speeds and strides",
    "own": "Authors on their own systems",
}
LEGEND = (
    "reproduced: the published value lies in the measured 95% interval; different convention: measured under another "
    "protocol than the one stated, so neither reproduced nor not; scores in %"
)


def published(row: Row) -> str:
    """As published: a number, or a range, with its unit where it is no score."""
    until = "" if row["published_to"] is None else f"–{row['published_to']:g}"
    return f"{row['published']:g}{until}{'' if row['unit'] == '%' else ' ' + row['unit']}"


def measured(row: Row) -> str:
    """As measured, with its interval; a dash where nothing was."""
    found = row["measured"]
    if found is None:
        return "–"
    scale, digits = (100, 1) if row["unit"] == "%" else (1, 2)
    value, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("score", "low", "high"))
    return f"{value} [{low}, {high}]"


def convention(row: Row) -> str:
    """The stated convention and, where it was measured by another, that one."""
    told = row["convention"]
    name = (told["measured"] or "").rpartition(" ")[0]
    return told["published"] if name in ("", told["published"]) else f"{told['published']} → {name}"


def in_tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows by table, in the tables' order."""
    for table in TABLES:
        if found := [row for row in rows if row["table"] == table]:
            yield TITLES[table], found


def summary(rows: Sequence[Row]) -> str:
    """How many of each verdict."""
    kinds = [row["verdict"].partition(":")[0] for row in rows]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def print_verdicts(found: Mapping[str, Any]) -> None:
    """The tables in 80 columns, then what the linter found."""
    console = Console(width=None if Console().is_terminal else 80, highlight=False, markup=False)
    for title, rows in in_tables(found["rows"]):
        console.print(title)
        console.print(_table(rows))
        console.print()
    console.print(f"{summary(found['rows'])}\n\n{LEGEND}")
    console.print("convention: a profile of docs/protocols.md; other: in the claim's own words (claims.md has them)")
    console.print("NAME/: the model's folder below --models-dir (or FLUID_MODELS_DIR)")
    if found["lint"]:
        console.print("\nClaims that clash")
        for clash in found["lint"]:
            console.print(f"- {clash['kind']}: {clash['cells'][0]}: {clash['reason']}")


def _table(rows: Sequence[Row]) -> Table:
    """Without columns for what was measured where nothing was."""
    ran = any(row["measured"] for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("system", overflow="fold", max_width=14 if ran else 20)
    table.add_column("task", overflow="fold", max_width=14)
    for name in ("published", "measured", "n") if ran else ("published",):
        table.add_column(
            name, justify="right", no_wrap=name == "measured", max_width=11 if name == "published" else None
        )
    table.add_column("convention", overflow="fold", max_width=11)
    table.add_column("verdict", overflow="fold")
    before = None
    for row in rows:
        system = row["system"] if row["system"] != before else ""
        results = (measured(row), str(row["measured"]["n"]) if row["measured"] else "–") if ran else ()
        told = convention(row) if row["profile"] else "other" if row["convention"]["published"] != UNSTATED else "–"
        table.add_row(system, row["task"], published(row), *results, told, row["verdict"])
        before = row["system"]
    return table


def page(found: Mapping[str, Any]) -> str:
    """All of it in Markdown."""
    parts = [
        "# Claims\n",
        "Written by `fluid-eval reproduce --docs docs/claims.md`: every cell of `reports/claims.toml` beside what was "
        f"measured when this page was written. {LEGEND[0].upper()}{LEGEND[1:]}.\n\nConventions are told in "
        "[protocols.md](protocols.md).\n",
        f"{summary(found['rows'])}.\n",
    ]
    for title, rows in in_tables(found["rows"]):
        parts.append(f"## {title}\n")
        head = ("system", "task", "metric", "published", "measured", "n", "convention", "verdict", "source", "note")
        parts.append("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for row in rows:
            n = str(row["measured"]["n"]) if row["measured"] else ""
            cells = (
                row["system"], row["task"], row["metric"], published(row), measured(row), n, convention(row),
                row["verdict"], row["source"], row["note"],
            )  # fmt: skip
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    parts.append("## Claims that clash\n\nFound in the ledger by rules (`fluid_eval/lint.py`), without measuring.\n")
    parts.append("| what | cells | why |\n|---|---|---|")
    parts += [f"| {c['kind']} | {'; '.join(c['cells'])} | {c['reason']} |" for c in found["lint"]]
    return "\n".join(parts) + "\n"
