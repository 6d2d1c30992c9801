"""Continuous batching: the loop that every decoder shares.  (Orca, Yu et al. 2022)

    waiting ──admit: prefill──▶ active rows ──step: plan, forward, absorb──▶ finished rows ──retire──▶ generations
                                     ▲                                │
                                     └────────────────────────────────┘

A batch has `slots` rows. A finished row is retired after the step that finished it, and a waiting request is admitted
in its place. Active rows are contiguous at the front of the batch and of the KV cache. One step is one forward for all
of them; no row waits for another, and no row's answer depends on the others.

Prompts with a common prefix prefill it once, into a spare row of the cache (see `shared_prefixes`).

Legend: n active rows, R rows just admitted, S slots fed, M slots of the prompt's mask block, D hidden.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..forward import compiled
from ..forward.attention_masks import AttentionPlan, prompt_with_mask_block
from ..forward.backbone import Backbone
from ..tokens import Tokenizer
from . import shared_prefixes
from .answers import AnswerRules
from .records import Generation, Request, RowForward
from .rows import Rows
from .strategy import Feed, OneEach, RowUpdate, Strategy, Updates, prompt_blocks

PREFILL_TOKENS, PREFILL_TOKENS_CPU = 4096, 128
"""Prompt tokens, padding included, of one prefill forward: enough to keep a device busy, few enough that activations
are small beside keys and values.
"""


@dataclass(frozen=True)
class _Waiting:
    """A request that waits. shared: tokens of its prompt that other prompts share."""

    request: Request
    shared: int = 0

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        return self.request.prompt[: self.shared]


class Engine:
    """Continues prompts with one strategy over one backbone, `slots` rows at a time.

    The marginal cost of a draft slot follows from the rows that the whole run would keep active (`Request.asked`), not
    from those it has left, so that an interrupted and resumed run makes the same forwards.
    `calls` counts model forwards since construction.  `watch`, if set, receives every forward of every row.
    """

    watch: Callable[[RowForward], None] | None = None

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        strategy: Strategy,
        batch_size: int = 16,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.backbone = backbone
        self.strategy = strategy
        self._blocks = prompt_blocks(strategy)
        self.batch_size = batch_size
        self.calls = 0
        self._answers = AnswerRules(tokenizer, end_ids)
        self._prefill_budget = PREFILL_TOKENS_CPU if backbone.device.type == "cpu" else PREFILL_TOKENS
        # With one captured shape, the prompts of a prefill would choose each other's kernels: each is fed by itself.
        self._prefills_alone = backbone.graphs is not None and backbone.graphs.only is not None
        self._rows = Rows(0)
        self._cached_prefix: tuple[int, ...] = ()  # in the spare row of the cache
        self._fed: Feed | None = None  # in the latest forward, until it is committed
        self._observed: list[RowForward] = []  # the same, for `watch`
        self._is_finite: Tensor | None = None  # (n,) bool of the latest forward, None if all rows are
        self._clock = 0.0

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield each answer as soon as it is finished (not in request order).

        Raises ConfigError if a prompt is empty or leaves no room for its answer.
        """
        # 1) check and order the requests
        everything = list(requests)
        if not everything:
            return
        for request in everything:
            self._check(request)
        self._answers.prepare(everything)
        waiting = self._order(everything)

        # 2) allocate rows and cache, with one spare row for a shared prefix
        rows = min(self.batch_size, len(waiting))
        asked = max(request.asked or 0 for request in everything)
        self.strategy.allocate(max(rows, min(self.batch_size, asked)))
        longest = max(len(request.prompt) + request.max_new_tokens for request in everything)
        spare = any(row.shared for row in waiting)
        self._cache = self.backbone.cache(rows + spare, longest + self.strategy.max_slots)
        self._rows, self._cached_prefix = Rows(rows), ()

        # 3) admit, step, retire
        self._clock = time.perf_counter()
        while waiting or self._rows:
            while waiting and len(self._rows) < rows:
                self._admit(waiting, rows - len(self._rows))
            yield from self._retire()
            if self._rows:
                self._decode()
                yield from self._retire()

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of the latest call."""
        return self._cache.nbytes

    def _check(self, request: Request) -> None:
        need = len(request.prompt) + request.max_new_tokens
        if not request.prompt:
            raise ConfigError(f"request {request.key}: the prompt has no tokens")
        self.backbone.check_ids(request.key, request.prompt)
        if request.max_new_tokens < 1:
            raise ConfigError(f"request {request.key}: max_new_tokens={request.max_new_tokens} must be at least 1")
        if need > self.backbone.window:
            raise ConfigError(
                f"request {request.key}: {len(request.prompt)} prompt + {request.max_new_tokens} new tokens exceed "
                f"the model's window of {self.backbone.window}"
            )

    def _order(self, requests: list[Request]) -> deque[_Waiting]:
        """The waiting rows in the order of admission: those with a shared prefix together, the longest first."""
        if not self.strategy.prefills_prompt:
            return deque(_Waiting(request) for request in sorted(requests, key=lambda r: -len(r.prompt)))
        waiting, blocks = deque[_Waiting](), self._blocks
        own = [1 if blocks is None else blocks.own(len(request.prompt)) for request in requests]
        for group in shared_prefixes.group([request.prompt for request in requests], own=own):
            shared = group.length if blocks is None else group.length // blocks.length * blocks.length
            waiting += (_Waiting(requests[index], shared) for index in group.members)
        return waiting

    def _prefilled(self, row: _Waiting) -> int:
        """Tokens of a row's prompt that its prefill caches."""
        prompt = len(row.request.prompt)
        if not self.strategy.prefills_prompt:
            return 0
        return prompt if self._blocks is None else self._blocks.cached(prompt)

    @torch.inference_mode()
    def _admit(self, waiting: deque[_Waiting], free: int) -> None:
        """Admit waiting rows: as many as share a prefix, fit into one prefill forward, and find a free place."""
        # 1) schedule
        first, rows = waiting[0], list[_Waiting]()
        fed = len(first.request.prompt) - first.shared + len(self.strategy.prompt_mask_block)  # the longest comes first
        limit = 1 if self._prefills_alone else min(free, max(1, self._prefill_budget // fed))
        prefills = self._prefilled(first) > 0
        while waiting and len(rows) < limit and waiting[0].shared_prefix == first.shared_prefix:
            if (self._prefilled(waiting[0]) > 0) != prefills:
                break  # a prompt shorter than a block has no prefill
            rows.append(waiting.popleft())

        # 2) prefill
        at = self._rows.add([row.request for row in rows], rows[0].shared if prefills else 0)
        hidden = self._prefill(rows, at) if prefills else None  # (R, 1 + M, D)

        # 3) hand over to the strategy
        updates = self.strategy.admit(at.start, self._rows.requests[at], hidden, self._window_left(at))
        self._commit(at, _by_column(updates))

    def _prefill(self, rows: list[_Waiting], at: slice) -> Tensor:
        """Cache the prompts of rows `at`, and feed a mask block behind each.

        Returns (R, 1 + M, D): hidden states at the prompt's last cached token and its mask block.
        """
        mask_block = () if self._prefills_alone else self.strategy.prompt_mask_block
        device, shared = self.backbone.device, rows[0].shared
        # 1) the shared prefix, copied from the spare row
        if shared:
            self._prefill_shared_prefix(rows[0])
            self._cache.broadcast_prefix(self._cache.rows - 1, at.start, len(rows), shared)

        # 2) the rest of each prompt and its mask block
        cached = list(map(self._prefilled, rows))
        parts = [row.request.prompt[shared:end] for row, end in zip(rows, cached, strict=True)]
        suffixes = [torch.tensor([*part, *mask_block]) for part in parts]
        ids = torch.nn.utils.rnn.pad_sequence(suffixes, batch_first=True).to(device)  # (R, S)
        last = torch.tensor([len(part) - 1 for part in parts], device=device)  # (R,)
        intervals = prompt_with_mask_block(last, ids.shape[1]) if mask_block else None
        if self._blocks is not None:
            intervals = self._blocks.intervals(last + 1, ids.shape[1])
        feed = Feed(ids, list(map(len, suffixes)), ["prefill"] * len(rows), intervals)
        hidden = self._forward(at, feed)  # (R, S, D)
        self._rows.cached[at] = cached

        # 3) hidden states to decode from
        slots = last[:, None] + torch.arange(1 + len(mask_block), device=device)  # (R, 1 + M)
        return hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1]))

    def _prefill_shared_prefix(self, row: _Waiting) -> None:
        """Prefill a row's shared prefix into the spare row of the cache, unless it is cached there."""
        if row.shared_prefix == self._cached_prefix:
            return
        ids = torch.tensor([row.shared_prefix], device=self.backbone.device)  # (1, S)
        intervals = self._blocks and self._blocks.intervals(torch.tensor([row.shared], device=ids.device), row.shared)
        plan = self._cache.set_write_positions(self._cache.rows - 1, [0], row.shared, ids.device, intervals=intervals)
        self.backbone.forward(ids, plan, self._cache)
        self.calls += 1
        self._cached_prefix = row.shared_prefix

    @torch.inference_mode()
    def _decode(self) -> None:
        """Steps until an answer is finished."""
        while not self._rows.finish:
            self._step()

    def _step(self) -> None:
        """One forward for all active rows."""
        rows, at = self._rows, slice(0, len(self._rows))
        # 1) plan
        feed = self.strategy.plan(len(rows))
        # 2) forward
        hidden = self._forward(at, feed)  # (n, S, D)
        # 3) absorb: the strategy verifies, commits, drafts
        updates = _by_column(self.strategy.absorb(feed, hidden, self._window_left(at)))
        # 4) compact the cache: slots on the accepted path move behind the row's cached tokens
        if isinstance(updates, Updates) and updates.moves:
            self._cache.compact(rows.cached[at].tolist(), updates.moves)
        # 5) extend the answers
        self._commit(at, updates)

    def _forward(self, at: slice, feed: Feed) -> Tensor:
        """One counted forward of rows `at` of batch and cache: (n, S, D). Non-finite rows come back as zeros."""
        lengths, slots, widths = self._rows.cached[at], feed.ids.shape[1], np.asarray(feed.widths)
        device = self.backbone.device
        plan = self._cache.set_write_positions(at.start, lengths, slots, device, widths, feed.intervals)
        hidden = self.backbone.forward(feed.ids, plan, self._cache)
        # On a GPU a look at all of them would wait for the device; masking does not.
        if hidden.device.type != "cpu" or not _all_finite(hidden):
            self._is_finite = hidden.flatten(1).sum(1, dtype=torch.float32).isfinite()  # (n,)
            hidden = hidden.masked_fill(~self._is_finite[:, None, None], 0.0)
        self.calls += 1
        self._fed = feed
        if self.watch is not None:
            self._observed = _row_forwards(self._rows.requests[at], feed, plan)
        return hidden

    def _window_left(self, at: slice) -> list[int]:
        """Positions behind each row's cached tokens in the context window."""
        window = self.backbone.window
        return [window - cached for cached in self._rows.cached[at].tolist()]

    def _commit(self, at: slice, updates: Updates | OneEach) -> None:
        """Extend answers by what a forward brought, fail non-finite rows, and share out the time."""
        self._notify(updates)
        # 1) answers and traces, and the time since the previous forward, evenly
        now, count = time.perf_counter(), at.stop - at.start
        self._answers.commit(self._rows, at, updates, self._fed, (now - self._clock) / count)
        self._clock, self._fed = now, None
        # 2) non-finite rows end without an answer
        if self._is_finite is not None:
            for row, is_finite in enumerate(self._is_finite.tolist(), at.start):
                if not is_finite:
                    self._rows.fail(row)
            self._is_finite = None

    def _notify(self, updates: Updates | OneEach) -> None:
        """Pass the latest forward to `watch`, with the tokens that it brought."""
        if self.watch is not None:
            updates = updates.in_full() if isinstance(updates, OneEach) else updates
            brought = zip(self._observed, updates.tokens.tolist(), updates.lengths.tolist(), strict=False)
            for forward, tokens, length in brought:  # none where nothing is fed
                self.watch(replace(forward, tokens=tuple(tokens[:length])))
        self._observed = []

    def _retire(self) -> Iterator[Generation]:
        """Yield the answers of finished rows and give their places away, from the last on."""
        for row in sorted(self._rows.finish, reverse=True):
            generation = self._answers.generation(self._rows, row, self.strategy.draft_policy)
            self._release(row)
            paused = time.perf_counter()
            yield generation
            self._clock += time.perf_counter() - paused  # the caller's time is not decoding

    @torch.inference_mode()
    def _release(self, row: int) -> None:
        """Move the last active row into a retired row's place, so that active rows stay contiguous."""
        if self._rows.finish[row] == "broken":
            # Masked attention multiplies values by zero, and zero times NaN is NaN: the next row must not find any.
            self._cache.zero_row(row)
        last = len(self._rows) - 1
        if row != last:
            self._cache.copy_row(last, row, int(self._rows.cached[last]))
            self.strategy.move(last, row)
        self._rows.remove(row)


