"""Figures of a report, as SVG text that lives inside a page: its colours and fonts are the page's, light or dark.

Drawn with matplotlib's object interface: no display, no global state, the same bytes for the same numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[str, Any]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top in points."""

_INK, _ACCENT = "#010101", "#020202"
"""Stand-ins: matplotlib wants colours, the page has CSS."""
_CSS = {_INK: "currentColor", _ACCENT: "var(--accent, currentColor)"}
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_WIDTH = 5.2
"""Inches. Narrow enough that the text stays readable when a phone shrinks the figure."""


def score_speed(lines: Sequence[Line]) -> str:
    """Score (%, with its 95% interval) against tokens/s: one point a task, by its first metric. SVG text.

    Tasks that write nothing have no speed and are left out; empty text if that leaves none.
    """
    points = [line for line in first_lines(lines) if line["tokens_per_second"] is not None]
    if not points:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": "score_speed"}):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        for line in points:
            score, low, high = (100 * line[name] for name in ("score", "low", "high"))
            # an end of Wilson's interval can pass the score by a rounding error, which matplotlib would refuse
            error = [[max(0.0, score - low)], [max(0.0, high - score)]]
            x = line["tokens_per_second"]
            axes.errorbar(x, score, error, fmt="o", color=_ACCENT, ms=5, capsize=3, lw=1.2, clip_on=False)
        axes.set_xlabel("tokens/s per worker")
        axes.set_ylabel("score (%)")
        axes.set_xlim(0, 1.3 * max(line["tokens_per_second"] for line in points))  # room for names on the right
        axes.set_ylim(min(0.0, *(100 * line["low"] for line in points)), _ceiling(points))
        _label(figure, axes, points)
        names = ", ".join(f"{p['task']} {100 * p['score']:.1f}% at {p['tokens_per_second']:.0f}" for p in points)
        return _svg(figure, f"Score against tokens per second: {names}.")


def tokens_per_forward(lines: Sequence[Line]) -> str:
    """Tokens per forward of each task that writes, as bars from 0, with AR's bound of 1 marked. SVG text, or empty."""
    tasks = [line for line in first_lines(lines) if line["tokens_per_forward"] is not None]
    if not tasks:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": "tokens_per_forward"}):
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(tasks)), layout="constrained")
        axes = figure.subplots()
        values = [line["tokens_per_forward"] for line in tasks]
        axes.barh(range(len(tasks)), values, height=0.5, color=_ACCENT, alpha=0.75)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.2f}", (1, place), xycoords=("axes fraction", "data"), ha="right", va="center_baseline"
            )
        axes.axvline(1, color=_INK, lw=0.9, ls=(0, (4, 3)))
        axes.set_yticks(range(len(tasks)), labels=[line["task"] for line in tasks])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(1, *values))  # room for the numbers on the right
        axes.set_xlabel("tokens per forward (dashed: 1, the most AR can reach)")
        names = ", ".join(f"{line['task']} {line['tokens_per_forward']:.2f}" for line in tasks)
        return _svg(figure, f"Tokens per forward: {names}.")


def first_lines(lines: Sequence[Line]) -> list[Line]:
    """The line of each task's first metric."""
    found: dict[str, Line] = {}
    for line in lines:
        found.setdefault(line["task"], line)
    return list(found.values())


def _ceiling(points: Sequence[Line]) -> float:
    """Top of the score axis: 100 where scores come near it, else some room above the highest interval."""
    highest = 100 * max(line["high"] for line in points)
    return 100.0 if 80 < highest <= 100 else 1.12 * highest + 1


def _label(figure: Figure, axes: Axes, points: Sequence[Line]) -> None:
    """Write each task's name beside its point, where no name and no interval stands yet.

    Text widths are guessed: the page's font is not known here.
    """
    figure.draw_without_rendering()  # lays the axes out, so that data have places
    scale = 72 / figure.dpi

    def place(line: Line, value: str) -> tuple[float, float]:
        x, y = axes.transData.transform((line["tokens_per_second"], 100 * line[value]))
        return scale * float(x), scale * float(y)

    right = scale * float(axes.bbox.x1)
    spots = [place(line, "score") for line in points]
    taken: list[Box] = [
        (x - 4, min(y - 3, place(line, "low")[1]), x + 4, max(y + 3, place(line, "high")[1]))
        for line, (x, y) in zip(points, spots, strict=True)
    ]
    for line, (x, y) in zip(points, spots, strict=True):
        width = 5.8 * len(line["task"])
        choices = [(side, dy) for dy in (5.0, -14.0, 18.0, -27.0, 31.0, -40.0) for side in ("left", "right")]
        for side, dy in choices:
            left = x + 6 if side == "left" else x - 6 - width
            box = (left, y + dy, left + width, y + dy + 10)
            if left >= 0 and box[2] <= right and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            line["task"],
            (line["tokens_per_second"], 100 * line["score"]),
            xytext=(6 if side == "left" else -6, dy),
            textcoords="offset points",
            ha=side,
        )


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element without date, font names, style sheet or ids that could clash on a page."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]+;", "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' role="img" stroke-linejoin="round"', svg, count=1)
    for stand_in, css in _CSS.items():
        svg = svg.replace(stand_in, css)
    name = title.replace("&", "&amp;").replace("<", "&lt;")
    return svg.replace(">", f"><title>{name}</title>", 1)
