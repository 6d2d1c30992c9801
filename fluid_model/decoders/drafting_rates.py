"""Whether to draft at all: by the tokens a second that steps with drafts and without have brought.  (as adaptive
speculation does, for example EAGLE's servers at large batches; the rule here is measured, not predicted)

Drafts cost slots and time on the host. Where a device is busy with the rows it has, they write less in a second than
autoregressive steps do. The text is the same, so the decoder is free to choose:

    try drafts ──▶ try plain steps ──▶ take the faster, `wait` steps ──▶ try the other ──▶ slower: wait twice as long
                                              ▲                                  │
                                              └────────────── faster: take it ◀──┘

Time is that of whole steps, host included. Rows that share a forward decide together. Rates are kept by what a step's
time depends on most: the number of rows (1, 2, 3 to 4, 5 to 8, ...) and the cached tokens behind each on average (below
512, 1,024, 2,048, ...), since attention over a long context makes every slot cost more.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ..forward.backbone import Backbone

TRIAL_STEPS, TRIAL_SAMPLES = 6, 48
"""Least steps of a trial, and accepted lengths that a trial of drafts sees, one for each row and step."""
DOUBT = 1.5
"""A trial of drafts ends early if its rate, times 1 + DOUBT / sqrt(lengths seen), is still the lower one: lengths vary
by half of their mean, so that is three standard errors.
"""
WINDOW = 64
"""Latest steps that a rate is taken over."""
FIRST_WAIT, LONGEST_WAIT = 64, 1024
"""Steps between two trials: at first, and at most by doubling."""
PRICE = 200
"""Steps to wait for each step's worth of tokens that a trial has lost: trials cost 0.5% of the time at most."""
SHORT_CONTEXT = 512
"""Cached tokens of a row up to which the time of a forward does not depend on their number by much."""
MARGIN = 1.05
"""How many times faster than plain steps those with drafts must be, since measurements are noisy."""
OUTLIER = 3.0
"""Steps that take more than so many times the median are cut to that: the machine did something else."""


@dataclass
class Rate:
    """Tokens a second of one row, by one kind of step, over its latest ones. seconds: of each.  tokens: per row."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _value: float | None = None  # once it is asked for: every row that finishes reports it

    def add(self, seconds: float, tokens: float) -> None:
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self._value = None

    def forget(self) -> None:
        """Start anew: the machine or the text may have changed."""
        self.seconds.clear()
        self.tokens.clear()
        self._value = None

    @property
    def value(self) -> float | None:
        """Tokens a second of one row; None without steps."""
        if self._value is None and self.seconds:
            limit = OUTLIER * sorted(self.seconds)[len(self.seconds) // 2]
            self._value = sum(self.tokens) / sum(min(seconds, limit) for seconds in self.seconds)
        return self._value


@dataclass
class RowRates:
    """The rates of one number of rows at one length, and which kind of step is in force.

    rows: in numbers.  trying: steps left of a trial of the kind in force, 0 outside.  wait: steps between trials.
    left: until the next.  decided_by: tokens a second of one row, with drafts and without, at the end of the latest
    trial; None each before there are two.
    """

    rows: int
    drafting: Rate = field(default_factory=Rate)
    plain: Rate = field(default_factory=Rate)
    drafts: bool = True
    trying: int = 0
    wait: int = FIRST_WAIT
    left: int = FIRST_WAIT
    decided_by: tuple[float | None, float | None] = None, None

    def add(self, seconds: float, tokens: float) -> None:
        """A step of the kind in force took so long and brought each row so many tokens."""
        if self.untimed:
            self.left -= 1
            return
        (self.drafting if self.drafts else self.plain).add(seconds, tokens)
        if self.trying:
            self.trying -= 1
            if not self.trying or self._is_hopeless():
                self._judge()
            return
        self.left -= 1
        if self.left <= 0:
            self.try_kind(drafts=not self.drafts)

    @property
    def untimed(self) -> int:
        """Steps to come whose time will not be asked for: those without drafts, long before the next trial."""
        return 0 if self.trying or self.drafts else max(0, self.left - WINDOW)

    @property
    def best(self) -> float | None:
        """Tokens a second of one row at the faster kind of step; None before the first."""
        return max((rate for rate in (self.drafting.value, self.plain.value) if rate is not None), default=None)

    def try_kind(self, *, drafts: bool) -> None:
        """Begin a trial."""
        self.drafts = drafts
        self.trying = max(TRIAL_STEPS, math.ceil(TRIAL_SAMPLES / self.rows)) if drafts else TRIAL_STEPS
        (self.drafting if drafts else self.plain).forget()

    def decline(self) -> None:
        """Plain steps without a trial of drafts, which would feed no slot: none is worth its time."""
        self.drafts, self.trying = False, 0
        self.left = self.wait = min(2 * self.wait, LONGEST_WAIT)

    def _is_hopeless(self) -> bool:
        steps, tried, other = len(self.drafting.seconds), self.drafting.value, self.plain.value
        if not self.drafts or steps < TRIAL_STEPS or tried is None or other is None:
            return False
        return tried * (1 + DOUBT / math.sqrt(steps * self.rows)) < other

    def _judge(self) -> None:
        """A trial has ended: take the faster kind, or try the one that has no rate yet."""
        self.trying = 0
        tried, other = (self.drafting, self.plain) if self.drafts else (self.plain, self.drafting)
        if other.value is None:
            self.try_kind(drafts=not self.drafts)
            return
        assert self.drafting.value is not None
        assert self.plain.value is not None
        self.decided_by = self.drafting.value, self.plain.value
        pays = self.drafting.value > MARGIN * self.plain.value
        if pays == self.drafts:
            self.wait = FIRST_WAIT
        else:
            lost = other.value * sum(tried.seconds) - sum(tried.tokens)
            self.drafts = pays
            self.wait = max(min(2 * self.wait, LONGEST_WAIT), round(PRICE * lost))
        self.left = self.wait


class DraftingRates:
    """Rates by rows and length, and the choice that follows from them."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], RowRates] = {}

    def of(self, rows: int, context: float) -> RowRates:
        """The rates of so many rows.  context: cached tokens of a row, on average.

        New ones begin with what a neighbour has decided, one power of two away; without any, with a short trial of
        drafts.
        """
        place = (rows - 1).bit_length(), int(context / SHORT_CONTEXT).bit_length()
        known = self._known.get(place)
        if known is not None:
            return known
        fresh = RowRates(rows)
        beside = (rates for other, rates in self._known.items() if _are_neighbours(place, other))
        decided = next((rates for rates in beside if rates.decided_by[0] is not None), None)
        if decided is not None:
            fresh.drafts = decided.drafts
        else:
            fresh.try_kind(drafts=True)
            fresh.trying = TRIAL_STEPS  # nothing to compare with yet
        self._known[place] = fresh
        return fresh


def _are_neighbours(place: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(place[0] - other[0]) + abs(place[1] - other[1]) == 1


_RATES: WeakKeyDictionary[Backbone, dict[object, DraftingRates]] = WeakKeyDictionary()


def rates_of(backbone: Backbone, key: object) -> DraftingRates:
    """The rates of a model on its device, which outlive an engine.  key: all else that they depend on."""
    return _RATES.setdefault(backbone, {}).setdefault(key, DraftingRates())
