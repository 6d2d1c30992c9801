"""End rules and text of an answer: end-of-sequence ids, stop strings, the length limit, thinking. The same for every
decoder, so that their answers compare.

Example: prompt "Q: 6*7?\\n", stops ("\\n",), end_of_thinking "</think>"

    generated     "6*7 is\\n42</think> 42\\nQ: ..."
    ids kept      up to and including the token that completes the first "\\n" behind "</think>"
    text          "42", finish "stop"
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..tokens import UNFINISHED, Tokenizer, after_last, cut_at_stops, has_stop
from .records import DraftPolicy, Finish, Generation, Request, Trace
from .strategy import Updates

STOP_CONTEXT = 8
"""Tokens decoded before a possible stop string, so that characters and words that tokens split come out complete."""


class _StopRule:
    """Which tokens may complete one of some stop strings, by their text. They are decoded as they come, once.

    context: tokens to decode before a token to see a whole stop string: one of n bytes spans n tokens at most.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        # A tokenizer that cleans up takes spaces away from text before; a token's bytes may turn into UNFINISHED.
        cleans_up = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._always = cleans_up or any(UNFINISHED in stop for stop in stops)
        self._known: dict[tuple[int, ...], bool] = {}
        self.context = max(len(stop.encode()) for stop in stops) + STOP_CONTEXT

    def may_complete(self, *tail: int) -> bool:
        """Whether an answer that ends in these tokens may hold a stop string that it did not hold before the last."""
        known = self._known.get(tail)
        if known is None:
            text = self._tokenizer.decode(list(tail), skip_special_tokens=False)
            known = self._known[tail] = self._always or not text or UNFINISHED in text or self._ends_in(text)
        return known

    def _ends_in(self, text: str) -> bool:
        """Whether a stop string may end inside a text, or right behind it, whatever stands before it: a space where
        decoders have taken one away.
        """
        parts = [form[:end] for form in (text, f" {text}") for end in range(1, len(form) + 1)]
        return any(part.endswith(stop) or stop.endswith(part) for part in parts for stop in self._stops)


@dataclass
class RowState:
    """A row of the batch: its request, its cached tokens and its answer so far.

    shared: tokens of its prompt that other prompts share.  cached: tokens in the KV cache.  forwards: that it took part
    in.
    """

    request: Request
    shared: int = 0
    cached: int = 0
    forwards: int = 0
    ids: list[int] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    seconds: float = 0.0
    finish: Finish | None = None

    @property
    def shared_prefix(self) -> tuple[int, ...]:
        return self.request.prompt[: self.shared]


