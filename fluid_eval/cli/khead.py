"""`fluid-eval khead`."""

from __future__ import annotations

import argparse
import json

from . import EXIT_OK
from .options import add_looked_into, looked_into

HELP = "what the K-head says against what drafts are worth"


def add(khead: argparse.ArgumentParser) -> None:
    add_looked_into(khead)


def main(options: argparse.Namespace) -> int:
    with looked_into(options) as folder:
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
