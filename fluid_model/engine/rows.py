"""The active rows of a batch by column: what is cached of each, and its answer so far.

A step extends all answers in one call of compiled code, or by a few array operations where there is no compiler. The
record of one answer is made when it is finished.

Legend: B rows of the batch, n of them in a step, C places that there is room for, T tokens of an update at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..forward import compiled
from ..forward.compiled.structs import REJECTED, STEP, TOKEN, RowTable, StepUpdates
from .records import KINDS, Finish, Request, Trace
from .strategy import Feed, OneEach, Updates

ROOM = 256
"""Places of a list at first; they double where it is longer."""


class _Lists:
    """A list of each row: `table`, (B, C), of which the first `lengths`, (B,), count."""

    def __init__(self, rows: int, kind: Any) -> None:
        """kind: of the entries; they have names, or are numbers."""
        self.lengths, self.table = np.zeros(rows, np.int64), np.zeros((rows, ROOM), kind)

    def reserve(self, width: int) -> int:
        """Make room for as many behind every row's. Returns how many more there is room for."""
        room, needed = self.table.shape[1], int(self.lengths.max()) + width
        if needed > room:
            self.table = np.pad(self.table, ((0, 0), (0, max(needed - room, room))))
        return int(self.table.shape[1]) - needed

    def append(self, at: slice, counts: np.ndarray, entries: np.ndarray) -> None:
        """Append to the rows `at`. entries: (n, any) each; of a row the first `counts` stay."""
        rows, places = np.arange(at.start, at.stop)[:, None], self.lengths[at, None] + np.arange(entries.shape[1])
        self.table[rows, places] = entries
        self.lengths[at] += counts

    def of(self, row: int) -> Any:
        """One row's list."""
        return self.table[row, : self.lengths[row]]

    def move(self, source: int, target: int) -> None:
        """Copy one row's over another's."""
        length = self.lengths[target] = self.lengths[source]
        self.table[target, :length] = self.table[source, :length]


