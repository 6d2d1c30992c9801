"""`fluid-eval models`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "list bundled checkpoints, or say what a model is"
EXAMPLE = "fluid-eval models"
SHIFTED = (None, "fluid", "nbdiff")
"""Methods that predict the next token, masked or not."""
NEXT_TOKEN = "next-token: the slot before a token predicts it"
IN_PLACE = "none: a masked slot predicts its own token"


def add(models: argparse.ArgumentParser) -> None:
    models.add_argument(
        "model",
        nargs="?",
        help="a name listed, a folder or a hub id: its layout, method, decoder and special tokens, what is missing; "
        "configuration and tokenizer files are enough",
    )
    models.add_argument("--method", metavar="NAME", help="the adaptation, in place of the one that the files tell")
    models.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    from ..output.terminal import bare_table, screen

    if options.model is not None:
        facts = describe_model(options.model, options.method)
        if options.json:
            print(json.dumps(facts, indent=2))
            return 0
        table = bare_table()
        table.add_column("fact", no_wrap=True)
        table.add_column("of this model", overflow="fold")
        for name, value in facts.items():
            table.add_row(
                name.replace("_", " "), "; ".join(value) or "nothing" if isinstance(value, list) else f"{value}"
            )
        screen().print(table)
        return 0
    return _list(options)


def describe_model(path: str, method: str | None = None) -> dict[str, Any]:
    """What a model's files tell without its weights, by name.  method: in place of the one that they tell.

    Raises ConfigError if the path is no model, or its layout is unknown or half known.
    """
    from fluid_model.checkpoints.checkpoint import describe
    from fluid_model.checkpoints.special_tokens import read_special_tokens
    from fluid_model.common.errors import ConfigError
    from fluid_model.common.fields import build

    from ..common.bundled import resolved
    from ..common.spec import ModelSpec
    from ..running.decoder_choice import adapted_for

    # 1) files and method
    path = resolved(path)
    model: ModelSpec = build(ModelSpec, {"path": path} if method is None else {"path": path, "method": method})
    info = describe(path, model.method)
    missing = [] if info.has_weights else ["weights"]
    try:
        decoder = adapted_for(info)
    except ConfigError:
        decoder = "none"
        missing.append(f"a decoder for {info.method}")
    missing += ["K-head"] if info.method == "fluid" and not info.has_head else []
    # 2) the tokenizer
    mask, ends = "none", ["none"]
    try:
        special = read_special_tokens(path, model.method)
    except ConfigError as error:
        missing.append(str(error))
    else:
        mask = f"{special.mask[0]} ({special.mask[1]})" if special.mask else "none"
        ends = [f"{text} ({end})" for text, end in special.ends] or ["none"]
    return {
        "layout": info.layout or "of transformers", "architecture": info.architecture,
        "method": info.method or "none, a plain causal model", "decoder": decoder,
        "shift": NEXT_TOKEN if info.shift or info.method in SHIFTED else IN_PLACE,
        "block_length": info.block_length or "not stated", "window": info.window,
        "k_max": info.k_max or "no K-head", "mask_token": mask, "end_tokens": ends, "missing": missing,
    }  # fmt: skip


def _list(options: argparse.Namespace) -> int:
    """Bundled and packaged checkpoints."""
    from fluid_model.checkpoints.gguf_files import PACKAGED

    from ..common.bundled import bundled
    from ..output.terminal import bare_table, screen

    rows = [_bundled_row(name, folder) for name, folder in bundled().items()]
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = bare_table()
    columns = {"name": "name", "decoder": "decoder", "window": "window", "megabytes": "MB"}
    for title in columns.values():
        table.add_column(title, no_wrap=True, justify="left" if title in ("name", "decoder") else "right")
    for row in rows:
        table.add_row(*("–" if row[name] is None else str(row[name]) for name in columns))
    console = screen()
    console.print(table)
    for row in rows:
        if row["parent"] is not None:
            console.print(f"{row['name']}: an adapter over {row['parent']}")
    console.print("a folder of that name in the working directory wins; other models: a folder, a hub id, a GGUF file")
    for name, (_, package, title) in PACKAGED.items():
        console.print(f"{name}: {title}, of the package {package}")
    console.print("fluid-eval models MODEL: layout, method, decoder and special tokens of one")
    return 0


def _bundled_row(name: str, folder: Path) -> dict[str, Any]:
    """A checkpoint's row. An adapter's parent may be large, or not installed: it is named and not opened."""
    from fluid_model.checkpoints.checkpoint import describe
    from fluid_model.checkpoints.manifest import read_manifest

    from ..running.decoder_choice import adapted_for

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    row: dict[str, Any] = {"name": name, "megabytes": round(size / 1e6, 1)}
    manifest = read_manifest(folder)
    if manifest is not None and manifest.weights == "adapter":
        return {**row, "decoder": manifest.method, "window": None, "parent": manifest.parent}
    info = describe(str(folder))
    return {**row, "decoder": adapted_for(info), "window": info.window, "parent": None}
