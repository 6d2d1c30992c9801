"""`fluid-eval reproduce`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..claims.ledger import Claim

HELP = "measure published claims here, judge them, find conflicts between them"


def add(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument("--table", metavar="A,B", help="tiny, main, ablation, speed, own; default: all")
    reproduce.add_argument("--systems", metavar="A,B", help="names, or their beginnings: FLUID-7B,tiny-")
    reproduce.add_argument("--data-dir", default=None, metavar="DIR", help="folder with benchmark data")
    reproduce.add_argument("--models-dir", default=None, metavar="DIR", help="folder with model folders")
    reproduce.add_argument(
        "--allow-unsafe-code", action="store_true", help="run downloaded models' code where nothing isolates it"
    )
    reproduce.add_argument("--ledger", type=Path, metavar="FILE", help="default: the bundled reports/claims.toml")
    reproduce.add_argument("--out", type=Path, default=Path("runs/claims"), metavar="DIR", help="default: runs/claims")
    reproduce.add_argument(
        "--margin", type=float, metavar="POINTS", help="how far a score may be off and be reproduced (default: 3)"
    )
    reproduce.add_argument(
        "--speed-margin", type=float, metavar="PERCENT", help="the same for speeds, of the published value (default: 5)"
    )
    reproduce.add_argument(
        "--resume", action="store_true", help="go on with the runs in --out: what is finished is not measured again"
    )
    reproduce.add_argument("--docs", type=Path, metavar="FILE", help="write the page docs/claims.md, too")
    reproduce.add_argument("--json", action="store_true", help="print what claims.json holds")


def main(options: argparse.Namespace) -> int:
    from fluid_model.common import files

    from ..claims.ledger import read_claims
    from ..claims.reproduce import Resources, reproduce
    from ..claims.verdicts import Margins
    from ..output.claims_tables import page, print_verdicts

    ledger = read_claims(options.ledger)
    claims = _wanted(ledger.claims, options)
    models = Path(options.models_dir or os.environ.get("FLUID_MODELS_DIR") or "models")
    data_dir = options.data_dir or os.environ.get("FLUID_DATA_DIR")
    resources = Resources(models, data_dir, options.allow_unsafe_code)
    given = {"points": options.margin, "percent": options.speed_margin}
    margins = Margins(**{name: value for name, value in given.items() if value is not None})
    result = reproduce(ledger, claims, options.out, resources, resume=options.resume, margins=margins)
    text = page(result)
    for file in (options.out / "claims.md", options.docs):
        if file is not None:
            files.write(file, text)
    pages = _report(result, options.out)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_verdicts(result)
        print(f"\n{options.out / 'claims.md'} and claims.json", *pages, sep="\n")
    return 0


def _wanted(claims: Sequence[Claim], options: argparse.Namespace) -> list[Claim]:
    """The claims in the tables and of the systems asked for. Raises ConfigError for one that is unknown."""
    from fluid_model.common.errors import ConfigError

    from ..claims.ledger import TABLES

    tables = _names(options.table) or TABLES
    if unknown := [name for name in tables if name not in TABLES]:
        raise ConfigError(f"--table {unknown[0]}: unknown; known: {', '.join(TABLES)}")
    there = [claim for claim in claims if claim.table in tables]
    systems = _names(options.systems) or [""]
    for name in systems:
        if not any(claim.system.startswith(name) for claim in there):
            known = ", ".join(dict.fromkeys(claim.system for claim in there)) or "none"
            where = f" in --table {options.table}" if options.table else ""
            raise ConfigError(f"--systems {name}: no such system{where}; known: {known}")
    return [claim for claim in there if claim.system.startswith(tuple(systems))]


def _names(text: str | None) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _report(result: dict[str, Any], out: Path) -> list[Path]:
    """The HTML report of all runs with the claims' verdicts; none where nothing was run."""
    from ..claims.reproduce import CLAIMS
    from ..output.report import write_report

    folders = [Path(folder) for folder in dict.fromkeys(row["run"] for row in result["rows"] if row["run"])]
    if not folders:
        return []
    write_report(folders, out / "report.html", claims=out / CLAIMS)
    return [out / "report.html"]