class Rows:
    """Active rows are 0..n-1.

    requests, finish: of each row; why its answer ends, where it does.
    cached: tokens in the KV cache.  limits: tokens of an answer at most.  seconds: its share of the engine's time.
    (B,) each.
    """

    def __init__(self, rows: int) -> None:
        self.requests: list[Request] = []
        self.finish: dict[int, Finish] = {}
        self.seconds = np.zeros(rows)
        self._numbers = np.zeros((4 + len(KINDS), rows), np.int64)
        self.cached, self.limits, self._forwards, self._slots, *self._kinds = self._numbers
        self._answers, self._steps = _Lists(rows, TOKEN), _Lists(rows, STEP)
        self._drafts, self._rejected = _Lists(rows, REJECTED), _Lists(rows, np.int64)  # and their tokens, end to end
        self._lists = self._answers, self._steps, self._drafts, self._rejected
        self._free = ROOM  # entries that certainly fit behind those of every list
        self._library = compiled.library(compiled.native_lanes())
        self._harmless: np.ndarray | None = None
        self._ends = torch.empty(0, 3, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) tokens of each answer."""
        return self._answers.lengths

    def add(self, requests: Sequence[Request], cached: int) -> slice:
        """New rows behind the active ones, with so many cached tokens. Returns which."""
        at = slice(len(self), len(self) + len(requests))
        self.requests += requests
        self._numbers[:, at], self.seconds[at] = 0, 0.0
        self.cached[at] = self._slots[at] = cached
        self.limits[at] = [request.max_new_tokens for request in requests]
        for lists in self._lists:
            lists.lengths[at] = 0
        return at

    def remove(self, row: int) -> None:
        """The last active row takes the place of this one."""
        last, request = len(self) - 1, self.requests.pop()
        self.finish.pop(row, None)
        if row == last:
            return
        self.requests[row], self.seconds[row] = request, self.seconds[last]
        if last in self.finish:
            self.finish[row] = self.finish.pop(last)
        self._numbers[:, row] = self._numbers[:, last]
        for lists in self._lists:
            lists.move(last, row)

    def extend(
        self, at: slice, updates: Updates | OneEach, feed: Feed | None, seconds: float, harmless: np.ndarray
    ) -> list[list[int]]:
        """Enter what a forward brought the rows `at`, each of which took `seconds` of the time.

        feed: of the forward; None if there was none.  harmless: by token, whether it ends no answer; larger ids may.
        Raises ValueError where the arrays of the updates have other shapes or number formats than `Updates` says.
        Returns where answers may end: row, counted from the first of `at`; the token before, -1 if there is none; the
        token. -1 for both where an answer has as many tokens as it may.
        """
        # 1) forwards by kind: of most steps it is the same one for all rows
        if feed is not None:
            kinds = feed.kinds
            if kinds.count(kinds[0]) == len(kinds):
                self._kinds[KINDS.index(kinds[0])][at] += 1
            else:
                for row, kind in enumerate(kinds, at.start):
                    self._kinds[KINDS.index(kind)][row] += 1
        # 2) room for all entries
        width = _widest(updates)
        self._free -= width
        if self._free < 0:
            self._free = min(lists.reserve(width) for lists in self._lists)
            self._harmless = None  # addresses have changed
        # 3) all else
        if self._library is None:
            return self._extend_by_arrays(at, updates, feed, seconds, harmless)
        if harmless is not self._harmless:
            self._harmless, self._table = harmless, self._addresses(harmless)
        if len(self._ends) < (at.stop - at.start) * (1 + width):
            self._ends = torch.empty((at.stop - at.start) * (1 + width), 3, dtype=torch.long)
        ending = self._extend_compiled(self._library, at, updates, feed, seconds)
        ends: list[list[int]] = self._ends[:ending].tolist() if ending else []
        return ends

    def _extend_compiled(
        self, library: CDLL, at: slice, updates: Updates | OneEach, feed: Feed | None, seconds: float
    ) -> int:
        """`extend`, its third phase. Returns how many places `_ends` holds."""
        start, count, ends = at.start, at.stop - at.start, self._ends.data_ptr()
        if isinstance(updates, OneEach) and (feed is None or feed.ids.shape[1] == 1):
            (tokens, *numbers), slots = updates, int(feed is not None)
            address = _address("tokens", tokens, (count,))
            return int(library.extend_rows_alike(self._table, start, count, address, slots, *numbers, seconds, ends))
        struct, _held = _for_compiled(updates, count, feed, seconds)
        return int(library.extend_rows(self._table, struct, start, count, ends))

    def _addresses(self, harmless: np.ndarray) -> RowTable:
        arrays = {
            "cached": self.cached, "limits": self.limits, "forwards": self._forwards, "slots": self._slots,
            "seconds": self.seconds, "harmless": harmless,
            "lengths": self._answers.lengths, "answers": self._answers.table,
            "steps_made": self._steps.lengths, "steps": self._steps.table,
            "drafts_rejected": self._drafts.lengths, "drafts": self._drafts.table,
            "tokens_rejected": self._rejected.lengths, "rejected": self._rejected.table,
        }  # fmt: skip
        table = RowTable(known=len(harmless), **{name: array.ctypes.data for name, array in arrays.items()})
        for name, lists in zip(("answer", "step", "draft", "rejected"), self._lists, strict=True):
            setattr(table, f"{name}_room", lists.table.shape[1])
        return table

    def _extend_by_arrays(
        self, at: slice, updates: Updates | OneEach, feed: Feed | None, seconds: float, harmless: np.ndarray
    ) -> list[list[int]]:
        """`extend`, its third phase, without compiled code."""
        updates = updates.in_full() if isinstance(updates, OneEach) else updates
        tokens, lengths, kept = (table.numpy() for table in (updates.tokens, updates.lengths, updates.kept))
        ages = np.zeros_like(tokens) if updates.ages is None else updates.ages.numpy()
        # 1) the forward
        self.cached[at] += kept if updates.dropped is None else kept - updates.dropped.numpy()
        self.seconds[at] += seconds
        if feed is not None:
            self._forwards[at] += 1
            self._slots[at] += np.asarray(feed.widths)
        # 2) tokens
        before, width = self.lengths[at].copy(), tokens.shape[1]
        entries = np.zeros(tokens.shape, TOKEN)
        entries["id"], entries["forward"] = tokens, self._forwards[at, None] - ages
        self._answers.append(at, lengths, entries)
        may_end = (tokens >= len(harmless)) | ~harmless[tokens.clip(max=len(harmless) - 1)]  # (n, T)
        may_end &= np.arange(width) < lengths[:, None]
        rows, places = may_end.nonzero()
        previous = before[rows] + places - 1
        previous = np.where(previous < 0, -1, self._answers.table["id"][rows + at.start, previous])
        ends: list[list[int]] = np.stack((rows, previous, tokens[rows, places]), 1).tolist()
        ends += [[row, -1, -1] for row in (self.lengths[at] >= self.limits[at]).nonzero()[0].tolist()]
        # 3) steps that are complete; what others leave is written over
        if updates.strides is not None:
            steps, strides = np.zeros((len(before), 1), STEP), updates.strides.numpy()
            expected = 1.0 if updates.expected is None else updates.expected.numpy()
            steps["predicted"][:, 0], steps["begun"][:, 0], steps["ended"][:, 0] = strides, before, self.lengths[at]
            steps["expected"][:, 0] = expected
            self._steps.append(at, strides > 0, steps)
        # 4) rejected drafts, each in place of one of these tokens
        if (rejected := updates.rejected) is not None and rejected.ids.shape[1]:
            counts, places = rejected.counts.numpy(), rejected.places.numpy()
            is_token = places < lengths
            age = ages[np.arange(len(places)), np.where(is_token, places, 0)] * is_token if width else 0
            drafts = np.zeros((len(places), 1), REJECTED)
            drafts["forward"][:, 0], drafts["place"][:, 0] = self._forwards[at] - age, before + places
            drafts["length"][:, 0] = counts
            self._drafts.append(at, counts > 0, drafts)
            self._rejected.append(at, counts, rejected.ids.numpy())
        return ends

    def latest(self, row: int, start: int) -> list[int]:
        """Tokens of a row's answer from `start` on."""
        ids: list[int] = self._answers.of(row)["id"][start:].tolist()
        return ids

    def fail(self, row: int) -> None:
        """A row ends without an answer; the counts of forwards and slots stay."""
        self.finish[row] = "broken"
        for lists in self._lists:
            lists.lengths[row] = 0

    def trace(self, row: int) -> Trace:
        """The cost of one answer."""
        answer, steps, drafts, tokens = (lists.of(row) for lists in self._lists)
        written, ids = answer["forward"].tolist(), tokens.tolist()
        accepted = (np.minimum(steps["ended"], len(written)) - steps["begun"]).tolist()  # the answer may have been cut
        expected = [round(tokens, 3) for tokens in steps["expected"].tolist()]  # they are stored
        # Drafts past the end are dropped. An end-of-sequence id is not among the ids, but takes one place behind them.
        places, limit = len(written) + (self.finish.get(row) in (None, "eos")), int(self.limits[row])
        rejected, first = list[tuple[int, int, list[int]]](), 0
        for forward, place, length in drafts.tolist():
            kept = ids[first : first + max(0, min(length, limit - place))]
            if kept and place < places:
                rejected.append((forward, place, kept))
            first += length
        kinds: dict[str, int] = dict(zip(KINDS, self._numbers[-len(KINDS) :, row].tolist(), strict=True))
        predicted = steps["predicted"].tolist()
        return Trace(kinds, int(self._slots[row]), predicted, accepted, expected, written, rejected)


