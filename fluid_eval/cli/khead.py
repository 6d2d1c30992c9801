"""`fluid-eval khead`."""

from __future__ import annotations

import argparse
import json

from . import EXIT_OK
from .options import add_analysed_run, analysed_run

HELP = "K-head diagnostics: predicted strides against accepted lengths"
EXAMPLE = "fluid-eval khead runs/A"


def add(khead: argparse.ArgumentParser) -> None:
    add_analysed_run(khead)


def main(options: argparse.Namespace) -> int:
    with analysed_run(options) as folder:
        from ..analysis.khead import khead_run
        from ..output.terminal_audits import print_khead
        from ..results.run_folder import KHEAD, write_json

        report = khead_run(folder)
        write_json(folder / KHEAD, report)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_khead(report)
    return EXIT_OK
