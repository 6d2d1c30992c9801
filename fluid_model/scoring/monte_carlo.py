"""Log-likelihood of continuations under a bidirectional model: a Monte-Carlo estimate.  (LLaDA, arXiv 2502.09992)

A sample masks l of a continuation's L tokens, with l spread evenly over 1..L, predicts them in one forward, and weighs
the sum of their log-probabilities by L / l; the estimate is the mean over samples. A continuation of one token needs no
sampling: its one forward is exact, and all such choices after the same context share it.

    context Q: 6*7? A:   continuation " forty two ."   a sample with l = 2:   Q: 6*7? A: [mask] two [mask]
                                                       weight 3/2 on log p(" forty") + log p(".")

`shift`: tokens are predicted at the slot before, as the decoder does (`decoders.canvas`).

Legend: R rows, S slots, L tokens of a continuation, l masked ones, V vocabulary.
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
from ..forward.backbone import Backbone, predicting_slots
from ..forward.kv_cache import KVCache
from .loglikelihood import FORWARD_TOKENS


@dataclass(frozen=True)
class _MaskedTarget:
    """Masked tokens of one sample. slots: where they stand.  weight: L / l."""

    pair: int
    slots: list[int]
    tokens: list[int]
    weight: float


@dataclass
class _Estimate:
    """A request under way. samples: estimates by pair.  greedy: whether the argmax of all masked tokens at once is the
    continuation, by pair.  open_inputs: masked inputs that are not scored yet.
    """

    request: ScoreRequest
    samples: list[list[float]]
    greedy: list[bool]
    truncated: int = 0
    open_inputs: int = 0
    trace: Trace = field(default_factory=Trace)
    seconds: float = 0.0

    def score(self) -> Score:
        means, errors = [], []
        for samples, (_, continuation) in zip(self.samples, self.request.pairs, strict=True):
            means.append(sum(samples) / len(samples))
            errors.append(0.0 if len(continuation) == 1 else _standard_error(samples))
        longest = max(len(context) + len(continuation) for context, continuation in self.request.pairs)
        return Score(
            key=self.request.key,
            loglikelihoods=tuple(means),
            greedy=tuple(self.greedy),
            trace=self.trace,
            seconds=self.seconds,
            prompt_tokens=longest - self.truncated,
            truncated=self.truncated,
            errors=tuple(errors),
        )


@dataclass
class _MaskedInput:
    """One distinct masked input: a row of a forward."""

    estimate: _Estimate
    ids: tuple[int, ...]
    targets: list[_MaskedTarget]


class CanvasScorer:
    """Scores requests in batches of at most `batch_size` rows. `calls` counts model forwards since construction."""

    def __init__(
        self, backbone: Backbone, mask_id: int, batch_size: int = 16, samples: int = 128, *, shift: bool = False
    ) -> None:
        self.backbone, self.mask_id, self.batch_size, self.samples = backbone, mask_id, batch_size, samples
        self.shift = shift
        self.calls = 0

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[Score]:
        """Yield each request's estimates as soon as all its masked inputs are scored (not in request order).

        Inputs longer than the context window are truncated on the left; `Score.truncated` counts it.
        Raises ConfigError for an empty context or continuation, and for a continuation longer than the window.
        """
        inputs = [each for request in requests for each in self._masked_inputs(request)]
        inputs.sort(key=lambda each: -len(each.ids))
        done = 0
        while done < len(inputs):
            # 1) one batch, within the budget of a forward
            batch = inputs[done : done + max(1, min(self.batch_size, FORWARD_TOKENS // len(inputs[done].ids)))]
            done += len(batch)
            # 2) score
            started = time.perf_counter()
            self._score_batch(batch)
            share = (time.perf_counter() - started) / len(batch)
            # 3) requests that are finished now
            for each in batch:
                estimate = each.estimate
                estimate.trace.add_forward("denoise", len(each.ids))
                estimate.seconds += share
                estimate.open_inputs -= 1
                if estimate.open_inputs == 0:
                    yield estimate.score()

    def _masked_inputs(self, request: ScoreRequest) -> list[_MaskedInput]:
        """All samples of a request; those that mask to the same ids share one input."""
        count = len(request.pairs)
        estimate = _Estimate(request, [[] for _ in range(count)], [False] * count)
        inputs: dict[tuple[int, ...], _MaskedInput] = {}
        generator, window = torch.Generator().manual_seed(request.seed), self.backbone.window
        for pair, (context, continuation) in enumerate(request.pairs):
            if not context or not continuation or len(continuation) > window:
                raise ConfigError(
                    f"request {request.key}: cannot score {len(continuation)} tokens after {len(context)} "
                    f"in a window of {window}"
                )
            self.backbone.check_ids(request.key, context + continuation)
            text = (context + continuation)[-window:]
            start = len(text) - len(continuation)
            estimate.truncated = max(estimate.truncated, len(context) - start)
            for masked in self._draw_masks(len(continuation), generator):
                ids = list(text)
                for index in masked:
                    ids[start + index] = self.mask_id
                slots, tokens = [start + index for index in masked], [continuation[index] for index in masked]
                target = _MaskedTarget(pair, slots, tokens, weight=len(continuation) / len(masked))
                inputs.setdefault(tuple(ids), _MaskedInput(estimate, tuple(ids), [])).targets.append(target)
        estimate.open_inputs = len(inputs)
        return list(inputs.values())

    def _draw_masks(self, length: int, generator: torch.Generator) -> list[list[int]]:
        """Indices to mask, one list a sample, those with most masks first."""
        if length == 1:
            return [[0]]
        # Stratified: the numbers of masks are evenly spread from a random start (LLaDA's public code).
        start = int(torch.randint(length, (), generator=generator))
        masks = []
        for sample in range(self.samples):
            count = (start + round(sample * length / self.samples)) % length + 1
            masks.append(sorted(torch.randperm(length, generator=generator)[:count].tolist()))
        return sorted(masks, key=len, reverse=True)

    @torch.inference_mode()
    def _score_batch(self, batch: list[_MaskedInput]) -> None:
        device = self.backbone.device
        # 1) forward, under bidirectional attention
        lengths = [len(each.ids) for each in batch]
        longest = max(lengths)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each.ids) for each in batch], batch_first=True).to(device)
        intervals = attention_masks.bidirectional(torch.tensor(lengths, device=device), longest)
        cache = KVCache(len(batch), longest)
        plan = cache.set_write_positions(0, [0] * len(batch), longest, device, intervals=intervals)
        hidden = self.backbone.forward(ids, plan, cache)  # (R, S, D)
        self.calls += 1
        # 2) log-probabilities of the masked tokens
        for each, states in zip(batch, hidden, strict=True):
            for target in each.targets:
                predicting = predicting_slots(torch.tensor(target.slots, device=device), self.shift)
                self._add_sample(each.estimate, target, states[predicting])

    def _add_sample(self, estimate: _Estimate, target: _MaskedTarget, states: Tensor) -> None:
        """states: (l, D), which predict the masked tokens."""
        scores = self.backbone.logits(states).log_softmax(-1)  # (l, V)
        tokens = torch.tensor(target.tokens, device=scores.device)
        loglikelihood = float(scores.gather(-1, tokens[:, None]).sum())
        estimate.samples[target.pair].append(target.weight * loglikelihood)
        masks_all = len(tokens) == len(estimate.request.pairs[target.pair][1])
        if masks_all:
            estimate.greedy[target.pair] = bool((scores.argmax(-1) == tokens).all())


def _standard_error(samples: list[float]) -> float | None:
    """Of their mean; None of a single sample, whose spread is unknown."""
    return None if len(samples) < 2 else statistics.stdev(samples) / len(samples) ** 0.5
