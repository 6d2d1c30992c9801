"""Reads and compares the runs once, and writes the report: HTML page, Markdown, LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fluid_model.common import files
from fluid_model.common.errors import ConfigError

from ..claims_tables import read_claims
from .facts import gather
from .page import render
from .papers import latex_table, markdown_appendix
from .runs import read_runs


def default_page(folders: Sequence[Path]) -> Path:
    """report.html in the first folder."""
    return folders[0] / "report.html"


def write_report(
    folders: Sequence[Path],
    output: Path | None,
    *,
    claims: Path | None = None,
    markdown: Path | None = None,
    latex: Path | None = None,
    base: Path | None = None,
    across_protocols: bool = False,
) -> None:
    """Write the HTML page, the Markdown appendix and the LaTeX table of finished runs, those with a file name.

    folders: of runs, or of sweeps, which stand for their points.
    base: the run that the others are compared with. Default: the first run, of a sweep its first AR point.
    claims: the claims.json of `fluid-eval reproduce`.  across_protocols: compare runs with different protocols too.
    Each file is written in full or not at all.
    Raises ConfigError if a folder holds no run or an unfinished one, or a file cannot be written.
    """
    runs, why = read_runs(folders, base)
    facts = gather(runs, read_claims(claims) if claims else None, across_protocols=across_protocols, why=why)
    for file, make in ((output, render), (markdown, markdown_appendix), (latex, latex_table)):
        if file is not None:
            _write(file, make(facts))


def _write(output: Path, text: str) -> None:
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; pass a file's name")
    try:
        # lone surrogates, which a model can write, exist in no encoding
        files.write(output, text, errors="xmlcharrefreplace")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); name another file") from error


__all__ = ["write_report"]
