# PYTHON_ARGCOMPLETE_OK
"""The `fluid-eval` command: parse, dispatch, exit codes. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from fluid_model.common.command_line import Parser
from fluid_model.common.versions import ShowVersions

from ..common.libraries import set_library_defaults
from . import (
    EXIT_INTERRUPTED,
    audit,
    compare,
    decoders,
    doctor,
    import_logs,
    khead,
    models,
    report,
    reproduce,
    rescore,
    run,
    runs,
    score,
    settings,
    sweep,
    tasks,
    tax,
    trace,
    view,
)  # fmt: skip
from .completion import complete
from .console import in_one_line, tolerate_any_output

GROUPS: dict[str, dict[str, ModuleType]] = {
    "run": {"run": run, "sweep": sweep, "tax": tax, "trace": trace},
    "analyse": {
        "runs": runs, "compare": compare, "audit": audit, "khead": khead, "rescore": rescore, "import": import_logs,
    },
    "publish": {"report": report, "view": view, "reproduce": reproduce},
    "tools": {
        "tasks": tasks, "models": models, "decoders": decoders, "settings": settings, "score": score, "doctor": doctor,
    },
}  # fmt: skip
COMMANDS: dict[str, ModuleType] = {name: command for group in GROUPS.values() for name, command in group.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog="fluid-eval",
        usage="fluid-eval [-h] [--version] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_listing(),
        description="Evaluate language models that decode in parallel, beside their AR parents.",
    )
    top.add_argument("--version", action=ShowVersions, libraries=("torch", "transformers", "lm-eval"))
    commands = top.add_subparsers(
        dest="command", required=True, prog="fluid-eval", metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, command in COMMANDS.items():
        description = command.HELP[0].upper() + command.HELP[1:]
        command.add(commands.add_parser(name, description=description, epilog=f"example: {command.EXAMPLE}"))
    return top


def _listing() -> str:
    """The commands by group, each with an example, in 80 columns."""
    lines = []
    for title, group in GROUPS.items():
        lines.append(f"{title}:")
        for name, command in group.items():
            lines += [f"  {name:<10}{command.HELP}", f"{'':<12}$ {command.EXAMPLE}"]
        lines.append("")
    return "\n".join([*lines, "one command: fluid-eval COMMAND --help"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see the package). Invalid input and failures print one line."""
    tolerate_any_output()
    commands = parser()
    complete(commands)
    options = commands.parse_args(arguments)
    set_library_defaults()
    try:
        code = int(COMMANDS[options.command].main(options))
        sys.stdout.flush()  # an error of the output must show here, not at interpreter exit
        return code
    except KeyboardInterrupt:
        print("fluid-eval: interrupted; what is finished is stored, --resume goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        reason, code = in_one_line(error)
        if reason is None:
            raise
        if reason:
            print(f"fluid-eval: {reason}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
