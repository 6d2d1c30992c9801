"""`fluid-eval compare`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import EXIT_OK, EXIT_WORSE

HELP = "finished runs against the first, paired on the same documents"


def add(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, the base first")
    compare.add_argument(
        "--fail-if-worse", type=float, metavar="POINTS",
        help="exit code 4 if a task, or all together, is surely worse than the base, by more than that many points",
    )  # fmt: skip
    compare.add_argument("--across-protocols", action="store_true", help="also if asked or read in different ways")
    compare.add_argument("--all-pairs", action="store_true", help="every two of the runs, not each against the first")
    compare.add_argument("--flips", action="store_true", help="name every answer that became right or wrong")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")


def main(options: argparse.Namespace) -> int:
    from ..analysis.compare import compare, worse
    from ..output.terminal import difference
    from ..output.terminal_pairs import print_comparison

    comparison = compare(options.runs, across_protocols=options.across_protocols, all_pairs=options.all_pairs)
    found = worse(comparison, options.fail_if_worse) if options.fail_if_worse is not None else []
    if options.json:
        print(json.dumps(comparison, indent=2))
    else:
        print_comparison(comparison, flips=options.flips)
        if options.fail_if_worse is not None and not found:
            print(f"nothing is surely worse by more than {options.fail_if_worse:g}; less than its MDE may go unseen")
    for entry in found:
        told = f"{entry['task']} of {entry['other']}: {difference(entry['difference'])} points"
        print(f"worse by more than {options.fail_if_worse:g}: {told}", file=sys.stderr)
    return EXIT_WORSE if found else EXIT_OK
