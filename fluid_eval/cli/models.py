"""`fluid-eval models`."""

from __future__ import annotations

import argparse
import json

HELP = "list bundled checkpoints, which --model takes by name"
EXAMPLE = "fluid-eval models"


def add(models: argparse.ArgumentParser) -> None:
    models.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    from fluid_model.checkpoints.checkpoint import describe
    from fluid_model.checkpoints.gguf_files import PACKAGED

    from ..common.bundled import bundled
    from ..output.terminal import bare_table, screen
    from ..running.decoder_choice import adapted_for

    rows = []
    for name, folder in bundled().items():
        info = describe(str(folder))
        size = sum(file.stat().st_size for file in folder.iterdir())
        rows.append(
            {"name": name, "decoder": adapted_for(info), "window": info.window, "megabytes": round(size / 1e6, 1)}
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = bare_table()
    for name in ("name", "decoder", "window", "MB"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("name", "decoder") else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console = screen()
    console.print(table)
    console.print("a folder of that name in the working directory wins; other models: a folder, a hub id, a GGUF file")
    for name, (_, package, title) in PACKAGED.items():
        console.print(f"{name}: {title}, of the package {package}")
    return 0
