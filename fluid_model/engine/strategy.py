"""The seam between the engine and a decoder: what to feed, what to keep.

Legend: n active rows, S slots fed, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..forward.attention_masks import AttentionIntervals
from .records import DraftPolicy, Kind, Request


@dataclass(frozen=True)
class Feed:
    """Slots to feed now. ids: (n, S), a row's slots first, padding after.  widths, kinds: per row.
    intervals: who reads whom of them (None: every slot what stands before it).
    """

    ids: Tensor
    widths: list[int]
    kinds: list[Kind]
    intervals: AttentionIntervals | None = None


@dataclass(frozen=True)
class Absorbed:
    """What a round brought, per row, on the host.

    tokens: ids newly committed to the answer.  keep: how many fed slots' keys and values stay cached.
    kept: which slots these are (empty: of all rows the first).
    predicted: stride of a round that opened (before its tokens are there) or closed (with them); None if neither.
    full: whether the decoder has no place left for more tokens (empty: it always has).
    ago: how many forwards ago each of `tokens` was written (empty: just now, all of them).
    rejected: drafts thrown out when the token in place of the first was written, and how many of `tokens` stand before
    it (empty: no row has any).
    """

    tokens: list[list[int]]
    keep: list[int]
    predicted: list[int | None] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)
    ago: list[list[int]] = field(default_factory=list)
    rejected: list[tuple[int, list[int]]] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)


class Strategy(Protocol):
    """A decoder: state over slots, vectorised over rows. Rows are slots 0..n-1 of the engine, always packed."""

    widest: int
    """The most slots one row may feed in one forward, prompts aside; known once rows are allocated."""
    reads_prompt: bool
    """Whether prompts are read into the cache before `admit` (not if every forward feeds them again)."""
    behind_prompt: tuple[int, ...]
    """Ids fed with each prompt, M of them, as a fan on its last token (see `masks.mask_blocks`); they are not kept."""

    @property
    def draft_policy(self) -> DraftPolicy | None:
        """What the number of drafts depends on, known once rows are allocated; None if on weights and prompt alone."""

    def allocate(self, slots: int) -> None:
        """Make state for `slots` rows: as many as share a forward where a whole run is answered at once."""

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, rooms: list[int]) -> Absorbed:
        """Rows start.. have come in. hidden: (R, 1 + M, D) at each prompt's last token and at what was fed behind it,
        None if prompts were not read.

        rooms: slots left before the window ends, per row.  A request's seed is for its own random numbers.
        """

    def plan(self, rows: int) -> Feed:
        """What rows 0..rows-1 feed next."""

    def absorb(self, feed: Feed, hidden: Tensor, rooms: list[int]) -> Absorbed:
        """Digest a forward. hidden: (n, S, D).  rooms: slots left before the window ends, counted before this feed."""

    def move(self, source: int, target: int) -> None:
        """Copy one row's state over another's (the engine keeps active rows packed)."""
