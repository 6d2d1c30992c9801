"""Log-likelihood of continuations under a bidirectional model: a Monte-Carlo estimate.  (LLaDA, arXiv 2502.09992)

A sample masks l of a continuation's L tokens, l spread evenly over 1..L, and weighs their log-probabilities by L / l.
One token needs no sampling: its one forward is exact, and choices of one token after the same context share it.

Legend: R rows, S slots, L tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..engine.records import Score, ScoreRequest, Trace
from ..forward import attention_masks
from ..forward.backbone import Backbone
from ..forward.kv_cache import KVCache
from .loglikelihood import FORWARD_TOKENS


@dataclass
class _Document:
    """A request under way. samples: estimates found so far, per pair.  greedy: argmax agrees with all masked.
    truncated: tokens the longest pair lost.
    """

    request: ScoreRequest
    samples: list[list[float]]
    greedy: list[bool]
    truncated: int = 0
    left: int = 0
    trace: Trace = field(default_factory=Trace)
    seconds: float = 0.0


@dataclass
class _Row:
    """One masked input and what is read off it: (pair, places, tokens, weight)."""

    document: _Document
    ids: tuple[int, ...]
    wanted: list[tuple[int, list[int], list[int], float]]


class CanvasScorer:
    """Scores requests in batches of at most `slots` rows. `calls` counts model forwards since construction."""

    def __init__(self, backbone: Backbone, mask_id: int, slots: int = 16, samples: int = 128) -> None:
        self.backbone, self.mask_id, self.slots, self.samples = backbone, mask_id, slots, samples
        self.calls = 0

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
        """Yield each request's estimates as soon as all its rows are done (not in request order).

        Inputs longer than the window lose tokens on the left, and say how many.
        Raises ConfigError for an empty context or continuation, and for a continuation longer than the window.
        """
        queue = sorted((row for request in requests for row in self._rows(request)), key=lambda row: -len(row.ids))
        done = 0
        while done < len(queue):
            take = max(1, min(self.slots, FORWARD_TOKENS // len(queue[done].ids)))
            batch = queue[done : done + take]
            done += take
            started = time.perf_counter()
            self._forward(batch)
            share = (time.perf_counter() - started) / len(batch)
            for row in batch:
                document = row.document
                document.trace.count("denoise", len(row.ids))
                document.seconds += share
                document.left -= 1
                if document.left == 0:
                    yield _finish(document)

    def _rows(self, request: ScoreRequest) -> list[_Row]:
        count = len(request.pairs)
        document = _Document(request, [[] for _ in range(count)], [False] * count)
        rows: dict[tuple[int, ...], _Row] = {}
        random, window = torch.Generator().manual_seed(request.seed), self.backbone.window
        for pair, (context, continuation) in enumerate(request.pairs):
            if not context or not continuation or len(continuation) > window:
                raise ConfigError(
                    f"request {request.key}: cannot score {len(continuation)} tokens after {len(context)} "
                    f"in a window of {window}"
                )
            self.backbone.check_ids(request.key, context + continuation)
            whole = (context + continuation)[-window:]
            start = len(whole) - len(continuation)
            document.truncated = max(document.truncated, len(context) - start)
            for masked in self._masks(len(continuation), random):
                ids = list(whole)
                places = [start + i for i in masked]
                for place in places:
                    ids[place] = self.mask_id
                row = rows.setdefault(tuple(ids), _Row(document, tuple(ids), []))
                weight = len(continuation) / len(masked)
                row.wanted.append((pair, places, [continuation[i] for i in masked], weight))
        document.left = len(rows)
        return list(rows.values())

    def _masks(self, length: int, random: torch.Generator) -> list[list[int]]:
        """Places to mask, one list a sample; the first masks all."""
        if length == 1:
            return [[0]]
        first = int(torch.randint(length, (), generator=random))
        counts = [(first + round(i * length / self.samples)) % length + 1 for i in range(self.samples)]
        drawn = [sorted(torch.randperm(length, generator=random)[:count].tolist()) for count in counts]
        return sorted(drawn, key=len, reverse=True)

    @torch.inference_mode()
    def _forward(self, batch: list[_Row]) -> None:
        device = self.backbone.device
        inputs = [torch.tensor(row.ids) for row in batch]
        longest = max(map(len, inputs))
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)  # (R, S)
        cache = KVCache(len(batch), longest)
        intervals = attention_masks.bidirectional(torch.tensor([len(i) for i in inputs], device=device), longest)
        reading = cache.set_write_positions(0, [0] * len(batch), longest, device, intervals=intervals)
        hidden = self.backbone.forward(ids, reading, cache)  # (R, S, D)
        self.calls += 1
        for row, states in zip(batch, hidden, strict=True):
            for pair, places, tokens, weight in row.wanted:
                self._read(row.document, pair, states[places], tokens, weight)

    def _read(self, document: _Document, pair: int, states: Tensor, tokens: list[int], weight: float) -> None:
        scores = self.backbone.logits(states).log_softmax(-1)  # (l, V)
        wanted = torch.tensor(tokens, device=scores.device)
        document.samples[pair].append(weight * float(scores.gather(-1, wanted[:, None]).sum()))
        if len(tokens) == len(document.request.pairs[pair][1]):
            document.greedy[pair] = bool((scores.argmax(-1) == wanted).all())


def _finish(document: _Document) -> Score:
    means = [sum(values) / len(values) for values in document.samples]
    lengths = [len(continuation) for _, continuation in document.request.pairs]
    errors = [0.0 if length == 1 else _error(values) for values, length in zip(document.samples, lengths, strict=True)]
    return Score(
        key=document.request.key,
        loglikelihoods=tuple(means),
        greedy=tuple(document.greedy),
        trace=document.trace,
        seconds=document.seconds,
        prompt_tokens=max(len(context) + len(tail) for context, tail in document.request.pairs) - document.truncated,
        truncated=document.truncated,
        errors=tuple(errors),
    )


def _error(samples: list[float]) -> float | None:
    """Standard error of their mean; None of a single one, which does not show its own."""
    return None if len(samples) < 2 else statistics.stdev(samples) / len(samples) ** 0.5
