"""Token ids by text. No id is ever written into a code path; they are looked up here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

from .common.errors import ConfigError

Tokenizer = Any
"""A Hugging Face tokenizer (transformers is imported elsewhere)."""
THINK_ENDS = ("</think>", "[unused17]", "[/THINK]", "</seed:think>")
"""What closes a chain of thought: Qwen3's and DeepSeek's, openPangu's, Magistral's, Seed-OSS's spelling."""

UNFINISHED = "\ufffd"
"""What stands for bytes that spell no character (yet)."""


def single_id(tokenizer: Tokenizer, text: str, what: str = "mask token") -> int:
    """The id of a token spelled exactly `text`.  what: how a message calls it.

    Raises ConfigError if the tokenizer would need several tokens for it, or does not know it.
    """
    found = tokenizer.get_vocab().get(text)
    if found is None:
        raise ConfigError(f"{what} {text!r} is not one token of this tokenizer ({len(tokenizer)} tokens)")
    return int(found)


def think_end(tokenizer: Tokenizer) -> str | None:
    """The token that closes a chain of thought, or None if this tokenizer has none of those known."""
    vocabulary = tokenizer.get_vocab()
    return next((text for text in THINK_ENDS if text in vocabulary), None)


def end_ids(tokenizer: Tokenizer, *configs: Any) -> tuple[int, ...]:
    """Every id that ends an answer: from the tokenizer and from model and generation configs, sorted.

    Raises ConfigError if one of them is no id.
    """
    found: list[Any] = []
    for holder in (tokenizer, *configs):
        value = getattr(holder, "eos_token_id", None)
        found += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if wrong := [value for value in found if not isinstance(value, int)]:
        raise ConfigError(f"eos_token_id={wrong[0]!r} is no token id; name the end with model.end_tokens")
    return tuple(sorted(set(found)))


def encodable(text: str) -> str:
    """Text without lone surrogates, which no encoding and no tokenizer takes: replacement characters instead."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def after_last(text: str, mark: str | None) -> str:
    """Text after the last `mark`: none where it is missing, all of it where there is no mark to look for."""
    return text if not mark else text.rpartition(mark)[2] if mark in text else ""


def cut_at_stops(text: str, stops: Iterable[str]) -> str:
    """Text before the first stop string, cutting by each in turn as lm-eval does."""
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text


def has_stop(text: str, stops: Iterable[str]) -> bool:
    """Whether any stop string occurs in the text."""
    return any(stop and stop in text for stop in stops)


def spell(
    tokenizer: Tokenizer, ids: tuple[int, ...], drafts: Sequence[tuple[int, Sequence[int]]] = ()
) -> tuple[list[str], list[str]]:
    """What each token adds to the text of all, and what drafts would have added; special tokens are shown.

    The first, joined, are the text of all. A character that several tokens spell goes to the first of them.
    drafts: place among `ids` where they would have stood, and their own ids.
    """
    alone = _texts(tokenizer, {(i,) for i in ids})
    starts = [0]  # what a token adds shows behind the nearest one before it that spells whole characters
    for place, i in enumerate(ids):
        starts.append(starts[-1] if UNFINISHED in alone[i,] else place)
    windows = [(ids[start:i], ids[start : i + 1]) for i, start in enumerate(starts[:-1])]
    others = [(ids[starts[place] : place], (*ids[starts[place] : place], *draft)) for place, draft in drafts]
    texts = alone | _texts(tokenizer, {part for pair in windows + others for part in pair} - alone.keys())
    whole: str = tokenizer.decode(ids, skip_special_tokens=False)
    ends = list(accumulate(len(texts[after]) - len(texts[before]) for before, after in windows))
    if ends and ends[-1] != len(whole):  # this tokenizer looks further
        ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=False)) for i in range(len(ids))]
    ends = [*accumulate(reversed(ends), min)][::-1]  # what later tokens do not change
    pieces = [whole[start:end] for start, end in pairwise([0, *ends])]
    return pieces, [_added(texts[before], texts[after]) for before, after in others]


def _added(before: str, after: str) -> str:
    """What a longer text has more, the end of an unfinished character included."""
    return after[len(before if after.startswith(before) else before.rstrip(UNFINISHED)) :]


def _texts(tokenizer: Tokenizer, parts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], str]:
    """Texts of many short runs of ids; all in one call where the tokenizer can."""
    distinct = list(dict.fromkeys(parts))
    if tokenizer.is_fast:
        texts = tokenizer.backend_tokenizer.decode_batch(distinct, skip_special_tokens=False)
    else:
        texts = [tokenizer.decode(part, skip_special_tokens=False) for part in distinct]
    return dict(zip(distinct, texts, strict=True))
