"""Notebooks run without Jupyter: code cells in one namespace, each with what it printed and its last value.

`python -m tests.notebooks` runs docs/quickstart.ipynb and stores its outputs.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from fluid_eval.common.paths import resource

ROOT = resource("checkpoints").parent
QUICKSTART = ROOT / "docs" / "quickstart.ipynb"


@contextlib.contextmanager
def as_in_docs(folder: Path):
    """An empty working folder that lies beside checkpoints, as docs does."""
    (folder / "docs").mkdir()
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    before = Path.cwd()
    os.chdir(folder / "docs")
    try:
        yield
    finally:
        os.chdir(before)


def execute(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one cell in a namespace; its outputs as a notebook holds them, but execute_count."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        outputs.append({"data": shown(value), "metadata": {}, "output_type": "execute_result"})
    return outputs


def shown(value: Any) -> dict[str, Any]:
    """A value in the forms that Jupyter asks for."""
    forms = {"text/plain": repr(value).splitlines(keepends=True)}
    if hasattr(value, "_repr_html_") and (html := value._repr_html_()):
        forms["text/html"] = html.splitlines(keepends=True)
    if hasattr(value, "_repr_png_"):
        forms["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return forms


def run(notebook: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, run in an empty folder."""
    names: dict[str, Any] = {}
    with as_in_docs(folder), contextlib.redirect_stderr(io.StringIO()):
        return [execute("".join(cell["source"]), names) for cell in code_cells(notebook)]


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def without_speeds(text: str) -> str:
    """Text output without tokens/s, which differ from run to run: the column of a table, or its row."""
    lines, cut = [], None
    for line in text.splitlines():
        if at := re.search(r" *\btok/s(?=\s|$)", line):
            if " tok/s " in line and re.search(r"\d", line):
                continue  # a row of speeds
            cut = at.span()
        elif not re.search(r"\d", line):
            cut = None  # the head of another table
        lines.append(line if cut is None else line[: cut[0]] + line[cut[1] :])
    return "\n".join(" ".join(line.split()) for line in lines)  # widths depend on the speeds


def store() -> None:
    """Run the quickstart and store its outputs."""
    notebook = json.loads(QUICKSTART.read_text())
    with tempfile.TemporaryDirectory() as folder:
        outputs = run(notebook, Path(folder))
    for count, (cell, each) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell["execution_count"] = count
        cell["outputs"] = [
            o | ({"execution_count": count} if o["output_type"] == "execute_result" else {}) for o in each
        ]
    QUICKSTART.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    store()
