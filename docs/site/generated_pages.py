"""MkDocs hook: reference pages made from the code at each build, so that they cannot differ from it.

reference/cli.md          the parser's own help of every command
reference/settings.md     every setting with type, default and meaning
reference/run-folder.md   the docstrings of fluid_eval/results
reference/python.md       mkdocstrings, from the public names of fluid_eval
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def commands() -> str:
    """The help of each command, in the parser's groups."""
    os.environ["COLUMNS"] = "90"
    from fluid_eval.cli.main import GROUPS, parser

    top = parser()
    (choices,) = [a.choices for a in top._actions if isinstance(getattr(a, "choices", None), dict)]
    parts = ["# Commands\n\nMade from the parser. Exit codes: [comparing.md](../comparing.md#exit-codes).\n"]
    for title, group in GROUPS.items():
        parts.append(f"## {title.capitalize()}\n")
        parts += [f"### fluid-eval {name}\n\n```text\n{choices[name].format_help()}```\n" for name in group]
    return "\n".join(parts)


def settings() -> str:
    """Tables of settings, by the part of the name before the dot."""
    from fluid_eval.common.settings_list import all_settings

    parts = [
        "# Settings\n\nEach is set by `--set NAME=VALUE`, in a TOML file, or as a keyword of the Python API. "
        "`fluid-eval settings NAME` prints one.\n"
    ]
    sections: dict[str, list[Any]] = {}
    for one in all_settings():
        sections.setdefault(one.decoder or one.name.rpartition(".")[0] or "run", []).append(one)
    for section, members in sections.items():
        parts.append(f"## {section}\n\n| setting | type | default | meaning |\n|---|---|---|---|")
        for one in members:
            cells = (f"`{one.name}`", one.type, f"`{one.default}`", one.about)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def run_folder() -> str:
    """The layout of a run folder and the record of a sample, as their modules describe them."""
    layout, record = (_docstring(f"fluid_eval/results/{name}.py") for name in ("run_folder", "sample_records"))
    return (
        f"# Run folders\n\n## Files\n\n{layout}\n\n## One sample\n\n{record}\n\n"
        "In Python, `Result.samples` holds each record as a typed object:\n\n"
        "::: fluid_eval.results.sample.Sample\n    options:\n      heading_level: 3\n"
    )


def python() -> str:
    """Functions, then what they return."""
    names = {
        "fluid_eval._api": ("run", "sweep", "compare", "audit", "report", "load_run", "load_sweep"),
        "fluid_eval._api_results": ("Result", "SweepResult", "Comparison", "AuditResult"),
        "fluid_eval.results.finished_runs": ("load_results",),
        "fluid_eval.common.progress": ("ProgressEvent",),
        "fluid_model.common.errors": ("ConfigError", "RunError"),
    }
    blocks = [
        f"::: {module}.{name}\n    options:\n      heading: fluid_eval.{name}\n      toc_label: {name}\n"
        for module, members in names.items()
        for name in members
    ]
    return (
        "# Python API\n\nAll are names of `fluid_eval`. [From Python](../python.md) shows them at work.\n\n"
        + "\n".join(blocks)
    )


def _docstring(path: str) -> str:
    """A module's docstring as Markdown."""
    return (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "").strip()


PAGES = {"cli": commands, "settings": settings, "run-folder": run_folder, "python": python}
