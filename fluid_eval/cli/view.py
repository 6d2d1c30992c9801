"""`fluid-eval view`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "list, compare and watch the runs of a folder in a browser"
EXAMPLE = "fluid-eval view runs"


def add(view: argparse.ArgumentParser) -> None:
    view.add_argument(
        "folder", type=Path, nargs="?", default=Path(), metavar="FOLDER", help="with runs and sweeps; default: this one"
    )
    view.add_argument(
        "--port", type=int, default=8420, metavar="N", help="on loopback; 0 takes a free one; default: 8420"
    )


def main(options: argparse.Namespace) -> int:
    from ..output.view_server import serve

    serve(options.folder, options.port)
    return 0
