"""Token ids and text: special tokens looked up by their text, answers cut at stop strings, text pieces of tokens.

No token id is written in code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .common.errors import ConfigError

Tokenizer = Any
"""A Hugging Face tokenizer (transformers is imported elsewhere)."""
THINK_ENDS = ("</think>", "[unused17]", "[/THINK]", "</seed:think>")
"""End markers of a chain of thought: of Qwen3 and DeepSeek, openPangu, Magistral, Seed-OSS."""
UNFINISHED = "\ufffd"
"""The replacement character, which decoders write for the bytes of an incomplete character."""


def single_id(tokenizer: Tokenizer, text: str, what: str = "mask token") -> int:
    """The id of the token with exactly this text.  what: its name in messages.

    Raises ConfigError if the vocabulary has no such token.
    """
    token = tokenizer.get_vocab().get(text)
    if token is None:
        raise ConfigError(f"{what} {text!r} is not one token of this tokenizer ({len(tokenizer)} tokens)")
    return int(token)


def think_end(tokenizer: Tokenizer) -> str | None:
    """The end marker of a chain of thought, or None if the vocabulary has none of THINK_ENDS."""
    vocabulary = tokenizer.get_vocab()
    return next((text for text in THINK_ENDS if text in vocabulary), None)


def end_ids(tokenizer: Tokenizer, *configs: Any) -> tuple[int, ...]:
    """All end-of-sequence ids of the tokenizer and of model and generation configs, sorted.

    Raises ConfigError if one of them is no id.
    """
    ids: list[Any] = []
    for holder in (tokenizer, *configs):
        value = getattr(holder, "eos_token_id", None)
        if isinstance(value, (list, tuple)):
            ids += value
        elif value is not None:
            ids.append(value)
    for value in ids:
        if not isinstance(value, int):
            raise ConfigError(f"eos_token_id={value!r} is no token id; name the end with model.end_tokens")
    return tuple(sorted(set(ids)))


def encodable(text: str) -> str:
    """Text with replacement characters for lone surrogates, which neither UTF-8 nor a tokenizer encodes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def after_last(text: str, mark: str | None) -> str:
    """Text after the last `mark`; empty where the text has none. Without a mark, all of the text."""
    if not mark:
        return text
    return text.rpartition(mark)[2] if mark in text else ""


def cut_at_stops(text: str, stops: Iterable[str]) -> str:
    """Text before the first stop string; cut at each stop in turn, as lm-eval does."""
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text


def has_stop(text: str, stops: Iterable[str]) -> bool:
    """Whether the text contains a stop string."""
    return any(stop and stop in text for stop in stops)


def decode_pieces(
    tokenizer: Tokenizer, ids: tuple[int, ...], drafts: Sequence[tuple[int, Sequence[int]]] = ()
) -> tuple[list[str], list[str]]:
    """The text that each token adds to an answer, and the text that rejected drafts would have added.

    drafts: (index among `ids` of the draft's first token, its ids).
    The pieces of the answer, joined, are its text, special tokens included. A character of several tokens belongs to
    the first of them: bytes E2 82 AC as three tokens give the pieces "\u20ac", "", "".
    """
    # 1) each token is decoded behind the nearest token before it that decodes to complete characters by itself
    single = _decode_all(tokenizer, {(i,) for i in ids})
    starts = [0]
    for index, i in enumerate(ids):
        is_complete = UNFINISHED not in single[i,]
        starts.append(index if is_complete else starts[-1])
    windows = [(ids[start:index], ids[start : index + 1]) for index, start in enumerate(starts[:-1])]
    draft_windows = []
    for index, draft in drafts:
        before = ids[starts[index] : index]
        draft_windows.append((before, (*before, *draft)))
    distinct = {part for window in windows + draft_windows for part in window}
    texts = single | _decode_all(tokenizer, distinct - single.keys())
    # 2) where each token's text ends in the answer; a tokenizer with longer context needs every prefix decoded
    answer: str = tokenizer.decode(ids, skip_special_tokens=False)
    ends = list(accumulate(len(texts[after]) - len(texts[before]) for before, after in windows))
    if ends and ends[-1] != len(answer):
        ends = [len(tokenizer.decode(ids[: index + 1], skip_special_tokens=False)) for index in range(len(ids))]
    # 3) text that later tokens replace does not count
    ends = [*accumulate(reversed(ends), min)][::-1]
    pieces = [answer[start:end] for start, end in pairwise([0, *ends])]
    return pieces, [_added_text(texts[before], texts[after]) for before, after in draft_windows]


def _added_text(before: str, after: str) -> str:
    """The end of a longer text, with the rest of a character that was incomplete."""
    return after[len(before if after.startswith(before) else before.rstrip(UNFINISHED)) :]


def _decode_all(tokenizer: Tokenizer, parts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
    """Texts of many short id sequences, in one call of a fast tokenizer."""
    distinct = list(dict.fromkeys(parts))
    if tokenizer.is_fast:
        texts = tokenizer.backend_tokenizer.decode_batch(distinct, skip_special_tokens=False)
    else:
        texts = [tokenizer.decode(part, skip_special_tokens=False) for part in distinct]
    return dict(zip(distinct, texts, strict=True))
