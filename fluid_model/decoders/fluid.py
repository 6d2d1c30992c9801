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

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..engine.records import DraftPolicy, Request
from ..engine.strategy import Feed, OneEach, Updates
from ..forward import compiled
from ..forward.attention_masks import AttentionIntervals
from ..forward.backbone import Backbone
from ..forward.khead import KHead
from ..settings import ArSettings, FluidSettings
from .ar import ArStrategy
from .compiled_drafts import open_drafts
from .draft_policy import MAX_SLOTS, StepStatistics, mask_blocks
from .draft_rows import DraftLayout, DraftLimits, DraftRows, Predictions
from .drafting_rates import DraftingRates, rates_of
from .fluid_reference import FluidReferenceStrategy
from .sampling import choose, rank

LOOK_EVERY = 32
"""Steps between looks at the rows' lengths, while none is admitted."""


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
        sampling = ArSettings(settings.temperature, settings.top_p)
        self._plain = ArStrategy(backbone, sampling, stride=1, ahead=2 * self.max_stride)
        self._drafting = True
        self._rate: float | None = None  # tokens a second of one row, by the rates
        self._switched = False  # since the latest step was planned: it is like no other
        self._layout: DraftLayout | None = None  # of the next forward

    def allocate(self, rows: int) -> None:
        self._batch_rows = rows
        self.max_slots = max(2 * self.max_stride, min(self._slot_budget // rows, MAX_SLOTS))
        limits = DraftLimits(self.settings.min_horizon, self.max_stride, self.max_slots, self._candidates)
        self._drafts = open_drafts(rows, limits, verify=self.settings.verify)
        self._statistics, self._prior = StepStatistics(rows), StepStatistics(1)
        self._plain.allocate(rows)
        self._draws = self._plain.draws
        self._active, self._context = rows, 0.0  # cached tokens of a row, on average, when they were last looked at
        self._look_in = 0  # steps
        self._untimed = 0  # plain steps to come that nobody asks about: a small model's would feel it
        if self._rates is not None:
            self._row_rates = self._rates.of(rows, self._context)
            self._drafting = self._row_rates.drafts

    @property
    def prompt_mask_block(self) -> tuple[int, ...]:
        return (self.mask_id,) * self._first_masks(self._prior, slice(1))[0] if self._drafting else ()

    @property
    def draft_policy(self) -> DraftPolicy | None:
        if not self.settings.verify:
            return None
        if self._rates is None:
            return DraftPolicy(self._slot_budget, self._batch_rows)
        return DraftPolicy(None, self._batch_rows, self._row_rates.drafts, *self._row_rates.decided_by)

    def admit(
        self, start: int, requests: list[Request], hidden: Tensor | None, window_left: list[int]
    ) -> Updates | OneEach:
        """hidden: (R, 1 + M, D) at the prompt's last token, the root of a tree of one node, and its mask block."""
        assert hidden is not None
        rows = slice(start, start + len(requests))
        self._statistics.restart(rows)
        self._time_again()
        self._look_in = 0
        if start == 0:
            self._context = self._mean_context(window_left)
        if not self._drafting:
            return self._plain.admit(start, requests, hidden, window_left)
        for row, request in enumerate(requests, start):
            self._drafts.restart(row, request.prompt[-1], hidden.shape[1] - 1)
            self._draws.seed(row, request.seed)
        layout = self._drafts.lay_out(start, len(requests), self.mask_id, hidden.shape[1])
        updates = self._advance(rows, self._predict(start, layout, hidden), window_left)
        updates.kept, updates.moves = torch.zeros_like(updates.kept), ()  # the prompts are cached
        if self.settings.verify:
            updates.strides = updates.rejected = None  # it completes no step
        return updates

    def plan(self, rows: int) -> Feed:
        """The drafts of all rows, side by side; or their bonus tokens alone, where drafts do not pay."""
        if self._untimed and rows == self._active:
            return self._plain.plan(rows)
        self._time_again()
        self._started = time.perf_counter()
        if self._rates is not None:
            if rows != self._active:
                self._active, self._row_rates = rows, self._rates.of(rows, self._context)
            wanted = self._row_rates.drafts
            if wanted or self._drafting:
                self._follow(rows, drafts=wanted)
        if not self._drafting:
            return self._plain.plan(rows)
        layout = self._layout = self._drafts.lay_out(0, rows, self.mask_id)
        self._numbers = layout.numbers.to(self.backbone.device)
        ids, *intervals = layout.slots(self._numbers)  # (n, S) each
        self._laid_out = time.perf_counter()
        return Feed(ids, layout.widths, kinds=["round"] * rows, intervals=AttentionIntervals(*intervals))

    def absorb(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> Updates | OneEach:
        if self._untimed:
            self._untimed -= 1
            return self._plain.absorb(feed, hidden, window_left)
        updates = (self._absorb_drafts if self._drafting else self._plain.absorb)(feed, hidden, window_left)
        if self._rates is not None:
            self._look_in -= 1
            if self._look_in < 0:
                self._look(window_left)
            if not self._switched:
                tokens = 1.0 if isinstance(updates, OneEach) else float(updates.lengths.numpy().mean())
                self._row_rates.add(time.perf_counter() - self._started, tokens)
            if not self._drafting:
                self._untimed = min(self._row_rates.untimed, max(0, self._look_in))
                self._row_rates.left -= self._untimed
                self._look_in -= self._untimed
        self._switched = False
        return updates

    def _time_again(self) -> None:
        """Steps are timed from here on."""
        if self._untimed:
            self._row_rates.left += self._untimed
            self._look_in += self._untimed
            self._untimed = 0

    def _absorb_drafts(self, feed: Feed, hidden: Tensor, window_left: list[int]) -> Updates:
        assert self._layout is not None
        predicted, rows = self._predict(0, self._layout, hidden), slice(0, len(window_left))
        if self._rates is not None and hidden.device.type == "cpu":  # elsewhere the device still works
            seconds = time.perf_counter() - self._laid_out
            self.backbone.forward_time.observe(feed.ids.numel(), seconds, self._context)
        self._statistics.steps[rows] += 1
        self._statistics.fed[rows] += feed.widths
        updates = self._advance(rows, predicted, window_left)
        # behind the drafts, which are sized by the tokens of earlier steps
        self._statistics.committed[rows] += updates.lengths.numpy()
        return updates

    def _advance(self, rows: slice, predicted: Predictions, window_left: list[int]) -> Updates:
        """Commit what the predictions bring, and draft the next step."""
        if self.settings.verify:
            costs, rates = self._costs(self._statistics, rows), self._statistics.acceptance_rates(rows)
            updates = self._drafts.advance(rows.start, predicted, window_left, costs, rates)
        else:
            assert isinstance(self._drafts, DraftRows)
            confidence = self.settings.confidence
            updates = self._drafts.commit_confident(rows.start, predicted, window_left, confidence)
        if self.settings.temperature > 0:
            self._draws.advance(rows, updates.lengths.numpy())
        return updates

    def move(self, source: int, target: int) -> None:
        if self._drafting:
            self._drafts.move(source, target)
        self._statistics.move(source, target)
        self._plain.move(source, target)  # and the random numbers

    def _mean_context(self, window_left: list[int]) -> float:
        """Cached tokens of a row."""
        return self.backbone.window - sum(window_left) / len(window_left)

    def _look(self, window_left: list[int]) -> None:
        """Take the rates of the length that the rows have by now. Seldom: small models' plain steps would feel it."""
        assert self._rates is not None
        self._look_in, self._context = LOOK_EVERY, self._mean_context(window_left)
        rates = self._rates.of(self._active, self._context)
        if rates is not self._row_rates:
            self._row_rates, self._switched = rates, True

    def _follow(self, rows: int, *, drafts: bool) -> None:
        """Take the kind of step that the rates ask for."""
        self._rate = self._row_rates.best
        if drafts and not self._drafting and not any(self._first_masks(self._statistics, slice(rows))):
            self._row_rates.decline()
        elif drafts != self._drafting:
            self._switch(rows)

    def _switch(self, rows: int) -> None:
        """From steps with drafts to plain ones, or back. A row is then its bonus token alone; pending drafts lapse."""
        self._drafting, self._switched = not self._drafting, True
        if not self._drafting:
            self._plain.latest[:rows] = torch.tensor(self._drafts.roots(rows), device=self.backbone.device)
            return
        masks = self._first_masks(self._statistics, slice(rows))
        for row, token in enumerate(self._plain.latest[:rows].tolist()):
            self._drafts.restart(row, token, masks[row])

    def _first_masks(self, statistics: StepStatistics, rows: slice) -> list[int]:
        """Size of the mask block behind a token that no draft follows, of each row."""
        widest, rates = self.max_stride - 1, statistics.acceptance_rates(rows).tolist()
        if not self.settings.verify:
            return [widest] * len(rates)
        costs = self._costs(statistics, rows).tolist()
        pairs = zip(rates, costs, strict=True)
        return [mask_blocks([1.0], rate, cost, widest, widest)[0] for rate, cost in pairs]

    def _costs(self, statistics: StepStatistics, rows: slice) -> np.ndarray:
        """Marginal costs of a slot, in tokens, of each row."""
        if self._rates is None:
            return statistics.marginal_costs(rows, self._slot_budget, self._batch_rows)
        cost = statistics.timed_cost(rows, self.backbone.forward_time, self._active, self._context, self._rate)
        return np.full(len(statistics.steps[rows]), cost)

    def _predict(self, start: int, layout: DraftLayout, hidden: Tensor) -> Predictions:
        """The predictions of the slots of rows start.., with one transfer to the host.  hidden: (n, S, D)."""
        # 1) hidden states without padding: the nodes of all rows, then the mask blocks of all rows
        total_nodes, hidden = layout.total_nodes, self._without_padding(layout, hidden)  # (N + M, D)

        # 2) tokens at nodes, candidates at masks, strides at nodes
        logits = self.backbone.logits(hidden)  # (N + M, V)
        if self.settings.temperature == 0:
            count = min(self._candidates, logits.shape[-1])  # C
            tokens, candidates, probabilities = rank(logits, total_nodes, count)  # (N,), (M, C), (M, C)
        else:
            draws, temperature = self._draws_of(start, layout), self.settings.temperature
            chosen, probability = choose(logits, draws, temperature, self.settings.top_p, "probability")
            tokens = chosen[:total_nodes]
            candidates, probabilities = chosen[total_nodes:, None], probability[total_nodes:, None]  # (M, 1)
        strides = self.head.stride(hidden[:total_nodes]).to(tokens.device)  # (N,)

        # 3) to the host
        tables = tokens, strides, candidates, probabilities
        return Predictions(*(tables if hidden.device.type == "cpu" else _to_host(tables)))

    def _without_padding(self, layout: DraftLayout, hidden: Tensor) -> Tensor:
        """(n, S, D) -> (N + M, D), in the order of `_predict`."""
        if len(layout.nodes) == 1 and layout.total_slots == hidden.shape[1]:
            return hidden[0]
        selected = compiled.select(hidden, layout.numbers, layout.first_fed)
        if selected is not None:
            return selected
        numbers = self._numbers if layout is self._layout else layout.numbers.to(hidden.device)
        return hidden.flatten(0, 1).index_select(0, layout.fed(numbers))

    def _draws_of(self, start: int, layout: DraftLayout) -> Tensor:
        """The random number of the place that each slot predicts, (N + M,) in the order of `_predict`.

        Places count from the first that is not committed. With verification the root predicts that place; an unverified
        chain is committed, so there its last node does.
        """
        rows = len(layout.nodes)
        ahead = self._draws.peek(slice(start, start + rows), 2 * self.max_stride)  # (n, 2 K)
        *_, offsets = layout.slots(layout.numbers)  # (n, S)
        committed = [0 if self.settings.verify else nodes - 1 for nodes in layout.nodes]
        places = (offsets - torch.tensor(committed)[:, None]).clamp(min=0)
        numbers = ahead.gather(1, places).flatten()  # (n S,)
        return numbers[layout.fed(layout.numbers)].to(self.backbone.device)


def _to_host(tables: Sequence[Tensor]) -> list[Tensor]:
    """Tables on the host, in one transfer: float32 numbers go as the integers of the same bits."""
    integers = [table.view(torch.int32) if table.is_floating_point() else table for table in tables]
    together = torch.cat([table.flatten() for table in integers]).cpu()
    here, first = [], 0
    for table, integer in zip(tables, integers, strict=True):
        part = together[first : first + table.numel()].to(integer.dtype)
        here.append(part.view(table.shape).view(table.dtype))
        first += table.numel()
    return here


def open_strategy(checkpoint: Checkpoint, settings: FluidSettings) -> FluidStrategy | FluidReferenceStrategy:
    """The strategy of these settings, by `rounds`."""
    assert checkpoint.head is not None
    assert checkpoint.mask_id is not None
    strategy = FluidStrategy if settings.rounds == "one" else FluidReferenceStrategy
    return strategy(checkpoint.backbone, checkpoint.head, checkpoint.mask_id, settings)
