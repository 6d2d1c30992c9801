"""The drafts of all rows by compiled code: one call lays them out, one verifies them and grows those of the next step.

It computes what `draft_rows.DraftRows` computes, number by number. Legend: see there; B rows of the batch, W slots of a
row at most.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from ..engine.strategy import RejectedDraft, Updates
from ..forward.compiled import build, structs
from .draft_policy import MIN_COST
from .draft_rows import DraftLayout, DraftLimits, DraftRows, Drafts, Predictions


def open_drafts(rows: int, limits: DraftLimits, *, verify: bool) -> Drafts:
    """The drafts of a batch: compiled where there is a compiler and they are verified, else in Python."""
    library = build.library(build.native_lanes()) if verify else None
    return DraftRows(rows, limits) if library is None else CompiledDrafts(rows, limits, library)


class CompiledDrafts:
    """All rows in one call."""

    def __init__(self, rows: int, limits: DraftLimits, library: ctypes.CDLL) -> None:
        self._library, shape = library, (rows, limits.max_slots)
        # Every level of a tree has as many nodes of MIN_COST as there are in 1, and as candidates allow.
        levels = range(1, limits.max_stride)
        room = 1 + sum(min(limits.candidates**level, int(1 / MIN_COST) + 1) for level in levels)
        self._arrays = arrays = {
            **{name: np.zeros(shape, np.int64) for name in ("tokens", "parents", "depths", "masks")},
            **{name: np.zeros(rows, np.int64) for name in ("nodes", "slots", "window_left")},
            **{name: np.zeros(rows) for name in ("costs", "rates")},
            "reached": np.zeros(shape),
            "scratch": np.empty((4, room), np.int64),
            "scratch_reached": np.empty((2, room)),
        }
        self._struct = structs.DraftTable(
            min_stride=limits.min_stride, max_stride=limits.max_stride, max_slots=limits.max_slots,
            candidates=limits.candidates, room=room, **{name: array.ctypes.data for name, array in arrays.items()},
        )  # fmt: skip
        self._counts, self._expected = torch.empty(5 * rows, dtype=torch.long), torch.empty(rows, dtype=torch.double)
        self._lists = torch.empty(rows * 3 * limits.max_stride, dtype=torch.long)

    def restart(self, row: int, token: int, masks: int) -> None:
        chain = {"tokens": token, "parents": -1, "depths": 0, "reached": 1.0, "masks": masks}
        for name, value in chain.items():
            self._arrays[name][row, 0] = value
        self._arrays["nodes"][row], self._arrays["slots"][row] = 1, 1 + masks

    def roots(self, rows: int) -> list[int]:
        tokens: list[int] = self._arrays["tokens"][:rows, 0].tolist()
        return tokens

    def move(self, source: int, target: int) -> None:
        for name in ("tokens", "parents", "depths", "masks", "reached", "nodes", "slots"):
            self._arrays[name][target] = self._arrays[name][source]

    def lay_out(self, start: int, rows: int, mask_id: int, width: int | None = None) -> DraftLayout:
        nodes, widths = (self._arrays[name][start : start + rows].tolist() for name in ("nodes", "slots"))
        width = width or max(widths)
        numbers = torch.empty(4 * rows * width + sum(widths), dtype=torch.long)
        self._library.lay_out_drafts(self._struct, start, rows, width, mask_id, numbers.data_ptr())
        return DraftLayout(numbers, nodes, widths, width)

    def advance(
        self, start: int, predicted: Predictions, window_left: Sequence[int], costs: np.ndarray, rates: np.ndarray
    ) -> Updates:
        # 1) in
        rows = len(window_left)
        for name, values in (("window_left", window_left), ("costs", costs), ("rates", rates)):
            self._arrays[name][:rows] = values
        self._struct.candidates = predicted.candidates.shape[1]  # fewer in a small vocabulary
        tables = [predicted.tokens, predicted.strides, predicted.candidates, predicted.probabilities]
        tables = [table.contiguous() for table in tables]
        results = self._counts, self._expected, self._lists
        # 2) all rows
        addresses = [tensor.data_ptr() for tensor in (*tables, *results)]
        total = self._library.advance_drafts(self._struct, start, rows, *addresses)
        # 3) out
        lists, counts = self._lists[:total].tolist(), self._counts[: 5 * rows].view(5, rows).tolist()
        firsts, lengths, strides, places, missed = counts
        tokens = [lists[at : at + length] for at, length in zip(firsts, lengths, strict=True)]
        cached = [lists[at + length : at + 2 * length] for at, length in zip(firsts, lengths, strict=True)]
        behind = zip(firsts, lengths, places, missed, strict=True)
        rejected = [
            RejectedDraft(place, lists[at + 2 * length : at + 2 * length + count]) if count else None
            for at, length, place, count in behind
        ]
        expected = self._expected[:rows].numpy().round(3).tolist()  # it is stored
        return Updates(tokens, cached, strides=strides, rejected=rejected, expected=expected)