def _widest(updates: Updates | OneEach) -> int:
    """Tokens that a row commits or rejects at most, padding included; at least 1."""
    if isinstance(updates, OneEach):
        return 1
    rejected = 0 if updates.rejected is None else updates.rejected.ids.shape[1]
    return max(1, updates.tokens.shape[1], rejected)


def _for_compiled(updates: Updates | OneEach, rows: int, feed: Feed | None, seconds: float) -> tuple[StepUpdates, Any]:
    """What a forward brought as compiled code reads it, and arrays to keep until it has done so."""
    updates = updates.in_full() if isinstance(updates, OneEach) else updates
    width, expected = updates.tokens.shape[1], updates.expected
    struct = StepUpdates(width=width, seconds=seconds, tokens=_address("tokens", updates.tokens, (rows, width)))
    widths = None if feed is None else np.ascontiguousarray(feed.widths, np.int64)
    if widths is not None:
        struct.forwards, struct.widths = 1, widths.ctypes.data
    for name in ("lengths", "kept", "dropped", "strides"):
        if (numbers := getattr(updates, name)) is not None:
            setattr(struct, name, _address(name, numbers, (rows,)))
    if updates.ages is not None:
        struct.ages = _address("ages", updates.ages, (rows, width))
    if expected is not None:
        struct.expected = _address("expected", expected, (rows,), torch.double)
    if (rejected := updates.rejected) is not None:
        struct.rejected_width = rejected.ids.shape[1]
        struct.rejected = _address("rejected ids", rejected.ids, (rows, rejected.ids.shape[1]))
        struct.rejected_places = _address("places", rejected.places, (rows,))
        struct.rejected_counts = _address("counts", rejected.counts, (rows,))
    return struct, (updates, widths)


def _address(name: str, numbers: Tensor, shape: tuple[int, ...], kind: torch.dtype = torch.long) -> int:
    """Of numbers that compiled code may read. Raises ValueError where they are others: decoders may be anyone's."""
    if numbers.shape != shape or numbers.dtype != kind or not numbers.is_contiguous():
        raise ValueError(
            f"updates: {name} are {numbers.dtype} of shape {tuple(numbers.shape)}; this step takes {kind} of {shape}, "
            "contiguous"
        )
    return numbers.data_ptr()
