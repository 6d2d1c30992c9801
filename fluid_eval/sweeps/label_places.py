"""Where the labels of a figure's points go: beside their points, where they cover least.

A point's label is its settings, or its number in the tables where there are too many. Points drawn on one another share
a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""
Spot = tuple[float, float]
SAME_PLACE = 1.0
"""Points of a figure that lie closer, in 1/72 inch in both directions, are drawn on one another."""
_SHORT = {"decoder.confidence": "γ", "decoder.max_horizon": "K", "model.tau": "τ", "model.path": "", "decoder.name": ""}
"""Names of settings in a label; empty where the value alone is clear."""
_MOST_VALUES = 4
"""Values of a setting that a shared label lists; of more, the first and the last."""
_NOTE: dict[str, Any] = {
    "textcoords": "offset points",
    "zorder": 5,
    "in_layout": False,  # else labels move the axes they were placed on
    "bbox": {"boxstyle": "round,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.7},
}
_ARROW: dict[str, Any] = {"arrowstyle": "-", "lw": 0.4, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2.5}


@dataclass(frozen=True)
class Label:
    """A text beside a spot in data coordinates.

    strong: of a point that matters most, in the figure's ink; others are smaller, and in `color`.
    """

    text: str
    spot: Spot
    strong: bool
    color: str


def in_short(several: Sequence[Mapping[str, Any]], without: Sequence[str] = ()) -> str:
    """The settings of points in short: γ=0.9 K=16 no verify. Settings that differ between them: γ=0.5/0.9.

    without: settings to leave out.
    """
    words = []
    for key in dict.fromkeys(key for settings in several for key in settings if key not in without):
        values = [settings[key] for settings in several if settings.get(key) is not None]
        name = _SHORT.get(key, key.rpartition(".")[2])
        if key == "decoder.verify" and all(isinstance(value, bool) for value in values):
            words += ["/".join(dict.fromkeys("verify" if value else "no verify" for value in values))] if values else []
        elif texts := list(dict.fromkeys(map(_text, values))):
            listed = "/".join(texts) if len(texts) <= _MOST_VALUES else f"{texts[0]}…{texts[-1]}"
            words.append(f"{name}={listed}" if name else listed)
    return " ".join(words)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).rstrip("/").rpartition("/")[2]


def on_one_another(axes: Axes, spots: Sequence[Spot]) -> list[list[int]]:
    """Numbers of the spots that are drawn on one another, in groups, in order. The axes must have been laid out."""
    unit = axes.figure.dpi / 72  # pixels a point
    groups: list[list[int]] = []
    places: list[Spot] = [tuple(axes.transData.transform(spot)) for spot in spots]
    for at, (x, y) in enumerate(places):
        for group in groups:
            x0, y0 = places[group[0]]
            if max(abs(x - x0), abs(y - y0)) <= SAME_PLACE * unit:
                group.append(at)
                break
        else:
            groups.append([at])
    return groups


def write(axes: Axes, labels: Sequence[Label], covered: Sequence[tuple[Box, float]], *, font: float, ink: str) -> int:
    """Write labels beside their spots, where they cover least. Returns how many found no room.

    covered: boxes in pixels that labels should not cover, with weights.  font: of strong labels, in 1/72 inch.
    The axes must have been laid out, so that data coordinates have pixels.
    """
    import numpy as np

    # 1) what is covered already
    unit = axes.figure.dpi / 72  # pixels a point
    left, bottom, right, top = np.array([box for box, _ in covered]).T  # (boxes,) each
    weights = np.array([weight for _, weight in covered])
    # 2) for each label the best free place, strong labels and high scores first
    taken: list[Bbox] = []
    for label in sorted(labels, key=lambda one: (not one.strong, -one.spot[1])):
        size, color = (font, ink) if label.strong else (0.82 * font, label.color)
        text = fill(label.text, 26, break_on_hyphens=False)
        arrow = {**_ARROW, "color": color}
        note = axes.annotate(text, label.spot, (0, 0), fontsize=size, color=color, arrowprops=arrow, **_NOTE)
        extent = note.get_window_extent()
        candidates: list[tuple[float, float, float, float, Bbox]] = []
        for gap, dx, dy in _places(extent.width / unit, extent.height / unit, 5 if label.strong else 3):
            box = extent.translated(dx * unit, dy * unit).padded((1.2 if label.strong else 0.3) * unit)
            if _within(axes, box) and not any(box.overlaps(other) for other in taken):
                hit = (left < box.x1) & (right > box.x0) & (bottom < box.y1) & (top > box.y0)
                candidates.append((float(weights[hit].sum()) + 0.05 * gap, gap, dx, dy, box))
        if not candidates:
            note.remove()
            continue
        _, gap, dx, dy, box = min(candidates, key=lambda one: one[0])
        note.set_position((dx, dy))
        assert note.arrow_patch is not None
        note.arrow_patch.set_visible(gap > (9 if label.strong else 5))
        taken.append(box)
    return len(labels) - len(taken)


def lines(axes: Axes, steps: Sequence[Spot], level: float | None) -> list[Box]:
    """Boxes that a line of steps through spots, and a level line across the axes, cover."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(axes.transData.transform(spot) for spot in steps):
        boxes += [(x0, min(y0, y1), x0, max(y0, y1)), (min(x0, x1), y1, max(x0, x1), y1)]
    if level is not None:
        y = axes.transData.transform((0, level))[1]
        boxes.append((axes.bbox.x0, y, axes.bbox.x1, y))
    return [(x0 - 1, y0 - 1, x1 + 1, y1 + 1) for x0, y0, x1, y1 in boxes]


def _within(axes: Axes, box: Bbox) -> bool:
    """Whether a text lies inside the axes and the figure."""
    room = axes.bbox
    return bool(box.x0 >= room.x0 and box.x1 < axes.figure.bbox.x1 - 5 and box.y0 >= room.y0 and box.y1 <= room.y1)


def _places(width: float, height: float, nearest: float) -> Iterator[tuple[float, float, float]]:
    """Gaps, and lower left corners of a text of this size around a point, near ones first."""
    for gap in (nearest * step for step in (1, 1.8, 2.8, 4, 6, 8.5)):
        for dx in (gap, -gap - width, -width / 2):
            for dy in (-height / 2, gap, -gap - height):
                if (dx, dy) != (-width / 2, -height / 2):
                    yield gap, dx, dy
