"""`fluid-eval report`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "one self-contained HTML page from a run folder"


def add(report: argparse.ArgumentParser) -> None:
    report.add_argument("run", type=Path, help="run folder")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the run folder")


def main(options: argparse.Namespace) -> int:
    from ..report import write_report

    output = options.output or options.run / "report.html"
    write_report(options.run, output)
    print(output)
    return 0
