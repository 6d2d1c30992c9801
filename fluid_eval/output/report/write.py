"""Runs read, compared and judged once; written as a page, as Markdown, as LaTeX."""

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
    """Write the page of finished runs, their Markdown appendix and their LaTeX table, each all or nothing if named.

    folders: of runs, or of sweeps, which stand for their points.  base: the run that the others are held against; else
    the first run, of a sweep its first AR point.
    claims: what `fluid-eval reproduce` wrote.  across_protocols: compare runs that were asked otherwise too.
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
