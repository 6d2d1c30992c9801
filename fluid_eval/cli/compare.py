"""`fluid-eval compare`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import EXIT_OK, EXIT_WORSE

HELP = "compare finished runs with the first, paired by document"
EXAMPLE = "fluid-eval compare runs/A runs/B"


def add(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, the base first")
    compare.add_argument(
        "--fail-if-worse", type=float, metavar="POINTS",
        help="exit code 4 if a task, or the mean, is significantly worse than the base by more than POINTS",
    )  # fmt: skip
    compare.add_argument("--across-protocols", action="store_true", help="compare runs with different protocols too")
    compare.add_argument("--all-pairs", action="store_true", help="compare every two runs, not each with the first")
    compare.add_argument("--flips", action="store_true", help="list every flipped document")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")


def main(options: argparse.Namespace) -> int:
    from ..analysis.compare import compare, worse
    from ..output.terminal import difference
    from ..output.terminal_pairs import print_comparison

    comparison = compare(options.runs, across_protocols=options.across_protocols, all_pairs=options.all_pairs)
    drops = worse(comparison, options.fail_if_worse) if options.fail_if_worse is not None else []
    if options.json:
        print(json.dumps(comparison, indent=2))
    else:
        print_comparison(comparison, flips=options.flips)
        if options.fail_if_worse is not None and not drops:
            allowed = f"{options.fail_if_worse:g}"
            print(f"nothing is significantly worse by more than {allowed}; drops below the MDE may go undetected")
    for entry in drops:
        drop = f"{entry['task']} of {entry['other']}: {difference(entry['difference'])} points"
        print(f"worse by more than {options.fail_if_worse:g}: {drop}", file=sys.stderr)
    return EXIT_WORSE if drops else EXIT_OK
