"""What goes into the engine and what comes out: plain records, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prefill", "denoise", "verify", "commit", "round"]
KINDS: tuple[Kind, ...] = ("prefill", "denoise", "verify", "commit", "round")
"""Why a row took part in a forward: read the prompt; refine a canvas; check it; store keys of kept tokens; check drafts
and make the next ones at once.
"""

Finish = Literal["eos", "stop", "length", "broken"]
"""Why an answer ends. broken: the model's numbers were no longer finite (NaN or infinite), and there is no answer."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    prompt: token ids, already cut to the window.  max_new_tokens: ids to write at most.
    stops: strings that end the answer.  seed: of this row's own random numbers.
    end_of_thinking: text that ends a row's thinking (None: it does not think). Only what follows counts as the
    answer, and stop strings count only there.
    truncated: prompt tokens that were cut from the left to make room.
    asked: requests of the whole run this one is part of, answered or not (None: those it comes with).
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
    """What the number of drafts of an answer depended on, beside weights and prompt: the slot budget in force, and the
    rows that each slot's cost was reckoned for.
    """

    slot_budget: int
    rows: int


@dataclass
class Trace:
    """What it took to write one answer.

    forwards: forwards this row took part in, by kind.  slots: slots fed for it over all of them, its whole prompt
    included, also where its beginning was read once for several rows.
    predicted / accepted: stride drafted and tokens the answer grew by, one entry a round (empty for decoders without
    strides; the last round may lack its `accepted` where the answer ended first).
    written: for each token of the answer the forward that wrote it, counted from 1 over `forwards` of all kinds; where
    slots of a canvas are written one by one, the pass that wrote this one.
    rejected: drafts that verification or the confidence threshold threw out: (forward, place of the first in the
    answer, ids).
    """

    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    slots: int = 0
    predicted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    rejected: list[tuple[int, int, list[int]]] = field(default_factory=list)

    def count(self, kind: Kind, slots: int) -> None:
        """Book one forward in which this row fed `slots` slots."""
        self.forwards[kind] += 1
        self.slots += slots

    def write(self, ago: Sequence[int]) -> None:
        """Book tokens of the answer, each written so many forwards ago."""
        latest = sum(self.forwards.values())
        self.written += [latest - each for each in ago]

    def reject(self, place: int, ids: list[int], ago: int = 0) -> None:
        """Book drafts that were thrown out so many forwards ago."""
        self.rejected.append((sum(self.forwards.values()) - ago, place, ids))

    def forget(self) -> None:
        """There is no answer: only what was spent stays."""
        for each in (self.predicted, self.accepted, self.written, self.rejected):
            each.clear()


@dataclass(frozen=True)
class Step:
    """One forward as one row saw it, for whoever watches.

    key: the row's request.  ids, places: slots fed and the positions they stood at, (S,) each.  hung: for slots of a
    fan the position of the token it hangs on, None for others.  tokens: ids the answer grew by.
    """

    key: str
    kind: Kind
    ids: tuple[int, ...]
    places: tuple[int, ...]
    hung: tuple[int | None, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    ids: tokens written, up to (not including) the first end-of-sequence id, up to and including the token that
    completes a stop string.  text: theirs after the thinking, before the stop string.  prompt_tokens, truncated: as
    fed, as cut.
    seconds: this row's share of the engine's time, so that a sum over rows is time spent, whatever the batch was.
    draft_policy: None where drafts depend on nothing but weights and prompt.
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

    seed: of this request's own random numbers, where log-likelihoods are estimated.
    """

    key: str
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Log-likelihood (nats, summed over the continuation) and whether it is the greedy continuation, per pair.

    Of an estimate, greedy means all tokens at once, and is False where no sample masked them all.
    errors: standard errors of estimates, None of a single sample, empty where the log-likelihoods are exact.
    """

    key: str
    loglikelihoods: tuple[float, ...]
    greedy: tuple[bool, ...]
    trace: Trace
    seconds: float
    prompt_tokens: int = 0
    truncated: int = 0
    errors: tuple[float | None, ...] = ()
