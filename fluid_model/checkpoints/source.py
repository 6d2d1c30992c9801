"""The files that make a model: where they lie, what they say it is, its configuration and tokenizer. No weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from ..common.errors import ConfigError, reason
from ..tokens import Tokenizer
from . import hub, published_layouts, sentencepiece
from .manifest import MANIFEST_FILE, Manifest, Method, read_manifest
from .published_layouts import Published

TOKENIZER_FILES = (
    "tokenizer.json",
    sentencepiece.MODEL_FILE,
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "vocab-src.json",
)
"""Any of these makes a tokenizer; the first two are read here."""


@dataclass(frozen=True)
class Source:
    """folder: what the user named.  base: where the weights are; another for an adapter.
    parent: what an adapter's folder calls its base.  method: what all of it was adapted to.  trust: whether code of the
    repository may run where nothing here reads its layout.
    """

    folder: Path
    base: Path
    parent: str | None
    manifest: Manifest | None
    published: Published
    trust: bool = False

    @property
    def adapted(self) -> bool:
        """Whether the folder is a PEFT adapter, or holds one beside its weights."""
        return self.manifest is None and (self.folder / published_layouts.ADAPTER_FILE).is_file()

    @property
    def method(self) -> Method | None:
        return self.manifest.method if self.manifest else self.published.method

    @cached_property
    def config(self) -> PretrainedConfig:
        """transformers' configuration of the base. Raises ConfigError if it is no language model known here."""
        if self.published.llama is None:
            return from_pretrained(AutoConfig, self.base, self.trust)
        try:
            return LlamaConfig(**self.published.llama)
        except Exception as error:  # transformers' validation errors share no type
            raise ConfigError(f"{self.base / 'config.json'}: not a Llama-shaped model: {reason(error)}") from error

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer, or its base's if it is a bare adapter without one."""
        try:
            return _read_tokenizer(self.folder, self.trust)
        except ConfigError:
            if self.manifest is not None or self.base == self.folder:
                raise
            return _read_tokenizer(self.base, self.trust)

    @property
    def remote_code(self) -> list[str]:
        """Classes of the repository that run: none unless it is trusted."""
        named = published_layouts.own_classes(self.base, "config.json") if self.published.llama is None else []
        named += published_layouts.own_classes(self.folder, "tokenizer_config.json")
        return sorted(set(named)) if self.trust else []


def find(
    path: str, *, weights: bool, method: Method | None = None, trust: bool = False, base: str | None = None
) -> Source:
    """Look at a model's files. An adapter's parent is a hub id or a folder, relative to the adapter's.

    path: a folder or a hub id.  weights: whether weights are wanted too.  method: what the user says it was adapted to.
    trust: whether code of the repository may run.  base: what an adapter is put into, instead of what it names.
    Raises ConfigError for a path that is no model and for files that say nothing clear.
    """
    folder = hub.local(path, weights=weights, code=trust)
    manifest = read_manifest(folder)
    if manifest is None:
        parent = published_layouts.adapter_parent(folder, base)
    else:
        parent = manifest.parent if manifest.weights == "adapter" else None
        if method not in (None, manifest.method):
            raise ConfigError(f"model.method={method}: {folder / MANIFEST_FILE} says {manifest.method}")
    if base is not None and parent is None:
        raise ConfigError(f"model.base={base}: {path} is no adapter and holds all its weights")
    place = folder
    if parent is not None:
        place, parent = _parent(folder, parent, weights, trust) if base is None else (
            hub.local(base, weights=weights, code=trust), base,
        )  # fmt: skip
    published = published_layouts.read_published(place, parent or path, method)
    if published.method is None and (folder / published_layouts.HEAD_FILE).is_file():
        published = replace(published, method="fluid")
    return Source(folder, place, parent, manifest, published, trust)


def _parent(folder: Path, named: str, weights: bool, trust: bool) -> tuple[Path, str]:
    """Where the model lies that an adapter's folder names, and what to call it. Raises ConfigError with the way out."""
    try:
        beside = (folder / named).is_dir()
        place = folder / named if beside else hub.local(named, weights=weights, code=trust)
    except ConfigError as error:
        raise ConfigError(
            f"{folder}: an adapter over {named!r}: {error}; --set model.base=FOLDER names another"
        ) from error
    if not (place / "config.json").is_file():
        raise ConfigError(f"{folder}: an adapter over {named!r}, which holds no config.json: merge that one first")
    return place, str(place) if beside else named


def _read_tokenizer(folder: Path, trust: bool) -> Tokenizer:
    """tokenizer.json, else tokenizer.model, whatever class the configuration names; else what transformers finds."""
    own = [] if trust else published_layouts.own_classes(folder, "tokenizer_config.json")
    if not trust and not (folder / "tokenizer.json").is_file() and (folder / sentencepiece.MODEL_FILE).is_file():
        return sentencepiece.load_sentencepiece(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        why = "; its tokenizer is code of the repository, which runs with --trust-remote-code alone" if own else ""
        if own or not trust:
            raise ConfigError(f"model={folder}: no tokenizer here: neither {' nor '.join(TOKENIZER_FILES[:2])}{why}")
    elif own:
        tokenizer = from_pretrained(PreTrainedTokenizerFast, folder)
        tokenizer.init_kwargs.pop("auto_map", None)  # else it would be saved with a name for code that is not there
        return _checked(tokenizer, folder)
    return _checked(from_pretrained(AutoTokenizer, folder, trust), folder)


def _checked(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer, once it has spelled a word: a configuration that it cannot work with shows only then."""
    try:
        tokenizer("a")
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # whatever the libraries below trip over
        raise ConfigError(
            f"model={folder}: its tokenizer does not work: {type(error).__name__}: {reason(error)}"
        ) from error
    return tokenizer


def from_pretrained(auto: Any, source: Path, trust: bool = False, **options: Any) -> Any:
    """transformers' own loading, its errors told in one line.  trust: whether code of the repository may run."""
    try:
        return auto.from_pretrained(str(source), trust_remote_code=trust, **options)
    except Exception as error:  # broken files raise whatever the libraries below happen to trip over
        what = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ConfigError(f"model={source}: {what}{reason(error)}") from error
