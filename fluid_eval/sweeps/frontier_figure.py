"""The frontier in a figure of one column: score against speed, what each point is, in PNG, SVG and PDF.

Drawn with matplotlib's object interface: no display, no global state, the same bytes for the same numbers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError

from ..common.stats import Interval
from ..common.tables import bracketed
from . import label_places
from .frontier_files import NAMES
from .label_places import Box, Label, Spot, in_short
from .pareto import Placed, Speed, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = (3.3, 3.1)
"""Inches: one column of a paper in two."""
FEW = 8
"""With up to this many points all are labelled by their settings, with more only those on the frontier."""
ACCENT, INK = "#1f5fa8", "#222222"
STATES = {
    "on the frontier": ACCENT,
    "behind, not surely": "#7fa3cf",
    "dominated": "#a3a3a3",
    "stopped early": "#8a8a8a",
}
"""What a point's colour says, and the colour. Points that were stopped early are hollow."""
_DARK = {"behind, not surely": "#4a76ab", "dominated": "#6b6b6b", "stopped early": "#6b6b6b"}
"""Colours of the text beside such points, dark enough to be read."""
SHAPES = "o^sDvPXp<>h"
"""Markers of decoders, with and without verification, in order of appearance. A star is the baseline."""
STYLE = {
    "svg.hashsalt": "frontier",
    "svg.fonttype": "none",  # text stays text, so that it can be searched, edited and read aloud
    "pdf.fonttype": 42,  # fonts are embedded as TrueType, which publishers ask for
    "savefig.dpi": "figure",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures are alike everywhere
    "font.size": 7.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": "medium",
    "axes.titlesize": "medium",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": "medium",
    "ytick.labelsize": "medium",
    "legend.fontsize": "small",
}
_TIP = "tip: "
"""Begins the id of a point's marks, which becomes their title, and a tip in a browser."""


def stem(by: Speed) -> str:
    """Name of the figure's files without extension, one for each speed."""
    return f"frontier-{by}"


