"""Seconds of a forward as a function of its slots. Measured on the model and device at hand, and refreshed as it runs.

The draft policy goes by it: a slot is worth feeding where the time it adds would bring fewer tokens elsewhere. On most
devices the function is flat while weights are read and steep once arithmetic binds, so one number cannot say it. For
example (numbers made up for the picture):

    slots      1     2     4     8    16    32
    ms        10    10    10    12    20    40        slot budget 14: with 16 a forward takes twice as long as with one

That is behind CONTEXT cached tokens. Each further one makes every slot take longer, by attention: on that device 2.5 ms
for a slot behind 4,128 tokens, say, so that 8 slots take 32 ms there and far fewer are worth feeding.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

CONTEXT, FAR_CONTEXT = 128, 2048
"""Cached tokens behind which forwards are measured: the curve, and what attention adds."""
ATTENTION_SLOTS = 16
"""Slots of the forward that is measured behind FAR_CONTEXT tokens, at most."""
FRESH = 0.1
"""Weight of an observation against what was known."""
FURTHEST = 3.0
"""An observation counts as at most so many times what was expected, or as this part of it: other work on the machine
stretches single forwards a hundredfold.
"""
HULL_EVERY = 16
"""Observations after which the convex curve is drawn anew: each moves it little, and drawing it takes a while."""
STRIDE = 1.5
"""Factor between the slots at which the time of one more slot is taken, upwards and downwards."""


class ForwardTime:
    """A curve through measured points, linear between them, flat before the first, straight on behind the last; and
    the time of attention, in proportion to slots and to the cached tokens beyond CONTEXT.
    """

    def __init__(self, points: Sequence[tuple[int, float]], attention: float = 0.0) -> None:
        """points: slots and seconds, at least one; slots rise.
        attention: seconds that a slot takes longer for each cached token of its row beyond CONTEXT.
        Raises ValueError if slots do not rise, or a time is negative.
        """
        self._slots = [int(slots) for slots, _ in points]
        self._seconds = [float(seconds) for _, seconds in points]
        if not points or self._slots != sorted(set(self._slots)) or self._slots[0] < 1 or min(self._seconds) <= 0:
            raise ValueError(f"points of a forward's time: {list(points)!r}")
        if not 0 <= attention < math.inf:
            raise ValueError(f"time of attention: {attention!r}")
        self.attention = float(attention)
        self._convex: ForwardTime | None = None  # through the lower hull of the points, once it is asked for
        self._observed = 0

    @property
    def points(self) -> list[tuple[int, float]]:
        """(slots, seconds) of each measured point."""
        return list(zip(self._slots, self._seconds, strict=True))

    @property
    def slot_budget(self) -> int:
        """The curve in one number: slots that cost as much as all else in a forward.

        The time is a + b * slots on most devices, and the budget is a / b. That is where a forward takes twice the time
        of one with a single slot, less 2.
        """
        single = self._seconds[0]
        for (fewer, less_time), (slots, time) in zip(self.points, self.points[1:], strict=False):
            if time >= 2 * single:
                # a + b n = 2 (a + b) where n = a / b + 2
                share = (2 * single - less_time) / (time - less_time)
                return max(1, round(fewer + share * (slots - fewer)) - 2)
        return self._slots[-1]

    def seconds(self, slots: float, context: float = CONTEXT) -> float:
        """Time of a forward of so many slots, padding included, behind so many cached tokens of each row."""
        return self._near(slots) + slots * self._attention(context)

    def _attention(self, context: float) -> float:
        return self.attention * max(0.0, context - CONTEXT)

    def _near(self, slots: float) -> float:
        """Behind CONTEXT tokens."""
        last = len(self._slots) - 1
        if slots <= self._slots[0] or last == 0:
            return self._seconds[0] * max(1.0, slots / self._slots[0] if last == 0 else 1.0)
        after = min(bisect_right(self._slots, slots), last)
        low, high = self._slots[after - 1], self._slots[after]
        share = (slots - low) / (high - low)
        return max(self._seconds[after - 1] * (1 - share) + self._seconds[after] * share, self._seconds[0])

    def marginal(self, slots: float, context: float = CONTEXT) -> float:
        """Seconds that one more slot takes, around so many, on the convex curve below the points. Slots never become
        cheaper, so a point that is too high by noise does not make those behind it seem free.
        """
        if self._convex is None:
            self._convex = ForwardTime(_lower_hull(self.points))
        low, high = slots / STRIDE, slots * STRIDE
        slope = (self._convex._near(high) - self._convex._near(low)) / (high - low)
        return max(0.0, slope) + self._attention(context)  # below 0 by rounding alone

    def observe(self, slots: int, seconds: float, context: float = CONTEXT) -> None:
        """Take in the time of a forward. Half of what differs moves the whole curve, as a busy machine does; the other
        half moves the points beside it.
        """
        self._observed += 1
        if self._observed % HULL_EVERY == 0:
            self._convex = None
        # 1) far behind the last point: a new one
        if slots >= 2 * self._slots[-1]:
            self._slots.append(slots)
            self._seconds.append(max(seconds - slots * self._attention(context), self._seconds[-1]))
            return
        # 2) all of it, by half
        ratio = min(max(seconds / self.seconds(slots, context), 1 / FURTHEST), FURTHEST)
        change = FRESH * (ratio - 1) / 2
        self.attention *= 1 + change
        self._seconds = [known * (1 + change) for known in self._seconds]
        # 3) the two beside it, the nearer one more
        after = min(bisect_right(self._slots, slots), len(self._slots) - 1)
        before = max(after - 1, 0)
        share = (slots - self._slots[before]) / max(self._slots[after] - self._slots[before], 1)
        share = min(max(share, 0.0), 1.0)
        self._seconds[before] *= 1 + change * (1 - share)
        self._seconds[after] *= 1 + change * share


def _lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those of the points that a rising convex curve below all of them goes through; none is faster than the first."""
    hull: list[tuple[int, float]] = []
    for slots, seconds in points:
        point = slots, max(seconds, points[0][1])
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(point: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - point[1]) / (other[0] - point[0])


def measure(seconds: Callable[[int, int], float], window: int, most: int) -> ForwardTime:
    """Measure forwards of 1, 2, 4, ... slots, until one takes more than twice as long as the first, or `most`; and one
    behind a long context.

    seconds: time of a forward of that many slots behind that many cached tokens.  window: of the model, in tokens.
    """
    # 1) by slots
    near = min(CONTEXT, window // 2)
    most = min(most, window - near)
    known: dict[int, float] = {}
    slots = 1
    while True:
        known[slots] = seconds(slots, near)
        if known[slots] >= 2 * known[1]:
            # All once more: a burst of other work would end the curve early, and drafts with it.
            known = {count: min(time, seconds(count, near)) for count, time in known.items()}
        if known[slots] >= 2 * known[1] or 2 * slots > most:
            break
        slots *= 2

    # 2) by cached tokens
    slots = min(slots, ATTENTION_SLOTS)
    far = min(FAR_CONTEXT, window - slots)
    longer = seconds(slots, far) - known[slots] if far > 2 * near else 0.0
    return ForwardTime(list(known.items()), max(0.0, longer) / (slots * max(far - near, 1)))
