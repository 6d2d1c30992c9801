"""The frontier in files: tables for programs (CSV, Parquet) and papers (Markdown, LaTeX), and a figure (PNG, SVG).

The figure uses matplotlib's object interface: no display, no global state, the same bytes for the same numbers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError

from ..common.stats import Interval
from ..common.tables import bracketed, latex, markdown
from .pareto import SPEEDS, Placed, Speed, frontier

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

NAMES: Mapping[Speed, str] = {
    "tokens_per_second": "tokens/s per worker",
    "tokens_per_forward": "tokens/forward",
    "forwards_per_answer": "forwards/answer",
}
_DIGITS: Mapping[Speed, int] = {"tokens_per_second": 0, "tokens_per_forward": 2, "forwards_per_answer": 1}
_SHORT = {"decoder.confidence": "γ", "decoder.max_horizon": "K", "model.tau": "τ"}
Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""
FEW = 8
"""With up to this many points all are labelled, with more only those on the frontier."""
ACCENT, INK = "#1f5fa8", "#222222"
STYLE = {
    "svg.hashsalt": "frontier",
    "savefig.dpi": "figure",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that pictures are alike everywhere
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.fontsize": 8,
}
_NOTE: dict[str, Any] = {
    "textcoords": "offset points",
    "fontsize": 7.5,
    "zorder": 5,
    "in_layout": False,  # else labels move the axes they were placed on
    "bbox": {"boxstyle": "round,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.7},
    "arrowprops": {"arrowstyle": "-", "lw": 0.5, "color": INK, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4},
}


def table(placed: Sequence[Placed]) -> pandas.DataFrame:
    """One row a point: settings, n, each measure with _low and _high (score in percent), dominated_by, stopped.

    A setting with values of several types is given as text; it is missing where a point does not have it.
    Raises ConfigError if a setting has the name of another column.
    """
    import pandas

    rows = pandas.DataFrame({"name": [p.name for p in placed]})
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


def draw(
    placed: Sequence[Placed],
    folder: Path,
    *,
    by: Speed = "tokens_per_second",
    baseline: str | None = None,
    title: str | None = None,
) -> bool:
    """Write frontier.png and .svg: score against speed, with 95% intervals. False, and no files, without speeds.

    by: the speed that `placed` was measured by.  baseline: a point's name, marked by a star and a line at its score.
    Frontier points are labelled with their settings where there is room.
    """
    drawn = figure(placed, by=by, baseline=baseline, title=title)
    if drawn is None:
        return False
    from matplotlib import rc_context

    (folder / "frontier.png").write_bytes(png(drawn))
    with rc_context(STYLE):
        drawn.savefig(folder / "frontier.svg", metadata={"Date": None, "Creator": None})
    return True


def png(drawn: Figure) -> bytes:
    """A figure as a picture."""
    from matplotlib import rc_context

    picture = io.BytesIO()
    with rc_context(STYLE):
        drawn.savefig(picture, format="png")
    return picture.getvalue()


def figure(
    placed: Sequence[Placed],
    *,
    by: Speed = "tokens_per_second",
    baseline: str | None = None,
    title: str | None = None,
    size: tuple[float, float] = (7.2, 4.8),
    comparable: bool = True,
) -> Figure | None:
    """The figure that `draw` writes; None if no point has a speed.

    size: inches.  comparable: the points answered the same documents. Otherwise no frontier is drawn, and all points
    are labelled.  Raises ConfigError if the baseline is no point.
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

    # 2) axes
    with rc_context(STYLE):
        drawn = Figure(figsize=size, dpi=150, layout="constrained")
        axes = drawn.subplots()
        alone = not any(getattr(p, by).bounded for p in shown)
        axes.set_xlabel(NAMES[by] + (" (no interval)" if alone else ""))
        axes.set_ylabel("score (%)")
        if title:
            axes.set_title(title, fontsize=10)
        # 3) points, frontier, baseline
        best = frontier(shown, by) if comparable else []
        if comparable:
            _points(axes, shown, best, by, base)
            drawn.legend(loc="outside lower center", ncols=5, frameon=False, handletextpad=0.4, columnspacing=1.4)
        else:
            _crosses(axes, shown, by, marker="o", color=ACCENT, ms=6.5, zorder=3, bars=(ACCENT, 1.1))
        _limits(axes, shown, by, base)
        # 4) labels, where there is room
        drawn.draw_without_rendering()  # lays the axes out, so that data coordinates have pixels
        texts = {p.name: short(p.settings) or p.name for p in shown if p.name in best or len(shown) <= FEW}
        texts |= {base.name: base.name} if base else {}
        _label(axes, shown, texts, _lines(axes, shown, best, by, base), by)
    return drawn


