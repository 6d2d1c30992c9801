"""`fluid-eval report`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "HTML page of run folders; Markdown and LaTeX for a paper"
EXAMPLE = "fluid-eval report runs/A runs/B"


def add(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder, or a sweep's",
    )
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the first folder")
    report.add_argument(
        "--base",
        type=Path,
        metavar="RUN",
        help="run to compare the others with; default: the first, of a sweep its first AR point",
    )
    report.add_argument("--across-protocols", action="store_true", help="compare runs with different protocols too")
    report.add_argument("--claims", type=Path, metavar="FILE", help="claims.json of fluid-eval reproduce")
    report.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write an appendix too: verdicts, tables, protocol"
    )
    report.add_argument("--latex", type=Path, metavar="FILE", help="write a table of the scores too, for booktabs")


def main(options: argparse.Namespace) -> int:
    from ..output.report import default_page, write_report

    output = options.output or default_page(options.runs)
    write_report(
        options.runs, output, claims=options.claims, markdown=options.markdown, latex=options.latex,
        base=options.base, across_protocols=options.across_protocols,
    )  # fmt: skip
    for file in (output, options.markdown, options.latex):
        if file is not None:
            print(file)
    return 0
