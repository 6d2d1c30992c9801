"""`fluid-eval rescore`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

HELP = "score stored answers again by another profile's extractors"
EXAMPLE = "fluid-eval rescore runs/A --profile minimal"


def add(rescore: argparse.ArgumentParser) -> None:
    rescore.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    rescore.add_argument(
        "--profile", required=True, metavar="NAME|FILE", help="profile whose extractors to use: minimal, my.toml, ..."
    )
    rescore.add_argument("--out", type=Path, metavar="DIR", help="default: RUN-read-as-PROFILE")
    rescore.add_argument("--data-dir", metavar="DIR", help="benchmark data; default: where the run had them")
    rescore.add_argument("--decoder", metavar="MODULE:CLASS", help="of a run whose decoder is your own code")
    rescore.add_argument("--json", action="store_true", help="print the result as JSON")


def main(options: argparse.Namespace) -> int:
    from ..analysis.rescore import rescore
    from ..output.terminal_results import print_result
    from .options import exit_code, name_own_decoder

    name_own_decoder(options)
    data_dir = options.data_dir or os.environ.get("FLUID_DATA_DIR")
    result, folder = rescore(options.run, options.profile, options.out, data_dir=data_dir)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result, folder, settable=False)
    return exit_code(result.get("lost", {}), result.get("health", []))
