"""`fluid-eval decoders`."""

from __future__ import annotations

import argparse
import json

HELP = "list decoders, the models they need, and their settings"
EXAMPLE = "fluid-eval decoders"


def add(decoders: argparse.ArgumentParser) -> None:
    decoders.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    from fluid_model.registry import decoders, setting_names

    from ..output.terminal import bare_table, screen

    if options.json:
        rows = [
            {"name": name, "methods": kind.methods, "about": kind.__doc__, "settings": setting_names(kind)}
            for name, kind in decoders().items()
        ]
        print(json.dumps(rows, indent=2))
        return 0
    table = bare_table()
    for name in ("name", "needs", "about"):
        table.add_column(name, overflow="fold", no_wrap=name == "name")
    for name, kind in decoders().items():
        needs = f"adapted to {' or '.join(kind.methods)}" if kind.methods else "any causal model"
        about = " ".join((kind.__doc__ or "").split())
        table.add_row(name, needs, f"{about}\nsettings: {', '.join(setting_names(kind))}")
    console = screen()
    console.print(table)
    console.print("--decoder NAME, or MODULE:CLASS for your own; one setting: fluid-eval settings decoder.confidence")
    return 0
