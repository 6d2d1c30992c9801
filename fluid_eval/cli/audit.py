"""`fluid-eval audit`."""

from __future__ import annotations

import argparse
import json

from . import EXIT_FAILED, EXIT_OK
from .options import add_analysed_run, analysed_run, given_model

HELP = "losslessness: does a decoder write AR's text of the same weights?"
EXAMPLE = "fluid-eval audit runs/A"


def add(audit: argparse.ArgumentParser) -> None:
    add_analysed_run(audit)


def main(options: argparse.Namespace) -> int:
    from ..analysis.losslessness import FAULTS, audit_run
    from ..analysis.text_audit import audit_text, spec_of_others
    from ..output.terminal_audits import print_audit

    if options.spec is not None and options.spec.is_dir() and spec_of_others(options.spec) is not None:
        report = audit_text(options.spec, given_model(options))
    else:
        with analysed_run(options) as folder:
            report = audit_run(folder)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_audit(report)
    return EXIT_FAILED if report["verdict"] in FAULTS else EXIT_OK