def short(settings: Mapping[str, Any]) -> str:
    """Settings in short: γ=0.9 K=16 no verify."""
    words = []
    for key, value in settings.items():
        if key == "decoder.verify" and isinstance(value, bool):
            words.append("verify" if value else "no verify")
        elif value is not None:
            text = f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]
            words.append(f"{_SHORT.get(key) or key.rpartition('.')[2]}={text}")
    return " ".join(words)


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
    heads = ["point", *keys, "n", "score (%)", *(NAMES[by] for by in speeds), "note"]
    rows = []
    for p in placed:
        cells = (bracketed(getattr(p, by), _DIGITS[by]) for by in speeds)
        settings = ("–" if (value := p.settings.get(key)) is None else str(value) for key in keys)
        notes = ["tokens/s of one run, no interval"] * (p.tokens_per_second is not None and p.repeats < 2)
        notes += [f"dominated by {p.dominated_by}"] * (p.dominated_by is not None)
        notes += [f"stopped: {p.stopped}"] * (p.stopped is not None)
        rows.append([p.name, *settings, str(p.n), bracketed(p.score, 1, 100), *cells, "; ".join(notes)])
    return heads, rows


def _points(axes: Axes, shown: Sequence[Placed], best: Sequence[str], by: Speed, base: Placed | None) -> None:
    """Every point with its intervals, the frontier's steps, the baseline's line."""
    looks: dict[str, dict[str, Any]] = {
        "frontier": {"color": ACCENT, "ms": 6.5, "zorder": 3, "bars": (ACCENT, 1.1)},
        "behind, not surely": {"color": "#7fa3cf", "ms": 4.5, "zorder": 2.4, "bars": ("#7fa3cf", 0.7)},
        "stopped early": {"color": "#8a8a8a", "mfc": "white", "ms": 5, "zorder": 2.2, "bars": ("#b5b5b5", 0.5)},
        "dominated": {"color": "#b5b5b5", "ms": 3.5, "zorder": 2, "bars": ("#dcdcdc", 0.5)},
    }
    # 1) points by kind
    kinds: dict[str, list[Placed]] = {kind: [] for kind in looks}
    for p in shown:
        if p is not base:
            behind = "dominated" if p.dominated_by is not None else "behind, not surely"
            kind = "stopped early" if p.stopped is not None else "frontier" if p.name in best else behind
            kinds[kind].append(p)
    # 2) the frontier's step line, then the points
    if len(best) > 1:
        spots = {p.name: _spot(p, by) for p in shown}
        steps = zip(*(spots[name] for name in best), strict=True)
        axes.step(*steps, where="pre", color=ACCENT, lw=1, alpha=0.6, zorder=2.6)
    for kind, points in kinds.items():
        if points:
            _crosses(axes, points, by, marker="o", label=kind, **looks[kind])
    # 3) the baseline: a line at its score, a star if it has a speed
    if base is not None:
        label = None if base in shown else f"baseline ({base.name})"
        axes.axhline(100 * base.score.mean, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=1.8, label=label)
    if base is not None and base in shown:
        look = {"marker": "*", "color": INK, "ms": 12, "mec": "white", "zorder": 4}
        _crosses(axes, [base], by, label="baseline", bars=(INK, 1), **look)


def _crosses(axes: Axes, points: Sequence[Placed], by: Speed, *, bars: tuple[str, float], **look: Any) -> None:
    """Points with both intervals as error bars."""
    spots = [_spot(p, by) for p in points]
    x = [speed for speed, _ in spots]
    y = [score for _, score in spots]
    tall = _error_bars([p.score for p in points], 100)
    wide = _error_bars([getattr(p, by) for p in points])
    axes.errorbar(x, y, tall, wide, fmt="none", ecolor=bars[0], elinewidth=bars[1], zorder=look["zorder"])
    axes.plot(x, y, ls="none", **look)


