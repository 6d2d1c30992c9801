"""FLUID as speculative decoding with one forward a step: it verifies a draft tree and drafts the next.  (FLUID, arXiv
2605.27387; speculative sampling, Leviathan et al. 2023; tree attention, SpecInfer, Miao et al. 2023)

The model is its own draft model. A step feeds the bonus token, a draft tree behind it, and mask blocks anchored at
nodes where the accepted path may end (`draft_tree` shows them). From the hidden states of that one forward:

    1) verify    the causal logits at the nodes decide which draft tokens are accepted    `verification`
    2) commit    the accepted path is cached already; the token behind it is the bonus token of the next step
    3) draft     the mask block anchored at the path's last node proposes the next tree   `draft_policy`

The mask blocks have the layout that FLUID is trained in (see `train.row_layouts`). Verified text is that of AR under
the same weights, sampled text included. Without verification the draft is a chain, committed as it is drafted up to the
first token below the confidence threshold: the paper's parallel pass.

Unless a slot budget is set, drafts follow measured time: a slot is fed where the time it adds would bring fewer tokens
elsewhere (`forward_time`), and where steps with drafts write fewer tokens a second than steps without, the bonus token
alone is fed, as AR feeds it (`drafting_rates`).

Legend: n active rows, R rows just admitted, S slots fed, N nodes and M mask-block slots of all rows, C candidates, K
widest stride, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..engine.records import DraftPolicy, Request
from ..engine.strategy import NOTHING, Feed, RejectedDraft, RowUpdate, Updates
from ..forward.attention_masks import AttentionIntervals
from ..forward.backbone import Backbone
from ..forward.khead import KHead
from ..settings import ArSettings, FluidSettings
from .ar import ArStrategy
from .draft_policy import MAX_SLOTS, StepStatistics, confident_draft, costed_draft, mask_blocks
from .draft_tree import Candidate, Draft, DraftTree
from .drafting_rates import DraftingRates, rates_of
from .fluid_reference import FluidReferenceStrategy
from .sampling import argmax, choose, top_k
from .verification import Predictions, rejected_draft, verify_path


class FluidStrategy:
    """State of a row: its draft, which the next forward feeds, and the statistics of its steps."""

    prefills_prompt = True

    def __init__(self, backbone: Backbone, head: KHead, mask_id: int, settings: FluidSettings) -> None:
        self.backbone = backbone
        self.head = head
        self.mask_id = mask_id
        self.settings = settings
        self.max_stride = min(settings.max_horizon, head.k_max)  # K
        self.max_slots = 2 * self.max_stride
        # A sampled place has one random number, hence one candidate; an unverified draft is a chain.
        self._candidates = settings.candidates if settings.verify and settings.temperature == 0 else 1
        self._slot_budget = settings.slot_budget or (backbone.slot_budget if settings.verify else 1)
        self._rates: DraftingRates | None = None  # None: drafts whatever it costs
        if settings.verify and settings.slot_budget is None:
            self._rates = rates_of(backbone, (settings, head))
        self._plain = ArStrategy(backbone, ArSettings(settings.temperature, settings.top_p), stride=1)
        self._drafting = True
        self._rate: float | None = None  # tokens a second of one row, by the rates
        self._switched = False  # since the latest step was planned: it is like no other

    def allocate(self, rows: int) -> None:
        self._batch_rows = rows
        self.max_slots = max(2 * self.max_stride, min(self._slot_budget // rows, MAX_SLOTS))
        self._drafts = [Draft(DraftTree(), [])] * rows
        self._statistics = [StepStatistics()] * rows
        self._plain.allocate(rows)
        self._draws = self._plain.draws
        self._active = rows
        if self._rates is not None:
            self._drafting = self._rates.drafts(rows)

    @property
    def prompt_mask_block(self) -> tuple[int, ...]:
        return (self.mask_id,) * self._first_masks(StepStatistics()) if self._drafting else ()

    @property
    def draft_policy(self) -> DraftPolicy | None:
        if not self.settings.verify:
            return None
        if self._rates is None:
            return DraftPolicy(self._slot_budget, self._batch_rows)
        rates = self._rates.of(self._active)
        return DraftPolicy(None, self._batch_rows, rates.drafts, rates.drafting.value, rates.plain.value)

    def admit(self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]) -> Updates:
        """hidden: (R, 1 + M, D) at the prompt's last token, the root of a tree of one node, and its mask block."""
        assert hidden is not None
        for row in range(start, start + len(requests)):
            self._statistics[row] = StepStatistics()
        if not self._drafting:
            return self._plain.admit(start, requests, hidden, window_left)
        for row, request in enumerate(requests, start):
            self._drafts[row] = Draft(DraftTree.chain(request.prompt[-1:]), [hidden.shape[1] - 1])
            self._draws.seed(row, request.seed)
        predictions = self._predict(start, hidden, self._drafts[start : start + len(requests)])
        updates = []
        for row, (predicted, left) in enumerate(zip(predictions, window_left, strict=True), start):
            if self.settings.verify:
                bonus = predicted.tokens[0]
                self._draft(row, predicted, 0, left)
                update = RowUpdate([bonus], [0], NOTHING)
            else:
                update = self._draft_and_commit(row, predicted, 0, left, NOTHING)
            self._draws.advance(row, len(update.tokens))
            updates.append(update)
        return Updates.of(updates)

    def plan(self, rows: int) -> Feed:
        """The drafts of all rows, side by side; or their bonus tokens alone, where drafts do not pay."""
        self._started, self._active = time.perf_counter(), rows
        if self._rates is not None:
            wanted = self._rates.drafts(rows)
            if wanted:
                self._rate = self._rates.of(rows).best
            if wanted and not self._drafting and not any(self._first_masks_of(rows)):
                self._rates.of(rows).decline()
            elif wanted != self._drafting:
                self._switch(rows)
        if not self._drafting:
            return self._plain.plan(rows)
        drafts = self._drafts[:rows]
        widths = [draft.slots for draft in drafts]
        width = max(widths)
        layouts = np.array([draft.layout(self.mask_id, width) for draft in drafts])  # (n, 4, S)
        ids, *intervals = torch.from_numpy(layouts).to(self.backbone.device).unbind(1)  # (n, S) each
        self._laid_out = time.perf_counter()
        return Feed(ids, widths, kinds=["round"] * rows, intervals=AttentionIntervals(*intervals))

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> Updates:
        if self._drafting:
            updates = self._absorb_drafts(feed, hidden, window_left)
        else:
            updates = self._plain.absorb(feed, hidden, window_left)
        if self._rates is not None and not self._switched:
            tokens = sum(map(len, updates.tokens))
            self._rates.add(len(feed.widths), time.perf_counter() - self._started, tokens)
        self._switched = False
        return updates

    def _absorb_drafts(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> Updates:
        predictions = self._predict(0, hidden, self._drafts[: len(window_left)])
        if self._rates is not None and hidden.device.type == "cpu":  # elsewhere the device still works
            self.backbone.forward_time.observe(feed.ids.numel(), time.perf_counter() - self._laid_out)
        step = self._verified_step if self.settings.verify else self._unverified_step
        updates = []
        for row, (predicted, left) in enumerate(zip(predictions, window_left, strict=True)):
            update = step(row, predicted, left)
            self._draws.advance(row, len(update.tokens))
            updates.append(update)
        return Updates.of(updates)

    def move(self, source: int, target: int) -> None:
        self._drafts[target], self._statistics[target] = self._drafts[source], self._statistics[source]
        self._plain.move(source, target)  # and the random numbers

    def _switch(self, rows: int) -> None:
        """From steps with drafts to plain ones, or back. A row is then its bonus token alone; pending drafts lapse."""
        self._drafting, self._switched = not self._drafting, True
        if not self._drafting:
            bonus = [draft.tree.tokens[0] for draft in self._drafts[:rows]]
            self._plain.latest[:rows] = torch.tensor(bonus, device=self.backbone.device)
            return
        masks = self._first_masks_of(rows)
        for row, token in enumerate(self._plain.latest[:rows].tolist()):
            self._drafts[row] = Draft(DraftTree.chain([token]), [masks[row]])

    def _first_masks_of(self, rows: int) -> list[int]:
        return [self._first_masks(self._statistics[row]) for row in range(rows)]

    def _first_masks(self, statistics: StepStatistics) -> int:
        """Size of the mask block behind a token that no draft follows."""
        widest = self.max_stride - 1
        if not self.settings.verify:
            return widest
        return mask_blocks([1.0], statistics.acceptance_rate, self._cost(statistics), widest, widest)[0]

    def _cost(self, statistics: StepStatistics) -> float:
        """Marginal cost of a slot, in tokens."""
        if self._rates is None:
            return statistics.marginal_cost(self._slot_budget, self._batch_rows)
        return statistics.timed_cost(self.backbone.forward_time, self._active, self._rate)

    def _verified_step(self, row: int, predicted: Predictions, left: int) -> RowUpdate:
        tree, statistics = self._drafts[row].tree, self._statistics[row]
        expected = round(sum(tree.path_probabilities), 3)  # it is stored
        # 1) verify: draft tokens along one path are accepted, all others rejected
        path = self._accepted_path(tree, predicted)
        # 2) commit: the accepted draft tokens, and the model's choice behind them, the bonus token
        tokens = [tree.tokens[node] for node in path[1:]]
        tokens.append(predicted.tokens[path[-1]])
        statistics.steps += 1
        statistics.fed += self._drafts[row].slots
        # 3) draft: from the mask block anchored at the last accepted node
        self._draft(row, predicted, path[-1], left - len(path))
        statistics.committed += len(tokens)  # behind the draft, which is sized by the tokens of earlier steps
        greedy = tree.greedy_path
        rejected = rejected_draft(tree, greedy, path)
        return RowUpdate(tokens, [0] * len(tokens), path, len(greedy), rejected, expected=expected)

    def _unverified_step(self, row: int, predicted: Predictions, left: int) -> RowUpdate:
        # The chain was committed when it was drafted. This forward has cached it.
        last = len(self._drafts[row].masks) - 1
        return self._draft_and_commit(row, predicted, last, left - last - 1, cached=range(last + 1))

    def _accepted_path(self, tree: DraftTree, predicted: Predictions) -> list[int]:
        return verify_path(tree, predicted.tokens)

    def _draft(self, row: int, predicted: Predictions, node: int, left: int) -> None:
        """Draft behind the bonus token, which follows `node`, as far as slots gain more than they cost."""
        statistics, masks = self._statistics[row], self.max_stride - 1
        cost = self._cost(statistics)
        candidates = self._candidates_behind(self._drafts[row], predicted, node, left)
        bonus = predicted.tokens[node]
        self._drafts[row] = costed_draft(bonus, candidates, statistics, cost, masks, self.max_slots)

    def _draft_and_commit(
        self, row: int, predicted: Predictions, node: int, left: int, cached: Sequence[int]
    ) -> RowUpdate:
        """Draft behind `node` without verification: tokens above the confidence threshold are committed at once."""
        candidates = self._candidates_behind(self._drafts[row], predicted, node, left)
        draft, dropped = confident_draft(
            predicted.tokens[node], candidates, self.settings.confidence, self.max_stride - 1
        )
        self._drafts[row] = draft
        tokens = list(draft.tree.tokens)
        rejected = RejectedDraft(len(tokens), dropped) if dropped else None
        return RowUpdate(tokens, [0] * len(tokens), cached, len(tokens), rejected)

    def _candidates_behind(self, draft: Draft, predicted: Predictions, node: int, left: int) -> list[list[Candidate]]:
        """Candidates for each depth behind the bonus token: those of the mask block anchored at `node`, as far as the
        K-head's stride and the context window reach.  left: positions in the window, the bonus token's included.
        """
        stride = max(predicted.strides[node], self.settings.min_horizon)
        stride = min(stride, self.max_stride, max(left, 1), draft.masks[node] + 1)
        first = sum(draft.masks[:node])  # mask blocks of earlier nodes
        return [predicted.candidates_of(mask) for mask in range(first, first + stride - 1)]

    def _predict(self, start: int, hidden: Tensor, drafts: Sequence[Draft]) -> list[Predictions]:
        """The predictions of the slots of rows start.., with one transfer to the host.  hidden: (n, S, D)."""
        # 1) hidden states without padding: the nodes of all rows, then the mask blocks of all rows
        slots = hidden.shape[1]
        nodes = [len(draft.masks) for draft in drafts]
        masks = [draft.slots - count for draft, count in zip(drafts, nodes, strict=True)]
        fed: list[int] = []
        for row, count in enumerate(nodes):
            fed += range(row * slots, row * slots + count)
        total_nodes = len(fed)
        for row, (count, more) in enumerate(zip(nodes, masks, strict=True)):
            fed += range(row * slots + count, row * slots + count + more)
        hidden = hidden.flatten(0, 1)  # (n S, D)
        if len(drafts) > 1 or len(fed) < slots:  # one row without padding is in this order already
            hidden = hidden.index_select(0, torch.tensor(fed, device=hidden.device))  # (N + M, D)

        # 2) tokens at nodes, candidates at masks, strides at nodes
        logits = self.backbone.logits(hidden)  # (N + M, V)
        if self.settings.temperature == 0:
            tokens = argmax(logits[:total_nodes])  # (N,)
            candidates, probabilities = top_k(logits[total_nodes:], min(self._candidates, logits.shape[-1]))  # (M, C)
        else:
            draws, temperature = self._draws_of(start, drafts), self.settings.temperature
            chosen, probability = choose(logits, draws, temperature, self.settings.top_p, "probability")
            tokens = chosen[:total_nodes]
            candidates, probabilities = chosen[total_nodes:, None], probability[total_nodes:, None]  # (M, 1)
        strides = self.head.stride(hidden[:total_nodes]).to(tokens.device)  # (N,)

        # 3) to the host, row by row
        tables = _to_host((tokens, strides, candidates, probabilities), packed=hidden.device.type != "cpu")
        predictions, node, mask = [], 0, 0
        for count, more in zip(nodes, masks, strict=True):
            at_nodes, at_masks = slice(node, node + count), slice(mask, mask + more)
            predictions.append(
                Predictions(tables[0][at_nodes], tables[1][at_nodes], tables[2][at_masks], tables[3][at_masks])
            )
            node, mask = node + count, mask + more
        return predictions

    def _draws_of(self, start: int, drafts: Sequence[Draft]) -> Tensor:
        """The random number of the place that each slot predicts, (N + M,) in the order of `_predict`.

        Places count from the first that is not committed. With verification the root predicts that place; an unverified
        chain is committed, so there its last node does.
        """
        ahead = self._draws.peek(range(start, start + len(drafts)), 2 * self.max_stride)  # (n, 2 K)
        rows, places = list[int](), list[int]()
        for row, draft in enumerate(drafts):
            first = 0 if self.settings.verify else 1 - len(draft.masks)
            rows += [row] * len(draft.masks)
            places += (max(0, first + depth) for depth in draft.tree.depths)
        for row, draft in enumerate(drafts):
            first = 1 if self.settings.verify else 2 - len(draft.masks)
            for depth, masks in zip(draft.tree.depths, draft.masks, strict=True):
                rows += [row] * masks
                places += range(first + depth, first + depth + masks)
        return ahead[torch.tensor(rows), torch.tensor(places)].to(self.backbone.device)


def _to_host(tables: Sequence[Tensor], *, packed: bool) -> list[list[Any]]:
    """Tables as lists. packed: all in one transfer, float32 numbers as the integers of the same bits."""
    if not packed:
        return [table.tolist() for table in tables]
    integers = [table.view(torch.int32) if table.is_floating_point() else table for table in tables]
    together = torch.cat([table.flatten() for table in integers]).cpu()
    lists = []
    first = 0
    for table, integer in zip(tables, integers, strict=True):
        flat = together[first : first + table.numel()].to(integer.dtype)
        lists.append(flat.view(table.shape).view(table.dtype).tolist())
        first += table.numel()
    return lists


def open_strategy(checkpoint: Checkpoint, settings: FluidSettings) -> FluidStrategy | FluidReferenceStrategy:
    """The strategy of these settings, by `rounds`."""
    assert checkpoint.head is not None
    assert checkpoint.mask_id is not None
    strategy = FluidStrategy if settings.rounds == "one" else FluidReferenceStrategy
    return strategy(checkpoint.backbone, checkpoint.head, checkpoint.mask_id, settings)