def _all_finite(hidden: Tensor) -> bool:
    finite = compiled.all_finite(hidden)
    return math.isfinite(hidden.sum(dtype=torch.float32)) if finite is None else finite


def _by_column(updates: Updates | OneEach | list[RowUpdate]) -> Updates | OneEach:
    """Updates as a strategy returns them, by column."""
    return Updates.of(updates) if isinstance(updates, list) else updates


def _row_forwards(requests: list[Request], feed: Feed, plan: AttentionPlan) -> list[RowForward]:
    """What each row fed in a forward, for `Engine.watch`; tokens follow once the forward is absorbed."""
    ids, positions = feed.ids.tolist(), plan.positions.tolist()  # (n, S) each
    steps = torch.zeros_like(feed.ids).tolist() if plan.intervals is None else plan.intervals.steps.tolist()
    forwards = []
    for number, (request, width, kind) in enumerate(zip(requests, feed.widths, feed.kinds, strict=True)):
        anchors: list[int | None] = []
        for position, step in zip(positions[number][:width], steps[number][:width], strict=True):
            anchors.append(position - step if step > 0 else None)
        fed = tuple(ids[number][:width]), tuple(positions[number][:width])
        forwards.append(RowForward(request.key, kind, *fed, tuple(anchors), ()))
    return forwards
