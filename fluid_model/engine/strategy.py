"""The interface between the engine and a decoder: which slots a forward feeds, and what its hidden states bring.

The engine owns the batch and the KV cache; a strategy owns the decoder's state of each row. One step is

    feed = strategy.plan(rows)                          lay out the next forward
    hidden = model(feed)                                one forward for all active rows
    updates = strategy.absorb(feed, hidden, ...)        verify, commit, draft

Legend: n active rows, R rows just admitted, S slots fed, M slots of the prompt's mask block, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..forward.attention_masks import AttentionIntervals, PromptBlocks
from .records import DraftPolicy, Kind, Request


@dataclass(frozen=True)
class Feed:
    """Slots of the next forward.

    ids: (n, S), a row's slots first, padding behind.  widths: (n,) slots of each row, padding aside.
    kinds: what the forward does for each row.  intervals: the mask rule among the slots fed (None: causal).
    """

    ids: Tensor
    widths: Sequence[int] | np.ndarray
    kinds: list[Kind]
    intervals: AttentionIntervals | None = None


class RejectedDraft(NamedTuple):
    """Draft tokens that a step threw out. place: of the first, counted from the first token of the same update."""

    place: int
    ids: list[int]


class RowUpdate(NamedTuple):
    """What one forward brought one row, on the host.

    tokens: ids committed to the answer.
    ages: forwards since each of them was written, 0 for this one.
    cached: fed slots whose keys and values stay in the cache, in ascending order; all others are overwritten.
    dropped: cached slots, the row's latest, that are overwritten after all. Not with `cached`.
    stride: draft length of a step that is complete; None for a forward that completes none.
    rejected: rejected draft tokens of the likeliest path, None without any.
    expected: tokens that the draft of a complete step was expected to bring, by its path probabilities.
    is_full: whether the decoder has no slot left for further tokens.
    """

    tokens: list[int]
    ages: list[int]
    cached: Sequence[int]
    stride: int | None = None
    rejected: RejectedDraft | None = None
    expected: float = 1.0
    is_full: bool = False
    dropped: int = 0


@dataclass(slots=True)
class RejectedDrafts:
    """`RejectedDraft` of all rows. places, counts: (n,) each, 0 where none was.  ids: (n, W), padded."""

    places: Tensor
    counts: Tensor
    ids: Tensor


@dataclass(slots=True)
class Updates:
    """The updates of all rows of a forward, entry r for row r, see `RowUpdate`; integers on the host. A step then costs
    no work in Python for each of them.

    tokens: (n, T), padded with any token.  lengths: (n,) tokens of each row.
    kept: (n,) slots that stay cached.  moves: row, slot and the place that it takes up among those, where that is not
    its own; rows and places rise.
    ages: (n, T); None: 0.  strides: (n,), 0 for a forward that completes no step; None: for no row.
    rejected, expected, is_full, dropped: of each row; None: `RowUpdate`'s defaults.
    """

    tokens: Tensor
    lengths: Tensor
    kept: Tensor
    moves: Sequence[tuple[int, int, int]] = ()
    ages: Tensor | None = None
    strides: Tensor | None = None
    rejected: RejectedDrafts | None = None
    expected: Tensor | None = None
    is_full: Tensor | None = None
    dropped: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[RowUpdate]) -> Updates:
        """From updates by row."""
        tokens, ages, cached, strides, rejected, expected, is_full, dropped = zip(*rows, strict=True)
        places = [(row, slot, place) for row, slots in enumerate(cached) for place, slot in enumerate(slots)]
        drafts = [draft or RejectedDraft(0, []) for draft in rejected]
        first, missed = zip(*drafts, strict=True)
        ids, counts = _padded(missed)
        return cls(
            *_padded(tokens),
            kept=torch.tensor(list(map(len, cached))),
            moves=[move for move in places if move[1] != move[2]],
            ages=_padded(ages)[0],
            strides=torch.tensor([stride or 0 for stride in strides]),
            rejected=RejectedDrafts(torch.tensor(first), counts, ids),
            expected=torch.tensor(expected, dtype=torch.double),
            is_full=torch.tensor(is_full),
            dropped=torch.tensor(dropped),
        )


class OneEach(NamedTuple):
    """The updates of a forward that brought every row one token, as in AR.

    tokens: (n,) on the host.  kept: slots of each row that stay cached, 1 or 0.  stride: 0 where no step is complete.
    """

    tokens: Tensor
    kept: int
    stride: int

    def in_full(self) -> Updates:
        """The same by arrays."""
        ones = torch.ones_like(self.tokens)
        return Updates(self.tokens[:, None], ones, self.kept * ones, strides=self.stride * ones)


def _padded(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of integers as one array, (n, widest), and how many each has, (n,)."""
    counts = list(map(len, rows))
    padded = [[*row, *[0] * (max(counts) - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long), torch.tensor(counts)


NOTHING: Sequence[int] = range(0)
"""`cached` of a row that keeps no fed slot."""


def empty_updates(rows: int) -> list[RowUpdate]:
    """Updates of rows that commit and cache nothing yet."""
    return [RowUpdate([], [], NOTHING) for _ in range(rows)]


class Strategy(Protocol):
    """A decoder: state of each row, vectorised over rows. Active rows are 0..n-1, always contiguous.

    It may have `prompt_blocks`, see the function of this name.
    """

    max_slots: int
    """Most columns of the cache that a forward needs behind a row's tokens, prompts aside: slots fed, and those cached
    before that will be `dropped`. Final once rows are allocated.
    """
    prefills_prompt: bool
    """Whether prompts are cached before `admit`; not where every forward feeds them again."""

    @property
    def prompt_mask_block(self) -> tuple[int, ...]:
        """(M,) ids of a mask block anchored at the prompt's last token, fed with the prefill and never cached."""

    @property
    def draft_policy(self) -> DraftPolicy | None:
        """What the size of drafts depends on, once rows are allocated; None if on weights and prompt alone."""

    def allocate(self, rows: int) -> None:
        """Make state for `rows` rows: as many as share a forward when a whole run is answered at once."""

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> Updates | OneEach | list[RowUpdate]:
        """Start rows start.. of the batch.

        hidden: (R, 1 + M, D), at each prompt's last cached token and its mask block; None without a prefill.
        window_left: positions between the row's cached tokens and the end of the context window, per row.
        """

    def plan(self, rows: int) -> Feed:
        """Lay out the next forward of rows 0..rows-1."""

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> Updates | OneEach | list[RowUpdate]:
        """Take in a forward's hidden states, (n, S, D). window_left: as in `admit`, before this forward's slots."""

    def move(self, source: int, target: int) -> None:
        """Copy one row's state over another's: the engine moves the last row into a retired one's place."""


def prompt_blocks(strategy: Strategy) -> PromptBlocks | None:
    """How a strategy caches prompts: by blocks, or causally, as one without this attribute does."""
    blocks: PromptBlocks | None = getattr(strategy, "prompt_blocks", None)
    return blocks
