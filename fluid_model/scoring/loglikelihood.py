"""Log-likelihood of continuations under a causal model: exact, one forward for all choices that share a context, and
what contexts begin with in common (few-shot examples) read once.

Legend: R rows, S slots fed, C continuation slots, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..engine import shared_prefixes
from ..engine.records import Score, ScoreRequest, Trace
from ..forward.backbone import Backbone
from ..forward.kv_cache import KVCache

FORWARD_TOKENS = 8192
"""Tokens, padding included, that one scoring forward may take."""


@dataclass
class _Wanted:
    """A continuation to read off a row: it is predicted by the slots that end at `end`."""

    pair: int
    continuation: tuple[int, ...]
    end: int


@dataclass
class _Row:
    """One distinct model input and the continuations read off its last slots."""

    ids: tuple[int, ...]
    wanted: list[_Wanted] = field(default_factory=list)

    @property
    def span(self) -> int:
        """Slots at the row's end that somebody looks at."""
        return len(self.ids) - min(w.end - len(w.continuation) for w in self.wanted)


@dataclass
class _Document:
    request: ScoreRequest
    rows: list[_Row]
    truncated: int
    found: dict[int, tuple[float, bool]] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    seconds: float = 0.0


class Scorer:
    """Scores requests in batches of at most `slots` rows. `calls` counts model forwards since construction."""

    def __init__(self, backbone: Backbone, slots: int = 16) -> None:
        self.backbone = backbone
        self.slots = slots
        self.calls = 0

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
        """Yield each request's log-likelihoods as soon as all its rows are done (not in request order).

        Inputs longer than the window lose tokens on the left, as in lm-eval, and say how many.
        Raises ConfigError for an empty context or continuation.
        """
        pairs = [(document, row) for document in map(self._rows, requests) for row in document.rows]
        groups = shared_prefixes.group([row.ids for _, row in pairs], own=[row.span for _, row in pairs])
        for each in groups:
            yield from self._score_group([pairs[place] for place in each.members], each.length)

    def _score_group(self, queue: list[tuple[_Document, _Row]], shared: int) -> Iterator[Score]:
        """Rows that begin with the same `shared` tokens, the longest first."""
        cache, done = KVCache(min(self.slots, len(queue)), len(queue[0][1].ids)), 0
        while done < len(queue):
            take = max(1, min(self.slots, FORWARD_TOKENS // (len(queue[done][1].ids) - shared)))
            batch, begins = queue[done : done + take], done == 0
            done += take
            started = time.perf_counter()
            if begins and shared:
                self._begin(batch[0][1].ids[:shared], cache)
            self._forward(batch, shared, cache)
            share = (time.perf_counter() - started) / len(batch)
            for document, row in batch:
                document.trace.count("prefill", len(row.ids))
                document.seconds += share
            for document in {id(d): d for d, _ in batch}.values():
                if len(document.found) == len(document.request.pairs):
                    yield _finish(document)

    def _rows(self, request: ScoreRequest) -> _Document:
        """Distinct inputs of a request. An input that begins another shares its row: in a causal model the
        longer one holds the shorter one's predictions, so choices of one or two tokens cost one row.
        """
        window, truncated = self.backbone.window, 0
        inputs: list[tuple[tuple[int, ...], _Wanted]] = []
        for pair, (context, continuation) in enumerate(request.pairs):
            if not context or not continuation or len(continuation) > window:
                raise ConfigError(
                    f"request {request.key}: cannot score {len(continuation)} tokens after {len(context)} "
                    f"in a window of {window}"
                )
            whole = context + continuation
            self.backbone.check_ids(request.key, whole)
            ids = whole[-(window + 1) :][:-1]
            truncated = max(truncated, len(whole) - 1 - len(ids))
            inputs.append((ids, _Wanted(pair, continuation, end=len(ids))))
        rows: list[_Row] = []
        for ids, wanted in sorted(inputs, key=lambda item: -len(item[0])):
            row = next((row for row in rows if row.ids[: len(ids)] == ids), None)
            if row is None:
                rows.append(row := _Row(ids))
            row.wanted.append(wanted)
        return _Document(request, rows, truncated)

    @torch.inference_mode()
    def _begin(self, ids: tuple[int, ...], cache: KVCache) -> None:
        """Read what all rows begin with, once, and give it to every slot of the cache."""
        device = self.backbone.device
        self.backbone.forward(
            torch.tensor([ids], device=device), cache.set_write_positions(0, [0], len(ids), device), cache
        )
        self.calls += 1
        cache.broadcast_prefix(0, 1, cache.slots - 1, len(ids))

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[_Document, _Row]], shared: int, cache: KVCache) -> None:
        device = self.backbone.device
        inputs = [torch.tensor(row.ids[shared:]) for _, row in batch]
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)  # (R, S)
        reading = cache.set_write_positions(0, [shared] * len(batch), ids.shape[1], device)
        hidden = self.backbone.forward(ids, reading, cache)  # (R, S, D)
        self.calls += 1
        reach = max(row.span for _, row in batch)
        ends = torch.tensor([len(i) for i in inputs], device=device)[:, None]
        slots = (ends - reach + torch.arange(reach, device=device)).clamp(min=0)  # (R, C), the last C of each row
        logits = self.backbone.logits(hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1])))
        wanted = [(number, document, row, each) for number, (document, row) in enumerate(batch) for each in row.wanted]
        places = [
            (number, reach - (len(row.ids) - each.end) - len(each.continuation) + at, token)
            for number, _, row, each in wanted
            for at, token in enumerate(each.continuation)
        ]
        said = iter(_read(logits.log_softmax(-1), places))
        for _, document, _, each in wanted:
            scores, greedy = zip(*islice(said, len(each.continuation)), strict=True)
            document.found[each.pair] = sum(scores), all(greedy)


def _read(scores: Tensor, places: list[tuple[int, int, int]]) -> list[tuple[float, bool]]:
    """Log-probabilities of tokens, and whether they are the likeliest: one transfer to the host.

    scores: (R, C, V).  places: row, slot and token of each.
    """
    row, slot, token = torch.tensor(places, device=scores.device).unbind(1)
    greedy = scores.argmax(-1)[row, slot] == token
    found = torch.stack([scores[row, slot, token].double(), greedy.double()], 1).tolist()
    return [(score, bool(is_greedy)) for score, is_greedy in found]


def _finish(document: _Document) -> Score:
    found = [document.found[i] for i in range(len(document.request.pairs))]
    return Score(
        key=document.request.key,
        loglikelihoods=tuple(value for value, _ in found),
        greedy=tuple(greedy for _, greedy in found),
        trace=document.trace,
        seconds=document.seconds,
        prompt_tokens=max(len(row.ids) for row in document.rows),
        truncated=document.truncated,
    )
