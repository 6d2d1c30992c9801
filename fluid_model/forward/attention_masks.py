"""The one place that says who may read whom.

Legend: B rows, S slots fed this forward, T key columns of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FAN, NOBODY, ALL = 2**16, 0, 2**62
"""More than the slots of a fan; before every slot's place in that order, and behind it."""


class Spans(NamedTuple):
    """Who reads whom of slots fed together, (B, S) each: slot q reads slot k where order[k] <= order[q] < until[k].

    order: FAN times the token that a slot hangs on, counted from the first fed, and the step of a fan's slot from 1 on;
    a token hangs on itself with step 0. Slots of one order read one another.
    until: the first that does not read this slot.  ALL of a token that whatever follows reads; of a fan's slot the next
    token; NOBODY of padding.
    places: where slots stand, counted from the first.
    """

    order: Tensor
    until: Tensor
    places: Tensor

    @property
    def steps(self) -> Tensor:
        """(B, S), 0 for tokens, 1.. for slots of a fan."""
        return self.order % FAN


@dataclass(frozen=True)
class Reading:
    """One forward over the cache: where its slots stand and who reads whom. All read their row's cached tokens.

    columns: (B, S) cache column of each fed slot, a row's after its own cached tokens.  total: T, columns in use.
    widths: slots of each row that count, the rest being padding (None: all).
    spans: who reads whom of what is fed (None: every slot what stands before it).
    """

    columns: Tensor
    total: int
    widths: list[int] | None = None
    spans: Spans | None = None

    @property
    def positions(self) -> Tensor:
        """(B, S) position ids: the columns, or where a fan's slots pretend to stand."""
        return self.columns if self.spans is None else self.columns[:, :1] + self.spans.places

    def allowed(self) -> Tensor:
        """(B, S, T) bool, [row, query, key], True = may read."""
        if self.spans is None:
            return causal(self.columns, self.total)
        order, until, _ = self.spans
        among = (order[:, None] <= order[:, :, None]) & (order[:, :, None] < until[:, None])  # (B, S, S)
        cached = torch.arange(self.total, device=order.device) < self.columns[:, :1]  # (B, T)
        readable = cached[:, None].repeat(1, order.shape[1], 1)
        return readable.scatter_(2, self.columns[:, None].expand_as(among), among)


def slot_columns(lengths: Sequence[int], slots: int) -> Tensor:
    """Cache column of every fed slot: a row's slots follow its own length.

    lengths: of B rows, tokens already cached.  Returns (B, S) long, on the host.
    """
    return torch.from_numpy(np.add.outer(lengths, np.arange(slots)))


def causal(columns: Tensor, total: int) -> Tensor:
    """Strictly causal reading: a slot reads every column up to its own and nothing after it.

    columns: (B, S) cache column of each fed slot.  total: T, columns to consider.
    Returns (B, S, T) bool, [row, query, key], True = may read.  (FLUID, strictly causal alignment)
    """
    return torch.arange(total, device=columns.device) <= columns[:, :, None]


def sliding(columns: Tensor, total: int, window: int) -> Tensor:
    """Causal reading of the last `window` columns only, the slot's own included.  (B, S) -> (B, S, T) bool."""
    near = torch.arange(total, device=columns.device) > columns[:, :, None] - window
    return causal(columns, total) & near


def mutual(widths: Tensor, slots: int) -> Spans:
    """A row's first slots all read one another, both ways; what follows reads what stands before it.

    widths: (B,) slots that do, 0 for rows that stay causal.  (NBDiff, context-causal mask; LLaDA where nothing is
    cached)
    """
    slot = torch.arange(slots, device=widths.device).expand(len(widths), -1)
    return Spans(torch.where(slot < widths[:, None], 0, slot * FAN), torch.full_like(slot, ALL), slot)


def fans(anchor: Tensor, step: Tensor) -> Spans:
    """Tokens, each behind the one before, and fans of masks behind them, who read one another as in training.

    anchor: (B, S) the token that a slot hangs on, counted from the first.  step: (B, S), see `Spans`.  (FLUID, strictly
    causal alignment)
    """
    return Spans(anchor * FAN + step, torch.where(step > 0, (anchor + 1) * FAN, ALL), anchor + step)


def one_fan(last: Tensor, slots: int) -> Spans:
    """Rows fed from their start with a fan behind token `last`, (B,); padding goes on with the fan, whose slots read
    nothing after them.
    """
    slot = torch.arange(slots, device=last.device).expand(len(last), -1)
    return fans(torch.minimum(slot, last[:, None]), (slot - last[:, None]).clamp(min=0))


def may_read(query: tuple[Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Whether one slot of a training row may read another, each given as (segment, anchor, step); see `layout`.

    Within a segment: tokens of the row up to the query's anchor, and slots of the same anchor up to the query's step.
    Segment -1 is padding: read by nobody.  Broadcasts; returns bool.
    """
    segment, anchor, step = query
    key_segment, key_anchor, key_step = key
    real = (key_step == 0) & (key_anchor <= anchor)
    own = (key_step > 0) & (key_anchor == anchor) & (key_step <= step)
    return (key_segment == segment) & (key_segment >= 0) & (real | own)


def slots(segment: Tensor, anchor: Tensor, step: Tensor) -> Tensor:
    """Who may read whom in training rows.

    segment, anchor, step: (B, L).  Returns (B, L, L) bool, [row, query, key], True = may read; padding reads itself.
    (FLUID, strictly causal alignment; NBDiff, context-causal mask)
    """
    query, key = (tuple(x.unsqueeze(axis) for x in (segment, anchor, step)) for axis in (2, 1))
    itself = torch.eye(anchor.shape[1], dtype=torch.bool, device=anchor.device)
    return may_read(query, key) | itself  # type: ignore[arg-type]  # tuples of three
