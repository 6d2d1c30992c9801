"""Token ids by text. No id is ever written into a code path; they are looked up here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .errors import ConfigError

Tokenizer = Any
"""A Hugging Face tokenizer (transformers is imported elsewhere)."""
THINK_ENDS = ("</think>", "[unused17]", "[/THINK]", "</seed:think>")
"""What closes a chain of thought: Qwen3's and DeepSeek's, openPangu's, Magistral's, Seed-OSS's spelling."""


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
