"""The one place that says who may read whom.

Legend: B rows, S slots fed this forward, T key columns of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FAN, NOBODY = 2**16, 2**62
"""More than the slots of a fan, and than any slot's place in that order."""


class Fans(NamedTuple):
    """Tokens fed together, and fans of masks behind them; (B, S) each, read as `fans` says.

    anchor: which fed token a slot hangs on, counted from the first; a token hangs on itself; negative for padding.
    step: 0 for tokens, 1.. for slots of a fan.
    Of drafts that part into several texts, all that hangs on a token follows it in the order of anchors (None: one
    text, each token behind the one before):
    place: where a slot stands, counted from the first token.  until: for a token the first one that does not read it.
    """

    anchor: Tensor
    step: Tensor
    place: Tensor | None = None
    until: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """Where slots stand, counted from the first token."""
        return self.anchor + self.step if self.place is None else self.place


@dataclass(frozen=True)
class Reading:
    """One forward over the cache: where its slots stand and who reads whom.

    columns: (B, S) cache column of each fed slot, a row's after its own cached tokens.  total: T, columns in use.
    widths: slots of each row that count, the rest being padding (None: all).
    At most one of these; with neither, every slot reads what stands before it:
    ends: (B,), see `mutual`.  fans: see `fans`.
    """

    columns: Tensor
    total: int
    widths: list[int] | None = None
    ends: Tensor | None = None
    fans: Fans | None = None

    @property
    def positions(self) -> Tensor:
        """(B, S) position ids: the columns, or where a fan's slots pretend to stand."""
        if self.fans is None:
            return self.columns
        return (self.columns[:, :1] + self.fans.places).clamp(min=0)

    @property
    def plain(self) -> bool:
        """Whether every slot reads just what stands before it."""
        return self.ends is None and self.fans is None

    def allowed(self) -> Tensor:
        """(B, S, T) bool, [row, query, key], True = may read."""
        if self.fans is not None:
            return fans(self.columns, self.total, self.fans)
        if self.ends is not None:
            return mutual(self.columns, self.total, self.ends)
        return causal(self.columns, self.total)


def slot_columns(lengths: Tensor, slots: int) -> Tensor:
    """Cache column of every fed slot: a row's slots follow its own length.

    lengths: (B,) tokens already cached.  Returns (B, S) long.
    """
    return lengths[:, None] + torch.arange(slots, device=lengths.device)


def causal(columns: Tensor, total: int) -> Tensor:
    """Strictly causal reading: a slot reads every column up to its own and nothing after it.

    columns: (B, S) cache column of each fed slot.  total: T, columns to consider.
    Returns (B, S, T) bool, [row, query, key], True = may read.  (FLUID, strictly causal alignment)
    """
    return torch.arange(total, device=columns.device) <= columns[:, :, None]


def mutual(columns: Tensor, total: int, ends: Tensor) -> Tensor:
    """Causal reading, but a row's slots before its `ends` all read every column before it: both ways in what is fed.

    columns: (B, S).  total: T.  ends: (B,), 0 for rows that stay causal.  Returns (B, S, T) bool.  (NBDiff,
    context-causal mask; LLaDA where nothing is cached)
    """
    inside = columns[:, :, None] < ends[:, None, None]
    return causal(columns, total) | (inside & (torch.arange(total, device=columns.device) < ends[:, None, None]))


def sliding(columns: Tensor, total: int, window: int) -> Tensor:
    """Causal reading of the last `window` columns only, the slot's own included.  (B, S) -> (B, S, T) bool."""
    near = torch.arange(total, device=columns.device) > columns[:, :, None] - window
    return causal(columns, total) & near


def fans(columns: Tensor, total: int, fed: Fans) -> Tensor:
    """Reading where fans of masks are fed behind tokens: all read the cached columns, and one another as in training.

    columns: (B, S), a row's from its own length on.  total: T.
    Returns (B, S, T) bool.  (FLUID, strictly causal alignment)
    """
    anchor, step = fed.anchor, fed.step
    query = anchor * FAN + step  # slots in the order anchor, step; a key is read by those from `low` to below `high`
    low = torch.where(anchor < 0, NOBODY, query)
    high = torch.where(step > 0, (anchor + 1) * FAN, NOBODY if fed.until is None else fed.until * FAN)
    cached = torch.arange(total, device=columns.device) < columns[:, :1]  # (B, T)
    since = torch.where(cached, -FAN, NOBODY).scatter_(1, columns, low)
    until = torch.full_like(since, NOBODY).scatter_(1, columns, high)
    return (query[:, :, None] >= since[:, None]) & (query[:, :, None] < until[:, None])


def one_fan(last: Tensor, slots: int) -> Fans:
    """Rows fed from their start with a fan behind token `last`, (B,); padding goes on with the fan, whose slots read
    nothing after them.
    """
    slot = torch.arange(slots, device=last.device).expand(len(last), -1)
    return Fans(torch.minimum(slot, last[:, None]), (slot - last[:, None]).clamp(min=0))


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
