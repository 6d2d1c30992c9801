"""The drafts of all rows: laid out for a forward, verified by its predictions, and grown anew.

Two of a kind. `DraftRows` goes row by row, as `draft_tree`, `verification` and `draft_policy` say it for one. A step of
many rows spends more time there than a small model spends on its forward, so `compiled_drafts` does the same in one
call where there is a compiler.

Legend: n rows, S slots of the widest, N nodes and M mask-block slots of all rows, C candidates, K widest stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine.strategy import RejectedDraft, RowUpdate, Updates
from .draft_policy import confident_draft, costed_draft
from .draft_tree import Candidate, Draft, DraftTree
from .verification import rejected_draft, verify_path


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Bounds of every draft. min_stride: as many tokens are drafted even where the K-head predicts fewer.
    max_stride: K.  max_slots: nodes and mask-block slots of one row.  candidates: C, of each mask-block slot.
    """

    min_stride: int
    max_stride: int
    max_slots: int
    candidates: int


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """The drafts of some rows side by side, on the host.

    numbers: (4 n S + N + M,) long: ids, enter, exit and offsets of the slots, see `draft_tree`, (n, S) each; then where
    the slots without padding stand in (n S): the nodes of all rows, then the mask blocks of all rows.
    nodes, widths: (n,) each, nodes and slots of each row.  width: S.  total_nodes, total_slots: N, N + M.
    """

    numbers: Tensor
    nodes: np.ndarray
    widths: np.ndarray
    width: int
    total_nodes: int
    total_slots: int

    @property
    def first_fed(self) -> int:
        """Where in `numbers` the places of slots without padding begin."""
        return 4 * len(self.nodes) * self.width

    def slots(self, numbers: Tensor) -> Tensor:
        """(4, n, S) of `numbers`, wherever they are."""
        return numbers[: self.first_fed].view(4, len(self.nodes), self.width)

    def fed(self, numbers: Tensor) -> Tensor:
        """(N + M,) of `numbers`, wherever they are."""
        return numbers[self.first_fed :]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The model's output at the slots of some rows, on the host.

    tokens: (N,) of each node of the draft trees, the causal model's choice of the next token.
    strides: (N,) of each node, the stride that the K-head predicts from there.
    candidates, probabilities: (M, C) each, of each slot of the mask blocks, in feeding order; the likeliest first.
    """

    tokens: Tensor
    strides: Tensor
    candidates: Tensor
    probabilities: Tensor


class Drafts(Protocol):
    """The drafts of the rows of a batch."""

    def restart(self, row: int, token: int, masks: int) -> None:
        """A row is one token, and a mask block behind it."""

    def roots(self, rows: int) -> list[int]:
        """The first tokens of rows 0.., which are committed already."""

    def move(self, source: int, target: int) -> None:
        """Copy one row's draft over another's."""

    def lay_out(self, start: int, rows: int, mask_id: int, width: int | None = None) -> DraftLayout:
        """Rows start.., padded to the widest of them, or to `width` slots."""

    def advance(
        self, start: int, predicted: Predictions, window_left: Sequence[int], costs: np.ndarray, rates: np.ndarray
    ) -> Updates:
        """Verify the drafts of rows start.., and grow those of the next step.

        costs, rates: (n,) each, the marginal cost of a slot and the acceptance rate, see `draft_policy`.
        """


class DraftRows:
    """Row by row, in Python. Drafts may be committed without verification, too."""

    def __init__(self, rows: int, limits: DraftLimits) -> None:
        self.drafts = [Draft(DraftTree(), [])] * rows
        self._limits = limits

    def restart(self, row: int, token: int, masks: int) -> None:
        self.drafts[row] = Draft(DraftTree.chain([token]), [masks])

    def roots(self, rows: int) -> list[int]:
        return [draft.tree.tokens[0] for draft in self.drafts[:rows]]

    def move(self, source: int, target: int) -> None:
        self.drafts[target] = self.drafts[source]

    def lay_out(self, start: int, rows: int, mask_id: int, width: int | None = None) -> DraftLayout:
        drafts = self.drafts[start : start + rows]
        widths, nodes = [draft.slots for draft in drafts], [len(draft.masks) for draft in drafts]
        width = width or max(widths)
        slots = np.array([draft.layout(mask_id, width) for draft in drafts]).swapaxes(0, 1)  # (4, n, S)
        fed: list[int] = []
        for row, count in enumerate(nodes):
            fed += range(row * width, row * width + count)
        for row, (count, end) in enumerate(zip(nodes, widths, strict=True)):
            fed += range(row * width + count, row * width + end)
        numbers = torch.from_numpy(np.append(slots, fed))
        return DraftLayout(numbers, np.array(nodes), np.array(widths), width, sum(nodes), sum(widths))

    def advance(
        self, start: int, predicted: Predictions, window_left: Sequence[int], costs: np.ndarray, rates: np.ndarray
    ) -> Updates:
        updates = []
        views = self._views(start, predicted, len(window_left))
        each = zip(views, window_left, costs.tolist(), rates.tolist(), strict=True)
        for row, (view, left, cost, rate) in enumerate(each, start):
            tree = view.draft.tree
            # 1) verify: draft tokens along one path are accepted, all others rejected
            path = verify_path(tree, view.tokens)
            # 2) commit: the accepted draft tokens, and the model's choice behind them, the bonus token
            tokens = [tree.tokens[node] for node in path[1:]]
            tokens.append(view.tokens[path[-1]])
            # 3) draft: from the mask block anchored at the last accepted node
            candidates = view.behind(path[-1], left - len(path), self._limits)
            masks, slots = self._limits.max_stride - 1, self._limits.max_slots
            self.drafts[row] = costed_draft(tokens[-1], candidates, rate, cost, masks, slots)
            greedy, expected = tree.greedy_path, sum(tree.path_probabilities)
            rejected = rejected_draft(tree, greedy, path)
            updates.append(RowUpdate(tokens, [0] * len(tokens), path, len(greedy), rejected, expected=expected))
        return Updates.of(updates)

    def commit_confident(
        self, start: int, predicted: Predictions, window_left: Sequence[int], confidence: float
    ) -> Updates:
        """Commit the tokens behind each row's chain at once, as far as they are more probable than `confidence`. The
        chain was committed when it was drafted; the forward has cached it.
        """
        updates = []
        views = self._views(start, predicted, len(window_left))
        for row, (view, left) in enumerate(zip(views, window_left, strict=True), start):
            last = len(view.draft.masks) - 1
            candidates = view.behind(last, left - last - 1, self._limits)
            draft, dropped = confident_draft(view.tokens[last], candidates, confidence, self._limits.max_stride - 1)
            self.drafts[row] = draft
            tokens = list(draft.tree.tokens)
            rejected = RejectedDraft(len(tokens), dropped) if dropped else None
            updates.append(RowUpdate(tokens, [0] * len(tokens), range(last + 1), len(tokens), rejected))
        return Updates.of(updates)

    def _views(self, start: int, predicted: Predictions, rows: int) -> list[_RowView]:
        tokens, strides = predicted.tokens.tolist(), predicted.strides.tolist()
        candidates, probabilities = predicted.candidates.tolist(), predicted.probabilities.tolist()
        views, node, mask = [], 0, 0
        for draft in self.drafts[start : start + rows]:
            at_nodes = slice(node, node + len(draft.masks))
            at_masks = slice(mask, mask + draft.slots - len(draft.masks))
            views.append(
                _RowView(draft, tokens[at_nodes], strides[at_nodes], candidates[at_masks], probabilities[at_masks])
            )
            node, mask = at_nodes.stop, at_masks.stop
        return views


@dataclass(frozen=True, slots=True)
class _RowView:
    """One row's draft, and its part of the predictions."""

    draft: Draft
    tokens: list[int]
    strides: list[int]
    candidates: list[list[int]]
    probabilities: list[list[float]]

    def behind(self, node: int, left: int, limits: DraftLimits) -> list[list[Candidate]]:
        """Candidates for each depth behind the bonus token, which follows `node`: those of the mask block anchored
        there, as far as the K-head's stride and the context window reach.  left: positions in the window, the bonus
        token's included.
        """
        stride = max(self.strides[node], limits.min_stride)
        stride = min(stride, limits.max_stride, max(left, 1), self.draft.masks[node] + 1)
        first = sum(self.draft.masks[:node])  # mask blocks of earlier nodes
        ranked = zip(self.candidates[first:], self.probabilities[first:], strict=True)
        return [list(zip(*pair, strict=True)) for pair, _ in zip(ranked, range(stride - 1), strict=False)]
