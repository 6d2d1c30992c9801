"""`fluid-eval tasks`."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
from typing import TYPE_CHECKING

from . import EXIT_FAILED, EXIT_OK

if TYPE_CHECKING:
    from ..benchmarks.task_index import Named

HELP = "list tasks, groups and tags by name: ours, yours, lm-eval's"
EXAMPLE = "fluid-eval tasks 'mbpp*'"
DOES = {
    "generate_until": "writes",
    "multiple_choice": "compares",
    "loglikelihood": "compares",
    "loglikelihood_rolling": "perplexity",
}
"""output_type of a task file -> what the model does."""


def add(tasks: argparse.ArgumentParser) -> None:
    tasks.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="part of a name, or a pattern in quotes: 'mmlu_pro*'"
    )
    tasks.add_argument("--tasks-dir", metavar="DIR", help="folder with your own task files")
    tasks.add_argument("--json", action="store_true", help="print the list as JSON")


def main(options: argparse.Namespace) -> int:
    from ..benchmarks.task_index import catalogue, of_this_package

    # 1) names that match; without a pattern those of this package and of the user's folder
    folder = os.path.abspath(os.path.expanduser(options.tasks_dir)) if options.tasks_dir else None
    names = catalogue(folder)
    if options.pattern is None:
        chosen = [*names.own.values(), *of_this_package().values()]
    else:
        pattern = options.pattern if set("*?[") & set(options.pattern) else f"*{options.pattern}*"
        chosen = [names.all[name] for name in fnmatch.filter(names.all, pattern)]
    chosen.sort(key=lambda named: named.name)
    # 2) print
    if options.json:
        print(json.dumps([_row(named) for named in chosen], indent=2))
    elif chosen:
        _print(chosen)
    else:
        print(f"no name matches {options.pattern}")
    if options.pattern is None and not options.json:
        print("lm-eval's 14,000 names by pattern: fluid-eval tasks 'mmlu_pro*'")
    return EXIT_OK if chosen else EXIT_FAILED


def _row(named: Named) -> dict[str, object]:
    does = DOES.get(named.output_type or "", "")
    return {
        "name": named.name, "kind": named.kind, "does": does, "runs_code": named.unsafe, "source": named.source,
        "members": len(named.members) if not named.is_task else None,
    }  # fmt: skip


def _print(chosen: list[Named]) -> None:
    from ..output.terminal import bare_table, screen

    table = bare_table()
    table.add_column("name", overflow="fold")
    for name in ("kind", "the model", "from"):
        table.add_column(name, no_wrap=True)
    for named in chosen:
        does = DOES.get(named.output_type or "", "") + (", code" if named.unsafe else "")
        kind = named.kind if named.is_task else f"{named.kind} of {len(named.members)}"
        table.add_row(named.name, kind, does, {"own": "your folder"}.get(named.source, named.source))
    console = screen()
    console.print(table)
    console.print(f"{len(chosen)} names   code: answers are programs, run in the sandbox")
