"""The tables of the terminal as small HTML, which notebooks show, and as text."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from html import escape

from rich.console import Console, Group
from rich.table import Table


def html(parts: Iterable[str | Table]) -> str:
    """Lines of text and tables as HTML, every text escaped."""
    return "".join(_table(part) if isinstance(part, Table) else f"<div>{escape(part)}</div>" for part in parts)


def preformatted(text: str) -> str:
    """Text as the terminal shows it, escaped."""
    return f"<pre>{escape(text)}</pre>"


def image(png: bytes, name: str) -> str:
    """A picture inside the page. name: read where it is not seen."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(name)}" style="max-width:100%;width:640px" src="data:image/png;base64,{data}">'


def text(parts: Iterable[str | Table]) -> str:
    """The same lines and tables as text of 80 columns."""
    return printed(lambda console: console.print(Group(*parts)))


def printed(show: Callable[[Console], None]) -> str:
    """What a function prints on a console of 80 columns."""
    file = io.StringIO()
    show(Console(file=file, width=80, highlight=False, markup=False, color_system=None, force_jupyter=False))
    return file.getvalue().rstrip("\n")


def _table(table: Table) -> str:
    """A table's columns and cells; numbers stay on the right, cells in one line."""
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    styles = [f' style="text-align:{column.justify};white-space:pre"' for column in table.columns]
    head = "".join(f"<th{style}>{escape(str(c.header))}</th>" for c, style in zip(table.columns, styles, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{style}>{escape(cell)}</td>" for cell, style in zip(row, styles, strict=True)) + "</tr>"
        for row in zip(*cells, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
