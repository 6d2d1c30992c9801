"""`fluid-eval doctor`."""

from __future__ import annotations

import argparse
import os

HELP = "check versions, devices, data, isolation; exit 1 if a run would fail"
EXAMPLE = "fluid-eval doctor"


def add(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("--data-dir", default=None, metavar="DIR", help="folder with benchmark data")


def main(options: argparse.Namespace) -> int:
    from ..running.doctor import examine

    return 0 if examine(options.data_dir or os.environ.get("FLUID_DATA_DIR")) else 1
