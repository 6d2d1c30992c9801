"""The drafts of all rows by compiled code: one call lays them out, one verifies them and grows those of the next step.

It computes what `draft_rows.DraftRows` computes, number by number. Legend: see there; B rows of the batch, W slots of a
row at most.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from ..engine.strategy import RejectedDrafts, Updates
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
        self._sizes = np.zeros(3, np.int64)
        self._stride = limits.max_stride

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
        self._library.measure_drafts(self._struct, start, rows, self._sizes.ctypes.data)
        widest, total_nodes, total_slots = self._sizes.tolist()
        width = width or widest
        numbers = torch.empty(4 * rows * width + total_slots, dtype=torch.long)
        self._library.lay_out_drafts(self._struct, start, rows, width, mask_id, numbers.data_ptr())
        nodes, widths = (self._arrays[name][start : start + rows].copy() for name in ("nodes", "slots"))
        return DraftLayout(numbers, nodes, widths, width, total_nodes, total_slots)

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
        tokens, rejected = torch.zeros(2, rows, self._stride, dtype=torch.long)
        counts, expected = torch.empty(4, rows, dtype=torch.long), torch.empty(rows, dtype=torch.double)
        moves = torch.empty(rows * self._stride, 3, dtype=torch.long)
        # 2) all rows
        addresses = [tensor.data_ptr() for tensor in (*tables, tokens, rejected, counts, expected, moves)]
        moved = self._library.advance_drafts(self._struct, start, rows, *addresses)
        # 3) out
        lengths, strides, places, missed = counts
        return Updates(
            tokens, lengths, kept=lengths, moves=moves[:moved].tolist() if moved else (), strides=strides,
            rejected=RejectedDrafts(places, missed, rejected), expected=expected,
        )  # fmt: skip
