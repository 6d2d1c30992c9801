"""How many slots a forward takes before they cost as much as the forward itself: measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable


def measure(seconds: Callable[[int], float], most: int) -> int:
    """Slots that cost as much as all else a forward does, up to `most`; 1 at least.

    seconds: time of a forward of that many slots, a + b slots on most devices: a / b is what is looked for, and found
    where a forward takes twice the time of one with one.
    """
    slots = before = 1
    once = took = earlier = seconds(1)
    while took < 2 * once:
        if 2 * slots > most:
            return slots
        before, earlier = slots, took
        slots *= 2
        took = seconds(slots)
    share = (2 * once - earlier) / (took - earlier)
    return max(1, round(before + share * (slots - before)) - 2)
