"""Tables for papers, in Markdown and LaTeX, from column heads and rows of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .stats import Interval

_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "−": "$-$", "·": r"\textperiodcentered{}",
    "γ": r"$\gamma$", "τ": r"$\tau$", "\n": " ", **{c: "\\" + c for c in "&%$#_{}"},
})  # fmt: skip


def bracketed(value: Interval | None, digits: int, scale: int = 1) -> str:
    """A mean with its interval, "78.2 [76.1, 80.3]"; the mean alone if it has no interval; a dash for None."""
    if value is None:
        return "–"
    mean, low, high = (f"{scale * number:,.{digits}f}" for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]" if value.bounded else mean


def latex_text(text: str) -> str:
    """A text with the characters that LaTeX takes for commands escaped."""
    return text.translate(_ESCAPES)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |\n"

    return line(heads) + line(["---"] * len(heads)) + "".join(line(row) for row in rows)


def plain(text: str) -> str:
    """A text as one line of Markdown, with HTML escaped."""
    return text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def latex(heads: Sequence[str], rows: Sequence[Sequence[str]], *, notes: Sequence[str] = ()) -> str:
    """A tabular (needs the booktabs package), then a footnotesize paragraph for each note."""

    def line(cells: Iterable[str]) -> str:
        text = " & ".join(map(latex_text, cells))
        return (
            ("{}" if text.startswith(("[", "*")) else "") + text + " \\\\\n"
        )  # else \\ or \toprule takes them as arguments

    form = "l" * len(heads)
    body = "".join(line(row) for row in rows)
    table = f"\\begin{{tabular}}{{{form}}}\n\\toprule\n{line(heads)}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"
    return table + "".join(f"\n{{\\footnotesize {latex_text(note)}\\par}}\n" for note in notes)
