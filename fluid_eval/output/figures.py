"""Figures of a report as SVG inside the page, with the page's colours and fonts, light or dark.

Drawn with matplotlib's object interface: no display, no global state, the same bytes for the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..common.tables import bracketed
from ..sweeps.frontier_figure import ACCENT, FEW, INK, STYLE, figure
from ..sweeps.frontier_figure import svg as vector
from ..sweeps.frontier_files import NAMES
from ..sweeps.pareto import Placed, Speed
from .terminal import ResultLine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = {
    ACCENT: "var(--accent)",
    INK: "currentColor",
    "#7fa3cf": "color-mix(in srgb, var(--accent) 60%, var(--paper))",
    "#4a76ab": "color-mix(in srgb, var(--accent) 80%, currentColor)",
    "#6b6b6b": "var(--soft)",
    "#8a8a8a": "var(--soft)",
    "#a3a3a3": "color-mix(in srgb, var(--soft) 70%, var(--paper))",
    "#ffffff": "var(--paper)",
}
"""matplotlib's colours -> the page's CSS."""
_FONT = 9.0
_WIDTH = 5.2
"""Inches. Narrow enough that the text stays readable when a phone shrinks the figure."""


def score_speed(placed: Sequence[Placed], by: Speed, *, comparable: bool) -> str:
    """Score (%) against a speed, both with their 95% intervals. SVG text, empty if no point has that speed.

    comparable: the points answered the same documents, so that their frontier is drawn.
    """
    letters = {p.name: p.name if len(placed) <= FEW else p.name.split(" ")[0] for p in placed}
    drawn = figure(placed, by=by, size=(_WIDTH, 3.9), font=_FONT, comparable=comparable, texts=letters)
    if drawn is None:
        return ""
    spots = (
        f"{p.name}: {bracketed(p.score, 1, 100)}% at {bracketed(speed, 2)}" for p in placed if (speed := getattr(p, by))
    )
    return _svg(drawn, f"Score against {NAMES[by]}. {'; '.join(spots)}.")


def tokens_per_forward(lines: Sequence[ResultLine]) -> str:
    """Tokens per forward of each generating task, as bars, with AR's bound of 1 marked. SVG text, or empty."""
    tasks = [line for line in first_lines(lines) if line["tokens_per_forward"] is not None]
    if not tasks:
        return ""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "font.size": _FONT}):
        # 1) a bar and its number for each task
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(tasks)), layout="constrained")
        axes = figure.subplots()
        values = [line["tokens_per_forward"] for line in tasks]
        axes.barh(range(len(tasks)), values, height=0.5, color=ACCENT, alpha=0.75)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.2f}", (1, place), xycoords=("axes fraction", "data"), ha="right", va="center_baseline"
            )
        # 2) AR's bound, axes
        axes.axvline(1, color=INK, lw=0.9, ls=(0, (4, 3)))
        axes.set_yticks(range(len(tasks)), labels=[line["task"] for line in tasks])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max(1, *values))  # room for the numbers on the right
        axes.set_xlabel("tokens per forward (dashed: 1, the most AR can reach)")
        names = ", ".join(f"{line['task']} {line['tokens_per_forward']:.2f}" for line in tasks)
        return _svg(figure, f"Tokens per forward: {names}.")


def first_lines(lines: Sequence[ResultLine]) -> list[ResultLine]:
    """The line of each task's first metric."""
    firsts: dict[str, ResultLine] = {}
    for line in lines:
        firsts.setdefault(line["task"], line)
    return list(firsts.values())


def _svg(drawn: Figure, title: str) -> str:
    """The figure as an <svg> element without date, font names, style sheet or ids that could clash on a page."""
    drawn.patch.set_visible(False)
    for axes in drawn.axes:
        axes.patch.set_visible(False)
    svg = vector(drawn)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]+;", "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', ' role="img" stroke-linejoin="round"', svg, count=1)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    name = title.replace("&", "&amp;").replace("<", "&lt;")
    return svg.replace(">", f"><title>{name}</title>", 1)
