"""`fluid-eval reproduce`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

HELP = "measure the claims of reports/claims.toml and compare"


def add(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument("--data-dir", default=None, metavar="DIR", help="folder with benchmark data")
    reproduce.add_argument("--models-dir", default=None, metavar="DIR", help="folder with model folders")
    reproduce.add_argument("--out", type=Path, default=Path("runs/claims"), metavar="DIR", help="default: runs/claims")


def main(options: argparse.Namespace) -> int:
    from ..claims import reproduce

    data_dir = options.data_dir or os.environ.get("FLUID_DATA_DIR")
    models_dir = options.models_dir or os.environ.get("FLUID_MODELS_DIR")
    reproduce(options.out, data_dir=data_dir, models_dir=models_dir)
    return 0
