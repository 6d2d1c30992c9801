"""The `fluid-train` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.command_line import Parser
from ..common.errors import ConfigError, RunError
from ..common.fields import assign, at_least
from ..common.files import read_toml, write_new
from ..common.versions import ShowVersions
from .chain import build_chain

IMPORT, WRITE = "import-llamafactory", "write-answers"


def parser() -> argparse.ArgumentParser:
    """The command line for a recipe."""
    top = Parser(
        prog="fluid-train",
        description="Make a checkpoint from its recipe.",
        epilog=f"fluid-train {IMPORT} FILE.yaml writes the recipe of a LLaMA-Factory training file; "
        f"fluid-train {WRITE} MODEL PROMPTS OUT writes training rows with a model's own answers.",
    )
    top.add_argument("--version", action=ShowVersions, libraries=("torch", "transformers", "peft"))
    top.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    top.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a setting of the recipe")
    top.add_argument("--resume", action="store_true", help="go on from the last saved step")
    top.add_argument("--overwrite", action="store_true", help="replace this recipe's own earlier result at its out")
    top.add_argument("--dry-run", action="store_true", help="estimate tokens, FLOPs, memory and time; train nothing")
    top.add_argument("--gpu", default="h100", metavar="KIND", help="kind of a dry run's eight GPUs (default h100)")
    return top


def import_parser() -> argparse.ArgumentParser:
    """The command line for a LLaMA-Factory file."""
    top = Parser(prog=f"fluid-train {IMPORT}", description="Write the recipe of a LLaMA-Factory training file.")
    top.add_argument("file", type=Path, metavar="FILE.yaml")
    top.add_argument("--devices", type=int, default=1, help="devices that the file was written for (default 1)")
    top.add_argument("--out", type=Path, metavar="RECIPE.toml", help="a new file to write, in place of standard output")
    return top


def write_parser() -> argparse.ArgumentParser:
    """The command line for a model's own answers."""
    top = Parser(
        prog=f"fluid-train {WRITE}",
        description="Write training rows with a model's own greedy answers. The same command again goes on.",
    )
    top.add_argument("model", metavar="MODEL", help="a folder, GGUF file or hub id")
    top.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="training rows, whose responses are not read")
    top.add_argument("out", type=Path, metavar="OUT.jsonl")
    top.add_argument("--chat", action="store_true", help="render prompts by the model's chat template")
    top.add_argument("--limit", type=int, metavar="N", help="the first N prompts")
    top.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="length limit (default 256)")
    top.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts answered together (default 32)")
    top.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns the exit code: 0 done, 1 failed on the way, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait by spinning starve a shared machine
    try:
        if given[:1] == [IMPORT]:
            return _import(import_parser().parse_args(given[1:]))
        if given[:1] == [WRITE]:
            return _write(write_parser().parse_args(given[1:]))
        return _train(parser().parse_args(given))
    except ConfigError as error:
        print(f"fluid-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fluid-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fluid-train: interrupted; --resume goes on from the last saved step", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    values = read_toml(options.recipe)
    for setting in options.set:
        assign(values, setting)
    recipes = build_chain(values)
    if options.dry_run:
        from .plan import describe_costs

        print(describe_costs(recipes, options.gpu))
        return 0
    from .run import train_chain

    record = train_chain(recipes, resume=options.resume, overwrite=options.overwrite)
    final = ", ".join(f"{name} {value:.4g}" for name, value in record["final"].items())
    seconds = record["seconds"] + sum(stage["seconds"] for stage in record["before"])
    if os.environ.get("RANK", "0") == "0":
        print(f"{recipes[-1].out}: {final} after {seconds:.0f} s")
    return 0


def _write(options: argparse.Namespace) -> int:
    from .own_answers import AnswerSettings, write_answers

    for name in ("limit", "max_new_tokens", "batch_size"):
        at_least(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    counts = write_answers(
        options.model, options.prompts, options.out, AnswerSettings(options.chat, options.max_new_tokens),
        limit=options.limit, batch_size=options.batch_size, dtype=options.dtype,
    )  # fmt: skip
    print(
        f"{options.out}: {counts.rows:,} answers to {counts.prompts:,} prompts, {counts.unfinished:,} of them at the "
        f"length limit; {counts.left_out:,} left out, which do not tokenise back to the model's ids"
    )
    return 0


def _import(options: argparse.Namespace) -> int:
    from .llamafactory import as_toml, convert, read_yaml

    recipe, notes = convert(read_yaml(options.file), options.devices)
    text = as_toml(recipe, [f"from {options.file.name}", *notes])
    for note in notes:
        print(f"fluid-train: {note}", file=sys.stderr)
    if options.out is None:
        print(text, end="")
    else:
        write_new(options.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
