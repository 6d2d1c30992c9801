"""`fluid-eval runs`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "list run folders with model, decoder, scores, state, date"
EXAMPLE = "fluid-eval runs sweeps"


def add(runs: argparse.ArgumentParser) -> None:
    runs.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="where to look; default: runs"
    )
    runs.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ..output.terminal_runs import print_runs
    from ..results.run_list import list_runs

    entries = list_runs(options.folder)
    if options.json:
        print(json.dumps([{**asdict(entry), "folder": str(entry.folder)} for entry in entries], indent=2))
    else:
        print_runs(entries, options.folder)
    return 0
