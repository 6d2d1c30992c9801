"""The `fluid-train` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from ..fields import assign, read_toml
from .recipe import build_recipe


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="fluid-train", description="Make a checkpoint from its recipe.")
    top.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    top.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a setting of the recipe")
    top.add_argument("--resume", action="store_true", help="go on from the last saved step")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns the exit code: 0 done, 2 bad input (one line says which), 130 interrupted."""
    options = parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        values = read_toml(options.recipe)
        for setting in options.set:
            assign(values, setting)
        recipe = build_recipe(values)
        from .run import train

        told = train(recipe, resume=options.resume)
    except ConfigError as error:
        print(f"fluid-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fluid-train: interrupted; --resume goes on from the last saved step", file=sys.stderr)
        return 130
    print(f"{recipe.out}: held-out loss {told['held_out_loss']:.4f} after {told['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