class AnswerRules:
    """Extends answers up to their end, and decodes them."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._stop_rules: dict[tuple[str, ...], _StopRule] = {}
        # Seen so far: tokens that end no answer, whatever its stop strings; and pairs whose second does not.
        self._harmless, self._harmless_pairs = set[int](), set[tuple[int, ...]]()

    def prepare(self, requests: Iterable[Request]) -> None:
        """Learn the stop strings of requests, before any of their answers begins."""
        for request in requests:
            if request.stops and (stops := tuple(request.stops)) not in self._stop_rules:
                self._stop_rules[stops] = _StopRule(self._tokenizer, stops)
                self._harmless.clear()
                self._harmless_pairs.clear()

    def commit(self, rows: Sequence[RowState], updates: Updates) -> None:
        """Extend rows' answers by their updates and record them in their traces. Sets `finish` where an answer ends."""
        ages, strides, expected, rejected = updates.ages, updates.strides, updates.expected, updates.rejected
        for number, (row, tokens) in enumerate(zip(rows, updates.tokens, strict=True)):
            trace, before = row.trace, len(row.ids)
            # 1) Tokens up to the end of the answer: of most steps all of them, which takes one look.
            if before + len(tokens) < row.request.max_new_tokens and self._are_harmless(row, tokens):
                row.ids += tokens
                grown = len(tokens)
            else:
                self._append(row, tokens)
                grown = len(row.ids) - before
            # 2) The forward that wrote each of them.
            if ages is None:
                trace.written += [row.forwards] * grown
            else:
                trace.written += [row.forwards - age for age in ages[number][:grown]]
            # 3) The step's stride beside what the answer grew by.
            if strides is not None and (stride := strides[number]) is not None:
                trace.predicted.append(stride)
                trace.accepted.append(grown)
                trace.expected.append(1.0 if expected is None else expected[number])
            # 4) Draft tokens rejected in favour of one of these tokens.
            if rejected is not None and (missed := rejected[number]) is not None:
                age = ages[number][missed.place] if ages is not None and missed.place < len(ages[number]) else 0
                _add_rejected(row, before + missed.place, missed.ids, age)
            # 5) A full canvas ends an answer that nothing else ends.
            if updates.is_full is not None and updates.is_full[number] and row.finish is None:
                row.finish = "length"

    def generation(self, row: RowState, draft_policy: DraftPolicy | None) -> Generation:
        """The record of a finished row."""
        request = row.request
        return Generation(
            key=request.key,
            ids=tuple(row.ids),
            text=cut_at_stops(self._text(row), request.stops),
            finish=row.finish or "length",
            trace=row.trace,
            seconds=row.seconds,
            prompt_tokens=len(request.prompt),
            truncated=request.truncated,
            draft_policy=draft_policy,
        )

    def _are_harmless(self, row: RowState, tokens: list[int]) -> bool:
        """Whether these tokens are known not to end a row's answer, wherever they are cut."""
        if self._harmless.issuperset(tokens):
            return True
        if not row.ids:
            return False
        pairs = zip((row.ids[-1], *tokens), tokens, strict=False)
        return all(pair[1] in self._harmless or pair in self._harmless_pairs for pair in pairs)

    def _append(self, row: RowState, tokens: list[int]) -> None:
        """Append tokens up to the answer's end: an end-of-sequence id, a stop string, or the length limit."""
        limit, before = row.request.max_new_tokens, len(row.ids)
        self._learn(row.ids[-1:], tokens)
        end = None
        if not self._end_ids.isdisjoint(tokens):
            end = next(index for index, token in enumerate(tokens) if token in self._end_ids)
        row.ids += tokens[:end][: limit - before]
        stopped = self._stop_length(row, before) if row.request.stops else None
        if stopped is not None:
            del row.ids[stopped:]
            row.finish = "stop"
        elif end is not None and before + end < limit:
            row.finish = "eos"
        elif len(row.ids) >= limit:
            row.finish = "length"

    def _learn(self, before: list[int], tokens: list[int]) -> None:
        """Which of these tokens end no answer.  before: the token before them, if any."""
        rules = self._stop_rules.values()
        for token in tokens:
            if token not in self._harmless and token not in self._end_ids:
                if not any(rule.may_complete(token) for rule in rules):
                    self._harmless.add(token)
                elif before and not any(rule.may_complete(*before, token) for rule in rules):
                    self._harmless_pairs.add((*before, token))
            before = [token]

    def _stop_length(self, row: RowState, before: int) -> int | None:
        """Tokens of the shortest answer that holds a stop string behind its thinking, if more than `before`."""
        stops, marker = tuple(row.request.stops), row.request.end_of_thinking
        rule = self._stop_rules[stops]
        # 1) most tokens complete none, whatever stands before them, and most others none behind the token that does;
        #    what is left is decoded with a few tokens before it
        pairs = zip(row.ids[before - 1 :], row.ids[before:], strict=False) if before else ()
        if before and not any(rule.may_complete(token) and rule.may_complete(one, token) for one, token in pairs):
            return None
        # 2) the first that does. Each length is looked at: the beginning of a character may take a stop string away
        #    again where a tokenizer spells both by bytes
        first = max(0, before - rule.context)
        for length in range(before + 1, len(row.ids) + 1):
            is_near = has_stop(self._decode(row.ids[first:length], special=True), stops)
            if is_near and has_stop(after_last(self._decode(row.ids[:length], special=True), marker), stops):
                return length
        return None

    def _text(self, row: RowState) -> str:
        """Decoded answer: all of it, or what follows the end of thinking, less leading white space."""
        ids, marker = row.ids, row.request.end_of_thinking
        text = self._decode(ids)
        if marker is None:
            return text
        count = self._decode(ids, special=True).count(marker)
        if text.count(marker) < count:
            # The marker is a special token, which no text shows: cut the ids behind its last occurrence instead.
            first = bisect_left(range(len(ids)), count, key=lambda n: self._decode(ids[:n], special=True).count(marker))
            return self._decode(ids[first:]).lstrip()
        return after_last(text, marker).lstrip()

    def _decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of ids. Stop strings may be special tokens, which the answer's text leaves out (as in lm-eval)."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        return text


def _add_rejected(row: RowState, index: int, drafts: list[int], age: int) -> None:
    """Record the draft tokens that could have stood in the answer: none past its end.

    index: in the answer, of the first.  age: forwards since the token in its place was written.
    """
    drafts = drafts[: row.request.max_new_tokens - index]
    # An end-of-sequence id is not among the ids, but takes one place behind them.
    places = len(row.ids) + (row.finish in (None, "eos"))
    if drafts and index < places:
        row.trace.rejected.append((row.forwards - age, index, drafts))
