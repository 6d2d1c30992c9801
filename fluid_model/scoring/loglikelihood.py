"""Log-likelihood of continuations under a causal model: exact, one forward for all continuations of one context.

As lm-eval's `loglikelihood` requests: the sum of log-probabilities of the continuation's tokens given the context, and
whether each of them is the argmax. Contexts that begin alike prefill that prefix once (see `engine.shared_prefixes`).

    context [5 6 7], choices [8], [8 9], [4]

    input          targets read off it
    5 6 7 8        8 at slot 2 (of both choices), 9 at slot 3
    5 6 7          its forward is saved: the first input begins with it, so that 4 is read off slot 2 above

Legend: R rows, S slots fed, C last slots that hold all targets of a row, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..engine import shared_prefixes
from ..engine.records import Score, ScoreRequest, Trace
from ..forward.backbone import Backbone
from ..forward.kv_cache import KVCache

FORWARD_TOKENS = 8192
"""Tokens, padding included, that one scoring forward may take."""


@dataclass(frozen=True)
class _Target:
    """A continuation to read off an input. pair: its index in the request.  end: of the slots that predict it."""

    pair: int
    continuation: tuple[int, ...]
    end: int


@dataclass
class _ModelInput:
    """One distinct input of a request: a row of a forward."""

    ids: tuple[int, ...]
    targets: list[_Target] = field(default_factory=list)

    @property
    def span(self) -> int:
        """Slots at the input's end that hold all its targets."""
        return len(self.ids) - min(target.end - len(target.continuation) for target in self.targets)


@dataclass
class _OpenRequest:
    """A request under way. results: (log-likelihood, is greedy) by pair."""

    request: ScoreRequest
    inputs: list[_ModelInput]
    truncated: int
    results: dict[int, tuple[float, bool]] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    seconds: float = 0.0

    @property
    def is_finished(self) -> bool:
        return len(self.results) == len(self.request.pairs)

    def score(self) -> Score:
        results = [self.results[pair] for pair in range(len(self.request.pairs))]
        return Score(
            key=self.request.key,
            loglikelihoods=tuple(loglikelihood for loglikelihood, _ in results),
            greedy=tuple(is_greedy for _, is_greedy in results),
            trace=self.trace,
            seconds=self.seconds,
            prompt_tokens=max(len(each.ids) for each in self.inputs),
            truncated=self.truncated,
        )


_Job = tuple[_OpenRequest, _ModelInput]


