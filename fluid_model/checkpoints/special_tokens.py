"""Special tokens of a checkpoint: its mask and what ends an answer, by text or as its files record them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..tokens import Tokenizer, end_ids, single_id
from . import published_layouts
from .source import CheckpointFiles, find_checkpoint


@dataclass(frozen=True)
class SpecialTokens:
    """Texts and ids, as no weights are needed to know them.  mask: None where the model has none."""

    mask: tuple[str, int] | None
    ends: tuple[tuple[str, int], ...]


def read_special_tokens(
    path: str, method: str | None = None, *, trust_remote_code: bool = False, base: str | None = None
) -> SpecialTokens:
    """The special tokens of a folder or hub id.  method, trust_remote_code, base: see `checkpoint.load`.

    Raises ConfigError without a tokenizer, or where an adapted model has no mask token.
    """
    files = find_checkpoint(path, weights=False, method=method, trust=trust_remote_code, base=base)
    tokenizer, text = files.tokenizer, mask_text_of(files)
    generation = published_layouts.read_raw(files.base / "generation_config.json").get("eos_token_id")
    ends = answer_ends(tokenizer, files.method, files.config, SimpleNamespace(eos_token_id=generation))
    return SpecialTokens(
        mask=None if text is None else (text, single_id(tokenizer, text)),
        ends=tuple((str(tokenizer.convert_ids_to_tokens(end)), end) for end in ends),
    )


def mask_text_of(files: CheckpointFiles) -> str | None:
    """The mask token's text; None for a plain causal model. Raises ConfigError where an adapted model has none."""
    if files.manifest is not None:
        return files.manifest.mask_token
    return None if files.method is None else published_layouts.mask_text(files.tokenizer, files.published)


def answer_ends(
    tokenizer: Tokenizer, method: str | None, *configs: Any, texts: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Ids of the given end texts; without them, those of configurations, tokenizer and published method."""
    if texts is not None:
        return tuple(sorted(single_id(tokenizer, text, "end token") for text in texts))
    end_texts = published_layouts.END_TEXTS.get(method, ()) if method else ()
    vocabulary = tokenizer.get_vocab()
    published_ids = {vocabulary[text] for text in end_texts if text in vocabulary}
    return tuple(sorted(published_ids.union(end_ids(tokenizer, *configs))))
