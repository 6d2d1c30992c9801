"""Log-likelihood of continuations under a bidirectional model: a Monte-Carlo estimate.  (LLaDA, arXiv 2502.09992)

A sample masks l of a continuation's L tokens, l spread evenly over 1..L, and weighs their log-probabilities by L / l.
One token needs no sampling: its one forward is exact, and choices of one token after the same context share it.

Legend: R rows, S slots, L tokens of a continuation, V vocabulary.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .backbone import Backbone
from .engine.cache import SlotCache
from .engine.records import Score, ScoreRequest, Trace
from .errors import ConfigError
from .scoring import FORWARD_TOKENS


@dataclass
class _Document:
    """A request under way. samples: estimates found so far, per pair.  greedy: argmax agrees with all masked."""

    request: ScoreRequest
    samples: list[list[float]]
    greedy: list[bool]
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

        Raises ConfigError for an empty context or continuation, and for one longer than the window.
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
        seed = int.from_bytes(hashlib.sha256(request.key.encode()).digest()[:8]) >> 1
        random = torch.Generator().manual_seed(seed)
        for pair, (context, continuation) in enumerate(request.pairs):
            if not context or not continuation or len(context) + len(continuation) > self.backbone.window:
                raise ConfigError(
                    f"request {request.key}: cannot score {len(continuation)} tokens after {len(context)} "
                    f"in a window of {self.backbone.window}"
                )
            for masked in self._masks(len(continuation), random):
                ids = list(context + continuation)
                places = [len(context) + i for i in masked]
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
        cache = SlotCache(len(batch), longest)
        reading = cache.aim(0, [0] * len(batch), longest, device)
        both = replace(reading, ends=torch.tensor([len(i) for i in inputs], device=device))
        hidden = self.backbone.forward(ids, both, cache)  # (R, S, D)
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
    errors = [
        (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values)) ** 0.5
        for values, mean in zip(document.samples, means, strict=True)
    ]
    return Score(
        key=document.request.key,
        loglikelihoods=tuple(means),
        greedy=tuple(document.greedy),
        trace=document.trace,
        seconds=document.seconds,
        prompt_tokens=max(len(context) + len(continuation) for context, continuation in document.request.pairs),
        errors=tuple(errors),
    )