class Scorer:
    """Scores requests in batches of at most `batch_size` rows. `calls` counts model forwards since construction."""

    def __init__(self, backbone: Backbone, batch_size: int = 16) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.calls = 0

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
        """Yield each request's log-likelihoods as soon as all its inputs are scored (not in request order).

        Inputs longer than the context window are truncated on the left, as in lm-eval; `Score.truncated` counts it.
        Raises ConfigError for an empty context or continuation.
        """
        jobs: list[_Job] = []
        for request in requests:
            opened = self._open(request)
            jobs += ((opened, each) for each in opened.inputs)
        inputs = [each for _, each in jobs]
        for group in shared_prefixes.group([each.ids for each in inputs], own=[each.span for each in inputs]):
            yield from self._score_group([jobs[index] for index in group.members], group.length)

    def _score_group(self, jobs: list[_Job], shared: int) -> Iterator[Score]:
        """Score inputs that begin with the same `shared` tokens, the longest first."""
        cache = KVCache(min(self.batch_size, len(jobs)), len(jobs[0][1].ids))
        done = 0
        while done < len(jobs):
            # 1) one batch, within the budget of a forward
            longest = len(jobs[done][1].ids) - shared
            batch = jobs[done : done + max(1, min(self.batch_size, FORWARD_TOKENS // longest))]
            # 2) score
            started = time.perf_counter()
            if done == 0 and shared:
                self._prefill_shared_prefix(batch[0][1].ids[:shared], cache)
            self._score_batch(batch, shared, cache)
            share = (time.perf_counter() - started) / len(batch)
            done += len(batch)
            # 3) requests that are finished now
            for opened, each in batch:
                opened.trace.add_forward("prefill", len(each.ids))
                opened.seconds += share
            for opened in {id(opened): opened for opened, _ in batch}.values():
                if opened.is_finished:
                    yield opened.score()

    def _open(self, request: ScoreRequest) -> _OpenRequest:
        """Distinct inputs of a request. An input that begins another shares its row: in a causal model the longer one
        holds the shorter one's predictions, so that all choices of one token cost one row.
        """
        window, truncated = self.backbone.window, 0
        # 1) the input and the target of each pair
        pairs: list[tuple[tuple[int, ...], _Target]] = []
        for pair, (context, continuation) in enumerate(request.pairs):
            if not context or not continuation or len(continuation) > window:
                raise ConfigError(
                    f"request {request.key}: cannot score {len(continuation)} tokens after {len(context)} "
                    f"in a window of {window}"
                )
            text = context + continuation
            self.backbone.check_ids(request.key, text)
            ids = text[-(window + 1) :][:-1]  # the last token is predicted, not fed
            truncated = max(truncated, len(text) - 1 - len(ids))
            pairs.append((ids, _Target(pair, continuation, end=len(ids))))
        # 2) inputs that begin no other, the longest first
        inputs: list[_ModelInput] = []
        for ids, target in sorted(pairs, key=lambda item: -len(item[0])):
            shared = next((each for each in inputs if each.ids[: len(ids)] == ids), None)
            if shared is None:
                shared = _ModelInput(ids)
                inputs.append(shared)
            shared.targets.append(target)
        return _OpenRequest(request, inputs, truncated)

    @torch.inference_mode()
    def _prefill_shared_prefix(self, ids: tuple[int, ...], cache: KVCache) -> None:
        """Prefill a shared prefix once and copy it to every row of the cache."""
        device = self.backbone.device
        plan = cache.set_write_positions(0, [0], len(ids), device)
        self.backbone.forward(torch.tensor([ids], device=device), plan, cache)
        self.calls += 1
        cache.broadcast_prefix(0, 1, cache.rows - 1, len(ids))

    @torch.inference_mode()
    def _score_batch(self, batch: list[_Job], shared: int, cache: KVCache) -> None:
        device = self.backbone.device
        # 1) forward, without the shared prefix
        inputs = [torch.tensor(each.ids[shared:]) for _, each in batch]
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)  # (R, S)
        plan = cache.set_write_positions(0, [shared] * len(batch), ids.shape[1], device)
        hidden = self.backbone.forward(ids, plan, cache)  # (R, S, D)
        self.calls += 1
        # 2) logits of the last C slots of each row alone
        span = max(each.span for _, each in batch)  # C
        lengths = torch.tensor(list(map(len, inputs)), device=device)[:, None]  # (R, 1)
        slots = (lengths - span + torch.arange(span, device=device)).clamp(min=0)  # (R, C)
        logits = self.backbone.logits(hidden.gather(1, slots[..., None].expand(-1, -1, hidden.shape[-1])))  # (R, C, V)
        # 3) log-probability of each target token
        places: list[tuple[int, int, int]] = []
        for row, (_, each) in enumerate(batch):
            for target in each.targets:
                first = span - (len(each.ids) - target.end) - len(target.continuation)
                places += ((row, first + index, token) for index, token in enumerate(target.continuation))
        values = iter(_log_probabilities(logits.log_softmax(-1), places))
        # 4) summed over each continuation
        for opened, each in batch:
            for target in each.targets:
                tokens = [next(values) for _ in target.continuation]
                loglikelihood = sum(value for value, _ in tokens)
                opened.results[target.pair] = loglikelihood, all(is_greedy for _, is_greedy in tokens)


def _log_probabilities(scores: Tensor, places: list[tuple[int, int, int]]) -> list[tuple[float, bool]]:
    """Log-probability of each token, and whether it is the argmax, with one transfer to the host.

    scores: (R, C, V).  places: row, slot and token of each.
    """
    row, slot, token = torch.tensor(places, device=scores.device).unbind(1)
    is_greedy = scores.argmax(-1)[row, slot] == token
    values = torch.stack([scores[row, slot, token].double(), is_greedy.double()], 1)
    return [(value, bool(greedy)) for value, greedy in values.tolist()]
