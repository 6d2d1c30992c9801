"""The table of active rows: compiled code and arrays enter the same, and both what lists of each row would hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluid_model import Request
from fluid_model.engine import rows as rows_module
from fluid_model.engine.records import Kind
from fluid_model.engine.rows import Rows
from fluid_model.engine.strategy import Feed, OneEach, RejectedDraft, RowUpdate, Updates
from fluid_model.forward import compiled

KNOWN = 6
"""Tokens of which is known whether they end an answer; 6 and 7 are beyond."""
LIMIT = 8
"""Tokens of an answer at most. Nothing cuts answers here, so some grow beyond it."""

integers = st.integers(0, 7)


@st.composite
def row_update(draw: st.DrawFn) -> RowUpdate:
    tokens = draw(st.lists(integers, max_size=3))
    missed = draw(st.lists(integers, max_size=3))
    return RowUpdate(
        tokens, [draw(st.integers(0, 2)) for _ in tokens], range(draw(st.integers(0, 3))),
        stride=draw(st.none() | st.integers(1, 9)),
        rejected=RejectedDraft(draw(st.integers(0, 3)), missed) if missed else None,
        expected=draw(st.floats(0, 9)), dropped=draw(st.integers(0, 2)),
    )  # fmt: skip


@dataclass
class _Answer:
    """One row by lists."""

    ids: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    steps: list[tuple[int, int, float]] = field(default_factory=list)
    rejected: list[tuple[int, int, list[int]]] = field(default_factory=list)
    forwards: int = 0
    slots: int = 0
    cached: int = 0

    def extend(self, update: RowUpdate, slots: int) -> None:
        self.forwards, self.slots = self.forwards + 1, self.slots + slots
        self.cached += len(update.cached) - update.dropped
        if update.rejected:
            place = update.rejected.place
            age = update.ages[place] if place < len(update.ages) else 0
            self.rejected.append((self.forwards - age, len(self.ids) + place, update.rejected.ids))
        self.ids += update.tokens
        self.written += [self.forwards - age for age in update.ages]
        if update.stride:
            self.steps.append((update.stride, len(update.tokens), round(update.expected, 3)))


def state(rows: Rows, row: int) -> tuple[Any, ...]:
    trace = rows.trace(row)
    steps = list(zip(trace.predicted, trace.accepted, trace.expected, strict=True))
    return rows.latest(row, 0), trace.written, steps, trace.rejected, trace.forwards, trace.slots, int(rows.cached[row])


def expected_ends(answer: _Answer, tokens: list[int], harmless: np.ndarray) -> list[list[int]]:
    """Places where an answer may end that has grown by these tokens."""
    behind = [-1, *answer.ids][len(answer.ids) - len(tokens) :]
    ends = [list(pair) for pair in zip(behind, tokens, strict=False) if pair[1] >= KNOWN or not harmless[pair[1]]]
    return ends + [[-1, -1]] * (len(answer.ids) >= LIMIT)


@pytest.mark.parametrize("by", ["compiled", "arrays"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_hold_what_lists_of_each_would(by, data):
    """Rows are added, extended and removed, each update as it comes; lists grow beyond their first room."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "ROOM", 4)
        rows, answers = Rows(4), list[_Answer]()
    if by == "arrays":
        rows._library = None
    elif rows._library is None:
        pytest.skip(f"no compiled code: {compiled.why_not(4)}")
    harmless = np.array(data.draw(st.lists(st.booleans(), min_size=KNOWN, max_size=KNOWN)))
    for _ in range(data.draw(st.integers(1, 8))):
        # 1) rows come
        if len(rows) < 4 and data.draw(st.booleans()):
            count = data.draw(st.integers(1, 4 - len(rows)))
            rows.add([Request("x", (1,), LIMIT)] * count, 5)
            answers += [_Answer(cached=5, slots=5) for _ in range(count)]
        if not answers:
            continue
        # 2) a forward, of some rows
        at = slice(data.draw(st.integers(0, len(answers) - 1)), len(answers))
        if data.draw(st.booleans()):
            one = OneEach(torch.tensor([data.draw(integers) for _ in answers[at]]), data.draw(st.integers(0, 1)), 1)
            updates: Updates | OneEach = one
            each = [RowUpdate([token], [0], range(one.kept), one.stride) for token in one.tokens.tolist()]
            widths, kinds = [1] * len(each), ["commit"] * len(each)
        else:
            each = [data.draw(row_update()) for _ in answers[at]]
            updates = Updates.of(each)
            widths = [data.draw(st.integers(1, 5)) for _ in each]
            kinds = [data.draw(st.sampled_from(["round", "denoise"])) for _ in each]
        typed: list[Kind] = kinds  # type: ignore[assignment]
        ends = rows.extend(at, updates, Feed(torch.zeros(len(each), max(widths)), widths, typed), 0.5, harmless)
        for answer, update, width in zip(answers[at], each, widths, strict=True):
            answer.extend(update, width)
        # 3) both are the same
        for number, (answer, update) in enumerate(zip(answers[at], each, strict=True)):
            assert [end for row, *end in ends if row == number] == expected_ends(answer, update.tokens, harmless)
        for row, answer in enumerate(answers):
            ids, written, steps, rejected, forwards, slots, cached = state(rows, row)
            assert (ids, written, steps, slots, cached) == (
                answer.ids, answer.written, answer.steps, answer.slots, answer.cached,
            )  # fmt: skip
            assert sum(forwards.values()) == answer.forwards
            inside = [(f, place, ids) for f, place, ids in answer.rejected if place <= len(answer.ids)]
            assert rejected == [(f, place, ids[: LIMIT - place]) for f, place, ids in inside if place < LIMIT]
        # 4) a row goes
        if data.draw(st.booleans()):
            row = data.draw(st.integers(0, len(answers) - 1))
            rows.remove(row)
            last = answers.pop()
            if row < len(answers):
                answers[row] = last


def test_updates_of_another_shape_are_refused():
    """A decoder of one's own may return them; compiled code would read past their end."""
    rows, harmless = Rows(2), np.zeros(KNOWN, bool)
    at = rows.add([Request("x", (1,), LIMIT)] * 2, 0)
    if rows._library is None:
        pytest.skip(f"no compiled code: {compiled.why_not(4)}")
    fine = Updates.of([RowUpdate([3, 4], [0, 0], ()), RowUpdate([5], [0], ())])
    wrong: list[Updates | OneEach] = [
        OneEach(torch.tensor([3]), 0, 0), OneEach(torch.tensor([3, 4], dtype=torch.int32), 0, 0),
        replace(fine, tokens=fine.tokens.T.contiguous().T), replace(fine, lengths=fine.lengths[:1]),
        replace(fine, ages=fine.tokens[:, :1]), replace(fine, expected=torch.ones(2)),
        Updates.of([RowUpdate([3, 4], [0], ()), RowUpdate([], [], ())]), Updates.of([RowUpdate([3], [0], ())]),
    ]  # fmt: skip
    for updates in wrong:
        with pytest.raises(ValueError, match="updates: "):
            rows.extend(at, updates, None, 0.0, harmless)
    assert rows.extend(at, fine, None, 0.0, harmless) == [[0, -1, 3], [0, 3, 4], [1, -1, 5]]
