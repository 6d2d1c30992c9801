"""Records of the engine: requests, generations, scores and their traces. Plain dataclasses, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prefill", "denoise", "verify", "commit", "round"]
KINDS: tuple[Kind, ...] = ("prefill", "denoise", "verify", "commit", "round")
"""What a forward does for a row. prefill: cache the prompt.  denoise: refine a canvas or block of masks.
verify: compare a filled canvas with the causal argmax.  commit: cache committed tokens.  round: a speculative step,
verifying and drafting at once.
"""

Finish = Literal["eos", "stop", "length", "broken"]
"""Why an answer ends: an end-of-sequence id, a stop string, the length limit. broken: the row's hidden states became
NaN or infinite, and it has no answer.
"""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt: token ids, already cut to the context window.  max_new_tokens: limit of the answer, in ids.
    stops: strings that end the answer.  seed: of this row's own random numbers.
    end_of_thinking: marker that ends a row's thinking (None: the model does not think). The answer is the text behind
    it, and stop strings count only there.
    truncated: prompt tokens that were cut from the left.
    asked: number of requests of the whole run, answered or not (None: as many as come with this one).
    """

    key: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    seed: int = 0
    truncated: int = 0
    end_of_thinking: str | None = None
    asked: int | None = None


@dataclass(frozen=True)
class DraftPolicy:
    """What the size of a row's drafts depends on, beside weights and prompt.

    slot_budget: as set; None: drafts follow measured time, so that forwards and slots differ from run to run.
    rows: that share a forward in the marginal cost of a slot.
    drafts: whether steps drafted when the row finished.  drafting_rate, plain_rate: tokens a second of one row that
    decided it, with drafts and without; None where not measured.
    """

    slot_budget: int | None
    rows: int
    drafts: bool = True
    drafting_rate: float | None = None
    plain_rate: float | None = None

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """As a sample stores it: what was measured only where drafts follow it."""
        measured = vars(self) if self.slot_budget is None else {}
        return {"slot_budget": self.slot_budget, "rows": self.rows, **measured}


@dataclass
class Trace:
    """The cost of one answer.

    forwards: forwards the row took part in, by kind.
    slots: slots fed for it over all of them. A shared prefix counts as if the row had prefilled it alone.
    predicted, accepted: one entry a step, the bonus token counted in both: tokens on the draft's likeliest path, after
    the draft policy has cut the K-head's stride; tokens the answer grew by. Empty for decoders without strides.
    expected: tokens that each step was expected to bring, the bonus token counted, by the probabilities of its whole
    draft tree; 1.0 where there is no such estimate.
    written: for each token of the answer the forward that wrote it, counted from 1 over `forwards` of all kinds. Slots
    of a canvas or block name the denoise forward that wrote them.
    rejected: what verification or the confidence threshold rejected of a draft's likeliest path: (forward, index in the
    answer of the first token, ids). Rejected sibling candidates are not listed, so this is no count of all rejections.
    """

    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    slots: int = 0
    predicted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    rejected: list[tuple[int, int, list[int]]] = field(default_factory=list)

    def add_forward(self, kind: Kind, slots: int) -> None:
        """Count one forward in which the row fed `slots` slots."""
        self.forwards[kind] += 1
        self.slots += slots


@dataclass(frozen=True)
class RowForward:
    """One row's part of one forward, as `Engine.watch` receives it.

    key: of the row's request.  ids, positions: of the S slots fed.
    anchors: position of the token that a slot of a mask block is anchored at, None for tokens.
    tokens: ids the answer grew by.
    """

    key: str
    kind: Kind
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    anchors: tuple[int | None, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    ids: the answer's tokens, up to the first end-of-sequence id (excluded) or the token that completes a stop string
    (included).  text: decoded, behind the thinking, before the stop string.
    seconds: the row's share of the engine's time. Its sum over rows is the time spent, whatever the batch size.
    draft_policy: None where drafts depend on weights and prompt alone.
    """

    key: str
    ids: tuple[int, ...]
    text: str
    finish: Finish
    trace: Trace
    seconds: float
    prompt_tokens: int = 0
    truncated: int = 0
    draft_policy: DraftPolicy | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Continuations to score: pairs of (context ids, continuation ids), usually one context with several choices.

    seed: of this request's own random numbers, for Monte-Carlo estimates.
    """

    key: str
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Log-likelihood of each pair's continuation (nats, summed over its tokens), and whether it is the argmax.

    greedy: of an estimate, whether the argmax of all masked tokens at once is the continuation.
    errors: standard errors of estimates (None of a single sample); empty where log-likelihoods are exact.
    """

    key: str
    loglikelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    trace: Trace
    seconds: float
    prompt_tokens: int = 0
    truncated: int = 0
    errors: tuple[float | None, ...] = ()