def draw(placed: Sequence[Placed], folder: Path, *, by: Speed, baseline: str | None = None) -> bool:
    """Write frontier-SPEED.png, .svg and .pdf, see `figure`. False, and no files, if no point has that speed."""
    drawn = figure(placed, by=by, baseline=baseline)
    if drawn is None:
        return False
    from matplotlib import rc_context

    name = folder / stem(by)
    name.with_suffix(".png").write_bytes(png(drawn))
    name.with_suffix(".svg").write_text(svg(drawn), encoding="utf-8")
    with rc_context(STYLE):
        drawn.savefig(name.with_suffix(".pdf"), metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return True


def png(drawn: Figure) -> bytes:
    """A figure as a picture."""
    from matplotlib import rc_context

    picture = io.BytesIO()
    with rc_context(STYLE):
        drawn.savefig(picture, format="png")
    return picture.getvalue()


def svg(drawn: Figure) -> str:
    """A figure as SVG without date, whose text is text, and whose points say their names when pointed at."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context(STYLE):
        drawn.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub(rf'<g id="{_TIP}([^"]*)">', r"<g><title>\1</title>", text.getvalue())


def figure(
    placed: Sequence[Placed],
    *,
    by: Speed,
    baseline: str | None = None,
    size: tuple[float, float] = COLUMN,
    font: float = STYLE["font.size"],  # type: ignore[assignment]
    comparable: bool = True,
    texts: Mapping[str, str] | None = None,
) -> Figure | None:
    """Score against speed with 95% intervals. None if no point has a speed.

    by: the speed that `placed` was measured by.  baseline: a point's name, marked by a star and a line at its score.
    size: inches.  font: 1/72 inch.
    comparable: the points answered the same documents. Otherwise no frontier is drawn.
    texts: labels by name. Default: settings of the points on the frontier, numbers in the tables of the others.
    Raises ConfigError if the baseline is no point.
    """
    # 1) points to draw
    shown = [p for p in placed if getattr(p, by) is not None]
    base = next((p for p in placed if p.name == baseline), None)
    if baseline is not None and base is None:
        raise ConfigError(f"baseline={baseline!r} is none of the points: {', '.join(p.name for p in placed)}")
    if not shown:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # 2) axes, points, frontier, baseline, legend
    with rc_context({**STYLE, "font.size": font}):
        drawn = Figure(figsize=size, dpi=300, layout="constrained")
        axes = drawn.subplots()
        alone = not any(getattr(p, by).bounded for p in shown)
        axes.set_xlabel(NAMES[by] + (" (no interval)" if alone else ""))
        axes.set_ylabel("score (%)")
        best = frontier(shown, by) if comparable else []
        states = {p.name: _state(p, best) if comparable else "on the frontier" for p in shown}
        shapes = _shapes(shown, base)
        steps = [_spot(p, by) for name in best for p in shown if p.name == name]
        if len(steps) > 1:
            axes.step(*zip(*steps, strict=True), where="pre", color=ACCENT, lw=0.9, alpha=0.6, zorder=2.6)
        _points(axes, shown, by, base, states, shapes, font)
        level = None if base is None else 100 * base.score.mean
        if level is not None:
            axes.axhline(level, color=INK, lw=0.7, ls=(0, (4, 3)), zorder=1.8)
        _legend(drawn, shapes, [states[p.name] for p in shown if comparable and p is not base], base, font)
        _limits(axes, shown, by, base)
        # 3) labels, where there is room
        drawn.draw_without_rendering()  # lays the axes out, so that data coordinates have pixels
        drawn.set_layout_engine("none")
        labels = _labels(axes, placed, shown, by, base, states, texts)
        boxes = [(box, 1.0 if states[p.name] != "dominated" else 0.5) for p in shown for box in _boxes(axes, p, by)]
        boxes += [(box, 0.6) for box in label_places.lines(axes, steps, level)]
        label_places.write(axes, labels, boxes, font=0.84 * font, ink=INK)
    return drawn


def _state(p: Placed, best: Sequence[str]) -> str:
    if p.stopped is not None:
        return "stopped early"
    if p.name in best:
        return "on the frontier"
    return "dominated" if p.dominated_by is not None else "behind, not surely"


def _shapes(shown: Sequence[Placed], base: Placed | None) -> dict[str, str]:
    """Decoder, with or without verification -> marker."""
    methods = dict.fromkeys(p.method for p in shown if p is not base)
    return {method: SHAPES[place % len(SHAPES)] for place, method in enumerate(methods)}


def _points(
    axes: Axes,
    shown: Sequence[Placed],
    by: Speed,
    base: Placed | None,
    states: Mapping[str, str],
    shapes: Mapping[str, str],
    font: float,
) -> None:
    """Points with both intervals as error bars, each of which says its name when pointed at."""
    for order, state in enumerate(reversed(STATES), 20):
        those = [p for p in shown if states[p.name] == state and p is not base]
        _error_bars(axes, those, by, STATES[state], order / 10, 0.1 * font if state == "on the frontier" else 0.5)
        for p in those:
            face = "white" if state == "stopped early" else STATES[state]
            look = {"marker": shapes[p.method], "ms": 0.6 * font, "mec": STATES[state], "mew": 0.5}
            _mark(axes, p, by, **look, color=face, zorder=order / 10)
    if base is not None and base in shown:
        _error_bars(axes, [base], by, INK, 3, 0.1 * font)
        _mark(axes, base, by, marker="*", ms=1.3 * font, color=INK, mec="white", mew=0.5, zorder=4)


def _mark(axes: Axes, p: Placed, by: Speed, **look: Any) -> None:
    x, y = _spot(p, by)
    (mark,) = axes.plot([x], [y], ls="none", **look)
    mark.set_gid(f"{_TIP}{p.name}: {bracketed(p.score, 1, 100)}% at {bracketed(getattr(p, by), 2)}")


def _error_bars(axes: Axes, points: Sequence[Placed], by: Speed, color: str, order: float, width: float) -> None:
    """Both intervals of points. Rounding can put a mean outside its interval, which matplotlib refuses."""

    def lengths(intervals: Sequence[Interval], scale: int) -> list[list[float]]:
        ends = [(v.mean - _low(v), _high(v) - v.mean) for v in intervals]
        return [[scale * max(0.0, low) for low, _ in ends], [scale * max(0.0, high) for _, high in ends]]

    if points:
        x, y = zip(*(_spot(p, by) for p in points), strict=True)
        tall, wide = lengths([p.score for p in points], 100), lengths([getattr(p, by) for p in points], 1)
        axes.errorbar(x, y, tall, wide, fmt="none", ecolor=color, elinewidth=width, zorder=order, alpha=0.8)


def _legend(drawn: Figure, shapes: Mapping[str, str], states: Sequence[str], base: Placed | None, font: float) -> None:
    """What shapes and colours say, below the axes."""
    from matplotlib.lines import Line2D

    def mark(label: str, **look: Any) -> Line2D:
        return Line2D([], [], ls="none", label=label, **{"ms": 0.6 * font, "mew": 0.5, **look})

    handles = [mark(method, marker=shape, color=INK, mfc="none") for method, shape in shapes.items() if method]
    if base is not None:
        handles.append(mark(f"baseline ({base.name})", marker="*", color=INK, ms=font, mec="white"))
    for state, color in STATES.items():
        if state in states:
            handles.append(mark(state, marker="_", color=color, mew=0.3 * font, ms=font))
    if handles:
        columns = 2 if drawn.get_figwidth() < 4.5 else 3
        drawn.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.4,
            columnspacing=1.2, labelspacing=0.3, borderpad=0.1,
        )  # fmt: skip


def _labels(
    axes: Axes,
    placed: Sequence[Placed],
    shown: Sequence[Placed],
    by: Speed,
    base: Placed | None,
    states: Mapping[str, str],
    texts: Mapping[str, str] | None,
) -> list[Label]:
    """One label for each group of points drawn on one another, and the baseline's name."""
    labels = [Label(base.name, _spot(base, by), True, INK)] if base is not None and base in shown else []
    others = [p for p in shown if p is not base]
    number = {p.name: place for place, p in enumerate(placed, 1)}
    in_legend = ("decoder.name", "decoder.verify") if all(p.method for p in shown) else ()
    for group in label_places.on_one_another(axes, [_spot(p, by) for p in others]):
        those = [others[at] for at in group]
        first = min(those, key=lambda p: list(STATES).index(states[p.name]))
        state = states[first.name]
        strong = state == "on the frontier" or len(shown) <= FEW
        if texts is not None:
            text = " ".join(texts[p.name] for p in those)
        elif strong:
            text = in_short([p.settings for p in those], in_legend) or "/".join(
                dict.fromkeys(p.method or p.name for p in those)
            )
        else:
            text = _ranges([number[p.name] for p in those])
        labels.append(Label(text, _spot(first, by), strong, _DARK.get(state, STATES[state])))
    return labels


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, neighbours as a range: 1-3,7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _low(interval: Interval) -> float:
    """The lower end, or the mean of one without ends."""
    return interval.low if interval.bounded else interval.mean


def _high(interval: Interval) -> float:
    """The upper end, or the mean of one without ends."""
    return interval.high if interval.bounded else interval.mean


def _limits(axes: Axes, shown: Sequence[Placed], by: Speed, base: Placed | None) -> None:
    """Axis limits that show all intervals, with room for labels, and span a few points of score at least."""
    scores = [p.score for p in shown] + ([base.score] if base else [])
    low = 100 * min(score.low for score in scores)
    high = 100 * max(score.high for score in scores)
    room = max(3.0, 0.1 * (high - low))
    bottom, top = max(low - room, -3.0), min(high + room, 103.0)
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in axes.get_yticks() if max(bottom, 0) <= tick <= min(top, 100)])
    paces: list[Interval] = [getattr(p, by) for p in shown]
    left, right = min(map(_low, paces)), max(map(_high, paces))
    room = max(0.02 * right, 0.08 * (right - left))
    axes.set_xlim(max(0, left - room), right + 2 * room)


def _spot(p: Placed, by: Speed) -> Spot:
    return getattr(p, by).mean, 100 * p.score.mean


def _boxes(axes: Axes, p: Placed, by: Speed) -> list[Box]:
    """Boxes that a point covers: its marker and its two error bars."""
    speed: Interval = getattr(p, by)
    radius = 2.5 * axes.figure.dpi / 72
    x, y = axes.transData.transform(_spot(p, by))
    ends = [(_low(speed), 100 * p.score.low), (_high(speed), 100 * p.score.high)]
    (x0, y0), (x1, y1) = axes.transData.transform(ends)
    return [(x - radius, y - radius, x + radius, y + radius), (x0, y - 1, x1, y + 1), (x - 1, y0, x + 1, y1)]
