"""The loop every decoder shares: admit, plan, forward, absorb, retire.

Legend: n active rows, R rows just admitted, S slots fed, L longest prompt, D hidden.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..forward import attention_masks
from ..forward.backbone import Backbone
from ..tokens import Tokenizer, after_last, cut_at_stops, has_stop
from . import shared_prefixes
from .records import Finish, Generation, Request, Step, Trace
from .strategy import Absorbed, Feed, Strategy

PREFILL_TOKENS, PREFILL_TOKENS_CPU = 4096, 128
"""Prompt tokens, padding included, that one prefill forward may take: enough to keep a device busy, and its activations
small beside keys and values.
"""
DECODE_MARGIN = 8
"""Tokens decoded before a possible stop string, so that split words and bytes come out whole."""


@dataclass
class _Row:
    """shared: tokens its prompt begins with in common with others.  length: tokens cached."""

    request: Request
    shared: int = 0
    length: int = 0
    ids: list[int] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    seconds: float = 0.0
    finish: Finish | None = None
    broken: bool = False

    @property
    def beginning(self) -> tuple[int, ...]:
        return self.request.prompt[: self.shared]


class Engine:
    """Continues prompts with one strategy over one backbone, `slots` rows at a time.

    A finished row's slot is given to the next waiting request at once; active rows are kept packed at the front.
    What drafts cost is reckoned for the rows that the whole run would keep active (`Request.asked`), not for those it
    has left, so that an answer's forwards are the same however often the run was broken off.
    `calls` counts model forwards since construction.  `watch`, if set, is told every forward of every row.
    """

    watch: Callable[[Step], None] | None = None

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        end_ids: Iterable[int],
        strategy: Strategy,
        slots: int = 16,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"batch_size={slots} must be at least 1")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids)
        self.strategy = strategy
        self.slots = slots
        self.calls = 0
        self._prefill = PREFILL_TOKENS_CPU if backbone.device.type == "cpu" else PREFILL_TOKENS
        self._alone = backbone.graphs is not None and backbone.graphs.only is not None
        """Whether a prompt is read by itself, since what it is read with would choose its kernels."""
        self._rows: list[_Row] = []
        self._seen: list[Step] = []
        self._sound: Tensor | None = None
        self._held: tuple[int, ...] = ()
        self._clock = 0.0

    def generate(self, requests: Iterable[Request]) -> Iterator[Generation]:
        """Yield each answer as soon as it is finished (not in request order). What prompts begin with in common is read
        once.

        Raises ConfigError if a prompt is empty or leaves no room for its answer.
        """
        asked = list(requests)
        if not asked:
            return
        for request in asked:
            self._check(request)
        waiting = self._queue(asked)
        slots = min(self.slots, len(waiting))
        self.strategy.allocate(max(slots, min(self.slots, max(r.asked or 0 for r in asked))))
        columns = max(len(r.prompt) + r.max_new_tokens for r in asked) + self.strategy.widest
        self._cache = self.backbone.cache(slots + any(row.shared for row in waiting), columns)  # one for what is shared
        self._rows, self._held = [], ()
        self._clock = time.perf_counter()
        while waiting or self._rows:
            while waiting and len(self._rows) < slots:
                self._admit(waiting, slots - len(self._rows))
            yield from self._retire()
            if self._rows:
                self._round()
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

    def _queue(self, requests: list[Request]) -> deque[_Row]:
        """Rows in the order they are let in: prompts that begin alike together, the longest first."""
        if not self.strategy.reads_prompt:
            return deque(_Row(request) for request in sorted(requests, key=lambda r: -len(r.prompt)))
        groups = shared_prefixes.group([r.prompt for r in requests], own=[1] * len(requests))
        return deque(_Row(requests[place], each.length) for each in groups for place in each.members)

    @torch.inference_mode()
    def _admit(self, waiting: deque[_Row], free: int) -> None:
        """Let waiting prompts in together, as many as begin alike and the slots and one forward's budget take."""
        first, rows = waiting[0], list[_Row]()
        fed = len(first.request.prompt) - first.shared + len(self.strategy.behind_prompt)
        most = 1 if self._alone else min(free, max(1, self._prefill // fed))
        while waiting and len(rows) < most and waiting[0].beginning == first.beginning:
            rows.append(waiting.popleft())
        start = len(self._rows)
        hidden = self._read(rows, start) if self.strategy.reads_prompt else None
        absorbed = self.strategy.admit(start, [row.request for row in rows], hidden, [self._room(row) for row in rows])
        self._rows += rows
        self._take(rows, absorbed)

    def _read(self, rows: list[_Row], start: int) -> Tensor:
        """Prefill prompts, and M more ids behind each, into slots start.. .

        Returns (R, 1 + M, D): hidden states from the prompts' last tokens on.
        """
        behind = () if self._alone else self.strategy.behind_prompt
        device, shared = self.backbone.device, rows[0].shared
        if shared:
            self._read_shared(rows[0])
            self._cache.broadcast_prefix(self._cache.slots - 1, start, len(rows), shared)
        fed = [torch.tensor([*row.request.prompt[shared:], *behind]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(fed, batch_first=True).to(device)  # (R, S)
        last = torch.tensor([len(row.request.prompt) - shared - 1 for row in rows], device=device)
        intervals = attention_masks.prompt_with_mask_block(last, ids.shape[1]) if behind else None
        for row in rows:
            row.length = shared
        feed = Feed(ids, list(map(len, fed)), ["prefill"] * len(rows), intervals)
        hidden = self._forward(rows, feed, start)  # (R, S, D)
        for row in rows:
            row.length = len(row.request.prompt)
            row.trace.slots += shared
        where = last[:, None] + torch.arange(1 + len(behind), device=device)
        return hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))

    def _read_shared(self, row: _Row) -> None:
        """Read what a row's prompt shares with others into the spare slot, unless it is there."""
        if row.beginning == self._held:
            return
        ids = torch.tensor([row.beginning], device=self.backbone.device)
        reading = self._cache.set_write_positions(self._cache.slots - 1, [0], row.shared, self.backbone.device)
        self.backbone.forward(ids, reading, self._cache)
        self.calls += 1
        self._held = row.beginning

    @torch.inference_mode()
    def _round(self) -> None:
        """One forward for all active rows."""
        rows = self._rows
        feed = self.strategy.plan(len(rows))
        hidden = self._forward(rows, feed)  # (n, S, D)
        absorbed = self.strategy.absorb(feed, hidden, [self._room(row) for row in rows])
        self._cache.compact([row.length for row in rows], absorbed.kept)
        for row, keep in zip(rows, absorbed.keep, strict=True):
            row.length += keep
        self._take(rows, absorbed)

    def _forward(self, rows: list[_Row], feed: Feed, start: int = 0) -> Tensor:
        """One counted call of the model. A row whose numbers are not finite is broken; strategies see zeros there."""
        lengths, slots = [row.length for row in rows], feed.ids.shape[1]
        reading = self._cache.set_write_positions(
            start, lengths, slots, self.backbone.device, feed.widths, feed.intervals
        )
        hidden = self.backbone.forward(feed.ids, reading, self._cache)
        if hidden.device.type != "cpu" or not math.isfinite(hidden.sum(dtype=torch.float32)):  # asked where it is free
            self._sound = hidden.flatten(1).sum(1, dtype=torch.float32).isfinite()  # (n,)
            hidden = hidden.masked_fill(~self._sound[:, None, None], 0.0)
        self.calls += 1
        for row, width, kind in zip(rows, feed.widths, feed.kinds, strict=True):
            row.trace.count(kind, width)
        if self.watch is not None:
            self._seen = _steps(rows, feed, reading)
        return hidden

    def _room(self, row: _Row) -> int:
        return self.backbone.window - row.length

    def _take(self, rows: list[_Row], absorbed: Absorbed) -> None:
        """Book committed tokens, strides and time; decide who is finished."""
        for row, stride in zip(rows, absorbed.predicted, strict=False):
            if stride is not None:
                row.trace.predicted.append(stride)
        self._tell(absorbed.tokens)
        ago = absorbed.ago or [[0] * len(tokens) for tokens in absorbed.tokens]
        rejected = absorbed.rejected or [(0, [])] * len(rows)
        for row, tokens, since, (kept, drafts) in zip(rows, absorbed.tokens, ago, rejected, strict=True):
            before = len(row.ids)
            if tokens:
                self._commit(row, tokens)
                row.trace.accepted += [len(row.ids) - before] if absorbed.predicted else []
                row.trace.write(since[: len(row.ids) - before])
            if drafts:
                self._reject(row, before + kept, drafts, *since[kept : kept + 1])
        for row, full in zip(rows, absorbed.full, strict=False):
            if full and row.finish is None:
                row.finish = "length"
        for row, good in zip(rows, self._heard(rows), strict=True):
            row.broken |= not good
            if row.broken:
                row.finish, row.ids = "broken", []
                row.trace.forget()
        now = time.perf_counter()
        for row in rows:
            row.seconds += (now - self._clock) / len(rows)
        self._clock = now

    def _heard(self, rows: list[_Row]) -> list[bool]:
        """Whether the numbers of each row were finite in the latest forward: all, where nothing says otherwise."""
        sound, self._sound = self._sound, None
        return [True] * len(rows) if sound is None else sound.tolist()

    def _tell(self, tokens: Sequence[Sequence[int]]) -> None:
        """Tell the watcher, if any, the latest forward and what each row's answer grew by."""
        if self.watch is not None:
            for step, fresh in zip(self._seen, tokens, strict=False):  # none where prompts are not read
                self.watch(replace(step, tokens=tuple(fresh)))
        self._seen = []

    def _commit(self, row: _Row, tokens: list[int]) -> None:
        """Append tokens up to the answer's end: end-of-sequence, a stop string, or the length limit."""
        request, before = row.request, len(row.ids)
        end = next((i for i, token in enumerate(tokens) if token in self.end_ids), None)
        fresh = tokens[:end][: request.max_new_tokens - before]
        row.ids += fresh
        stopped = self._first_stop(row, before)
        if stopped is not None:
            del row.ids[stopped:]
            row.finish = "stop"
        elif end is not None and before + end < request.max_new_tokens:
            row.finish = "eos"
        elif len(row.ids) >= request.max_new_tokens:
            row.finish = "length"

    def _reject(self, row: _Row, place: int, drafts: list[int], ago: int = 0) -> None:
        """Book drafts that the answer could have had: none behind its end.

        ago: forwards since the token that took the place of the first was written.
        """
        drafts = drafts[: row.request.max_new_tokens - place]
        if drafts and place < len(row.ids) + (row.finish in (None, "eos")):
            row.trace.reject(place, drafts, ago)

    def _first_stop(self, row: _Row, before: int) -> int | None:
        """Length of the shortest prefix that holds a stop string after its thinking, if longer than `before` tokens."""
        stops, mark = row.request.stops, row.request.end_of_thinking
        if not stops:
            return None
        reach = max(len(stop.encode()) for stop in stops) + DECODE_MARGIN
        if not has_stop(self._decode(row.ids[max(0, before - reach) :], special=True), stops):
            return None
        for end in range(before + 1, len(row.ids) + 1):
            if has_stop(after_last(self._decode(row.ids[:end], special=True), mark), stops):
                return end
        return None

    def _answer(self, row: _Row) -> str:
        """Text of a row's answer: all of it, or what follows its thinking, less white space at the front."""
        ids, mark = row.ids, row.request.end_of_thinking
        text = self._decode(ids)
        if mark is None:
            return text
        marks = self._decode(ids, special=True).count(mark)
        if text.count(mark) < marks:  # it ends in a special token, which no text shows: cut the ids behind it
            first = bisect_left(range(len(ids)), marks, key=lambda n: self._decode(ids[:n], special=True).count(mark))
            return self._decode(ids[first:]).lstrip()
        return after_last(text, mark).lstrip()

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of ids. Stop strings may be special tokens, which an answer's text leaves out (as in lm-eval)."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=not special)
        return text

    def _retire(self) -> Iterator[Generation]:
        """Hand back finished rows and pack the rest together."""
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.finish is None:
                continue
            self._free(slot)
            finished, paused = self._generation(row), time.perf_counter()
            yield finished
            self._clock += time.perf_counter() - paused  # what the caller did meanwhile is not decoding

    @torch.inference_mode()
    def _free(self, slot: int) -> None:
        """Move the last active row into a finished one's slot."""
        last = len(self._rows) - 1
        if self._rows[slot].broken:
            self._cache.clear(slot)
        if slot != last:
            self._cache.move(last, slot)
            self.strategy.move(last, slot)
            self._rows[slot] = self._rows[last]
        self._rows.pop()

    def _generation(self, row: _Row) -> Generation:
        request = row.request
        return Generation(
            key=request.key,
            ids=tuple(row.ids),
            text=cut_at_stops(self._answer(row), request.stops),
            finish=row.finish or "length",
            trace=row.trace,
            seconds=row.seconds,
            prompt_tokens=len(request.prompt),
            truncated=request.truncated,
            draft_policy=self.strategy.draft_policy,
        )


def _steps(rows: list[_Row], feed: Feed, reading: attention_masks.AttentionPlan) -> list[Step]:
    """What each row fed in a forward."""
    places, found = reading.positions.tolist(), []
    hung = [[None] * feed.ids.shape[1]] * len(rows)
    if reading.intervals is not None:
        steps = reading.intervals.steps
        hung = torch.where(steps > 0, reading.positions - steps, -1).tolist()
    for row, ids, width, kind, where, fan in zip(
        rows, feed.ids.tolist(), feed.widths, feed.kinds, places, hung, strict=True
    ):
        fans = tuple(None if at is None or at < 0 else at for at in fan[:width])
        found.append(Step(row.request.key, kind, tuple(ids[:width]), tuple(where[:width]), fans, ()))
    return found
