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
from itertools import pairwise

import numpy as np

from ..tokens import UNFINISHED, Tokenizer, after_last, cut_at_stops, has_stop
from .records import DraftPolicy, Generation, Request
from .rows import Rows
from .strategy import Feed, OneEach, Updates

STOP_CONTEXT = 8
"""Tokens decoded before a possible stop string, so that characters and words that tokens split come out complete."""
KNOWN = 2**12
"""Token ids that there is room for at first."""


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


class AnswerRules:
    """Extends answers up to their end, and decodes them."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._stop_rules: dict[tuple[str, ...], _StopRule] = {}
        # Seen so far: tokens that end no answer, whatever its stop strings; and pairs whose second does not.
        self._is_harmless = np.zeros(KNOWN, bool)  # by token
        self._harmless_pairs = set[tuple[int, ...]]()

    def prepare(self, requests: Iterable[Request]) -> None:
        """Learn the stop strings of requests, before any of their answers begins."""
        for request in requests:
            if request.stops and (stops := tuple(request.stops)) not in self._stop_rules:
                self._stop_rules[stops] = _StopRule(self._tokenizer, stops)
                self._is_harmless[:] = False
                self._harmless_pairs.clear()

    def commit(self, rows: Rows, at: slice, updates: Updates | OneEach, feed: Feed | None, seconds: float) -> None:
        """Extend the answers of the rows `at`, see `Rows.extend`. Sets `finish` where an answer ends."""
        # 1) most tokens end no answer, and most others none behind the token that they follow
        ends = rows.extend(at, updates, feed, seconds, self._is_harmless)
        for number in sorted({row for row, *pair in ends if tuple(pair) not in self._harmless_pairs}):
            grown = 1 if isinstance(updates, OneEach) else int(updates.lengths[number])
            self._end(rows, at.start + number, int(rows.lengths[at.start + number]) - grown)
        # 2) a full canvas ends an answer that nothing else ends
        if isinstance(updates, Updates) and updates.is_full is not None:
            for number in updates.is_full.nonzero()[:, 0].tolist():
                rows.finish.setdefault(at.start + number, "length")

    def generation(self, rows: Rows, row: int, draft_policy: DraftPolicy | None) -> Generation:
        """The record of a finished row."""
        request, ids = rows.requests[row], rows.latest(row, 0)
        return Generation(
            key=request.key,
            ids=tuple(ids),
            text=cut_at_stops(self._text(ids, request.end_of_thinking), request.stops),
            finish=rows.finish[row],
            trace=rows.trace(row),
            seconds=float(rows.seconds[row]),
            prompt_tokens=len(request.prompt),
            truncated=request.truncated,
            draft_policy=draft_policy,
        )

    def _end(self, rows: Rows, row: int, before: int) -> None:
        """Cut an answer that has grown from `before` tokens at its end: an end-of-sequence id, a stop string, or the
        length limit.
        """
        request, limit = rows.requests[row], int(rows.limits[row])
        last, tokens = rows.latest(row, max(before - 1, 0))[: min(before, 1)], rows.latest(row, before)
        self._learn(last, tokens)
        # 1) an end-of-sequence id, which is not of the answer, or the limit
        end = next((place for place, token in enumerate(tokens) if token in self._end_ids), None)
        rows.lengths[row] = min(before + (len(tokens) if end is None else end), limit)
        # 2) a stop string before that
        stopped = self._stop_length(rows, row, before) if request.stops else None
        if stopped is not None:
            rows.lengths[row], rows.finish[row] = stopped, "stop"
        elif end is not None and before + end < limit:
            rows.finish[row] = "eos"
        elif rows.lengths[row] >= limit:
            rows.finish[row] = "length"

    def _learn(self, last: list[int], tokens: list[int]) -> None:
        """Which of these tokens end no answer.  last: the token before them, if any."""
        rules, largest = self._stop_rules.values(), max(tokens, default=0)
        if largest >= len(self._is_harmless):
            self._is_harmless = np.append(self._is_harmless, np.zeros(largest, bool))
        for token in tokens:
            if not self._is_harmless[token] and token not in self._end_ids:
                if not any(rule.may_complete(token) for rule in rules):
                    self._is_harmless[token] = True
                elif last and not any(rule.may_complete(*last, token) for rule in rules):
                    self._harmless_pairs.add((*last, token))
            last = [token]

    def _stop_length(self, rows: Rows, row: int, before: int) -> int | None:
        """Tokens of the shortest answer that holds a stop string behind its thinking, if more than `before`."""
        request, marker = rows.requests[row], rows.requests[row].end_of_thinking
        stops = tuple(request.stops)
        rule = self._stop_rules[stops]
        # 1) most tokens complete none, whatever stands before them, and most others none behind the token that does;
        #    what is left is decoded with a few tokens before it
        latest = rows.latest(row, max(before - 1, 0))
        pairs = pairwise(latest)
        if before and not any(rule.may_complete(token) and rule.may_complete(one, token) for one, token in pairs):
            return None
        # 2) the first that does. Each length is looked at: the beginning of a character may take a stop string away
        #    again where a tokenizer spells both by bytes
        first, ids = max(0, before - rule.context), rows.latest(row, 0)
        for length in range(before + 1, len(ids) + 1):
            is_near = has_stop(self._decode(ids[first:length], special=True), stops)
            if is_near and has_stop(after_last(self._decode(ids[:length], special=True), marker), stops):
                return length
        return None

    def _text(self, ids: list[int], marker: str | None) -> str:
        """Decoded answer: all of it, or what follows the end of thinking, less leading white space."""
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