def _error_bars(intervals: Sequence[Interval], scale: int = 1) -> list[list[float]]:
    """Lengths below and above the means. Rounding can put a mean outside its interval, which matplotlib refuses."""
    ends = [(v.mean - _low(v), _high(v) - v.mean) for v in intervals]
    return [[scale * max(0.0, low) for low, _ in ends], [scale * max(0.0, high) for _, high in ends]]


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
    axes.set_xlim(max(0, left - room), right + 2.5 * room)


def _label(axes: Axes, shown: Sequence[Placed], texts: Mapping[str, str], lines: Sequence[Box], by: Speed) -> None:
    """Write texts, by point's name, beside their points where they cover least. A label without room is left out.

    The axes must have been laid out, so that data coordinates have pixels.
    """
    import numpy as np

    # 1) what labels should not cover, with weights
    unit = axes.figure.dpi / 72  # pixels a point
    marks = [(mark, 1.0 if p.name in texts else 0.3) for p in shown for mark in _marks(axes, p, by, 4 * unit)]
    marks += [(line, 0.6) for line in lines]
    left, bottom, right, top = np.array([mark for mark, _ in marks]).T  # (marks,) each
    weights = np.array([weight for _, weight in marks])
    # 2) for each label the best free place, the best score first
    taken: list[Bbox] = []
    for p in sorted((p for p in shown if p.name in texts), key=lambda p: -p.score.mean):
        note = axes.annotate(fill(texts[p.name], 32, break_on_hyphens=False), _spot(p, by), (0, 0), **_NOTE)
        size = note.get_window_extent()
        candidates: list[tuple[float, float, float, float, Bbox]] = []
        for gap, dx, dy in _places(size.width / unit, size.height / unit):
            box = size.translated(dx * unit, dy * unit).padded(1.5 * unit)
            if _within(axes, box) and not any(box.overlaps(other) for other in taken):
                covered = (left < box.x1) & (right > box.x0) & (bottom < box.y1) & (top > box.y0)
                candidates.append((float(weights[covered].sum()) + 0.05 * gap, gap, dx, dy, box))
        if not candidates:
            note.remove()
            continue
        _, gap, dx, dy, box = min(candidates, key=lambda one: one[0])
        note.set_position((dx, dy))
        assert note.arrow_patch is not None
        note.arrow_patch.set_visible(gap > 10)
        taken.append(box)


def _within(axes: Axes, box: Bbox) -> bool:
    """Whether a text lies inside the axes and the figure."""
    room = axes.bbox
    return bool(box.x0 >= room.x0 and box.x1 < axes.figure.bbox.x1 - 5 and box.y0 >= room.y0 and box.y1 <= room.y1)


def _spot(p: Placed, by: Speed) -> tuple[float, float]:
    return getattr(p, by).mean, 100 * p.score.mean


def _marks(axes: Axes, p: Placed, by: Speed, radius: float) -> list[Box]:
    """Boxes that a point covers: its marker and its two error bars."""
    speed: Interval = getattr(p, by)
    x, y = axes.transData.transform(_spot(p, by))
    ends = [(_low(speed), 100 * p.score.low), (_high(speed), 100 * p.score.high)]
    (x0, y0), (x1, y1) = axes.transData.transform(ends)
    return [(x - radius, y - radius, x + radius, y + radius), (x0, y - 1, x1, y + 1), (x - 1, y0, x + 1, y1)]


def _lines(axes: Axes, shown: Sequence[Placed], best: Sequence[str], by: Speed, base: Placed | None) -> list[Box]:
    """Boxes that the frontier's steps and the baseline's line cover."""
    spots = {p.name: axes.transData.transform(_spot(p, by)) for p in shown}
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(spots[name] for name in best):
        boxes += [(x0, min(y0, y1), x0, max(y0, y1)), (min(x0, x1), y1, max(x0, x1), y1)]
    if base is not None:
        y = axes.transData.transform((0, 100 * base.score.mean))[1]
        boxes.append((axes.bbox.x0, y, axes.bbox.x1, y))
    return [(x0 - 1, y0 - 1, x1 + 1, y1 + 1) for x0, y0, x1, y1 in boxes]


def _places(width: float, height: float) -> Iterator[tuple[float, float, float]]:
    """Gaps, and lower left corners of a text of this size around a point, near ones first."""
    for gap in (7, 13, 20, 30, 42, 56):
        for dx in (gap, -gap - width, -width / 2):
            for dy in (-height / 2, gap, -gap - height):
                if (dx, dy) != (-width / 2, -height / 2):
                    yield gap, dx, dy
