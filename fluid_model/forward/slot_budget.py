"""The slot budget: how many slots a forward takes before they cost as much as the forward itself. Measured.

The draft policy goes by it: a forward of s slots costs 1 + s / budget of an empty one.
"""

from __future__ import annotations

from collections.abc import Callable


def measure(seconds: Callable[[int], float], most: int) -> int:
    """The slot budget, from 1 up to `most`.

    seconds: time of a forward of that many slots. It is a + b * slots on most devices, and the budget is a / b. That
    is where a forward takes twice the time of one with a single slot, less 2.
    """
    # 1) double the slots until the time has doubled
    slots = fewer = 1
    single = time = less_time = seconds(1)
    while time < 2 * single:
        if 2 * slots > most:
            return slots
        fewer, less_time = slots, time
        slots *= 2
        time = seconds(slots)
    # 2) interpolate: a + b n = 2 (a + b) where n = a / b + 2
    share = (2 * single - less_time) / (time - less_time)
    return max(1, round(fewer + share * (slots - fewer)) - 2)
