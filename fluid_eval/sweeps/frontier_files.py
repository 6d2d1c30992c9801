"""The frontier in tables, for programs (CSV, Parquet) and papers (Markdown, LaTeX)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError

from ..common.stats import Interval
from ..common.tables import bracketed, latex, markdown
from .pareto import SPEEDS, Placed, Speed
from .points import is_of_backend

if TYPE_CHECKING:
    import pandas

NAMES: Mapping[Speed, str] = {
    "tokens_per_second": "tokens/s per worker",
    "tokens_per_forward": "tokens/forward",
    "forwards_per_answer": "forwards/answer",
}
_DIGITS: Mapping[Speed, int] = {"tokens_per_second": 0, "tokens_per_forward": 2, "forwards_per_answer": 1}


_MOST_NAMES = 8
"""More points than that are only counted in a sentence."""


def left_out(placed: Sequence[Placed], by: Speed) -> str:
    """Which points the frontier leaves out as they have no such speed, and why; empty if there are none."""
    without = [p for p in placed if getattr(p, by) is None]
    if not without:
        return ""
    short = NAMES[by].removesuffix(" per worker")
    backends = by != "tokens_per_second" and any(is_of_backend(p.method) for p in without)
    why = " (forwards of a backend are not known)" if backends else ""
    return f"Left out, without {short}{why}: {listed([p.name for p in without])}"


def listed(names: Sequence[str]) -> str:
    """Names of points, or their number where they are many."""
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} points"


def table(placed: Sequence[Placed]) -> pandas.DataFrame:
    """One row a point: its number in the figure, settings, n, each measure, dominated_by, stopped.

    Each measure has its interval in columns _low and _high; scores are in percent.
    A setting with values of several types is given as text; it is missing where a point does not have it.
    Raises ConfigError if a setting has the name of another column.
    """
    import pandas

    rows = pandas.DataFrame({"no": range(1, 1 + len(placed)), "name": [p.name for p in placed]})
    for key in _settings(placed):
        rows[key] = _column([p.settings.get(key) for p in placed])
    numbers: dict[str, list[Any]] = {"n": [p.n for p in placed], "speed_repeats": [p.repeats for p in placed]}
    for measure in ("score", *SPEEDS):
        scale = 100 if measure == "score" else 1
        for end, suffix in (("mean", ""), ("low", "_low"), ("high", "_high")):
            intervals: list[Interval | None] = [getattr(p, measure) for p in placed]
            bounds = [math.nan if v is None else getattr(v, end) for v in intervals]
            values = [None if math.isnan(bound) else round(scale * bound, 10) for bound in bounds]
            numbers[measure + suffix] = pandas.array(values, dtype="Float64")
    texts = {name: _column([getattr(p, name) for p in placed], "string") for name in ("dominated_by", "stopped")}
    if clash := rows.columns.intersection([*numbers, *texts]).tolist():
        raise ConfigError(f"setting {clash[0]!r} has the name of a column of the table")
    return rows.assign(**numbers, **texts)


def write_tables(placed: Sequence[Placed], folder: Path) -> list[Path]:
    """Write frontier.csv and .parquet (numbers), .md and .tex (cells like "78.2 [76.1, 80.3]"). Returns them."""
    rows = table(placed)
    files = [folder / f"frontier.{kind}" for kind in ("csv", "parquet", "md", "tex")]
    rows.to_csv(files[0], index=False)
    rows.to_parquet(files[1], index=False)
    files[2].write_text(markdown(*_cells(placed)), encoding="utf-8")
    files[3].write_text(latex(*_cells(placed)), encoding="utf-8")
    return files


def _settings(placed: Iterable[Placed]) -> list[str]:
    return list(dict.fromkeys(key for p in placed for key in p.settings))


def _column(values: Sequence[Any], kind: str | None = None) -> pandas.api.extensions.ExtensionArray:
    """Values in a column of their type, as text if they have several; None is missing."""
    import pandas

    kinds = {type(value) for value in values if value is not None}
    if kind is None:
        one = {bool: "boolean", int: "Int64", float: "Float64"}
        kind = "Float64" if kinds == {int, float} else one.get(kinds.pop(), "string") if len(kinds) == 1 else "string"
    return pandas.array(values, dtype=kind)


def _cells(placed: Sequence[Placed]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the printed table. Speeds that no point has are left out."""
    keys = _settings(placed)
    speeds = [by for by in SPEEDS if any(getattr(p, by) for p in placed)]
    heads = ["no", "point", *keys, "n", "score (%)", *(NAMES[by] for by in speeds), "note"]
    rows = []
    for number, p in enumerate(placed, 1):
        cells = (bracketed(getattr(p, by), _DIGITS[by]) for by in speeds)
        settings = ("–" if (value := p.settings.get(key)) is None else str(value) for key in keys)
        notes = ["tokens/s of one run, no interval"] * (p.tokens_per_second is not None and p.repeats < 2)
        notes += [f"dominated by {p.dominated_by}"] * (p.dominated_by is not None)
        notes += [f"stopped: {p.stopped}"] * (p.stopped is not None)
        rows.append([str(number), p.name, *settings, str(p.n), bracketed(p.score, 1, 100), *cells, "; ".join(notes)])
    return heads, rows
