"""The files that make a model: where they lie, what they say it is, its configuration and tokenizer. No weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from . import hub, legacy, spm
from .errors import ConfigError
from .legacy import Published
from .manifest import MANIFEST_FILE, Manifest, Method, read_manifest
from .tokens import Tokenizer


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
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.base / 'config.json'}: not a Llama-shaped model: {reason}") from error

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
        named = legacy.own_classes(self.base, "config.json") if self.published.llama is None else []
        named += legacy.own_classes(self.folder, "tokenizer_config.json")
        return sorted(set(named)) if self.trust else []


def find(path: str, *, weights: bool, method: Method | None = None, trust: bool = False) -> Source:
    """Look at a model's files. An adapter's parent is a hub id or a folder, relative to the adapter's.

    path: a folder or a hub id.  weights: whether weights are wanted too.  method: what the user says it was adapted to.
    trust: whether code of the repository may run.
    Raises ConfigError for a path that is no model and for files that say nothing clear.
    """
    folder = hub.local(path, weights=weights, code=trust)
    manifest = read_manifest(folder)
    if manifest is None:
        parent = legacy.adapter_parent(folder)
    else:
        parent = manifest.parent if manifest.weights == "adapter" else None
        if method not in (None, manifest.method):
            raise ConfigError(f"model.method={method}: {folder / MANIFEST_FILE} says {manifest.method}")
    base = folder
    if parent is not None:
        beside = folder / parent
        base = beside if beside.is_dir() else hub.local(parent, weights=weights, code=trust)
        parent = str(base) if beside.is_dir() else parent
    published = legacy.read_published(base, parent or path, method)
    bare = base != folder and published.method is None
    if method is None and (bare or (folder / legacy.HEAD_FILE).is_file()):
        published = replace(published, method="fluid")
    return Source(folder, base, parent, manifest, published, trust)


def _read_tokenizer(folder: Path, trust: bool) -> Tokenizer:
    if trust or not legacy.own_classes(folder, "tokenizer_config.json"):
        return from_pretrained(AutoTokenizer, folder, trust)
    if (folder / "tokenizer.json").is_file():
        tokenizer = from_pretrained(PreTrainedTokenizerFast, folder)
        tokenizer.init_kwargs.pop("auto_map", None)  # else it would be saved with a name for code that is not there
        return tokenizer
    if (folder / spm.MODEL_FILE).is_file():
        return spm.load_sentencepiece(folder)
    raise ConfigError(
        f"model={folder}: no tokenizer.json and no {spm.MODEL_FILE}; its tokenizer is code of the repository, "
        "which runs with --trust-remote-code alone"
    )


def from_pretrained(auto: Any, source: Path, trust: bool = False, **options: Any) -> Any:
    """transformers' own loading, its errors told in one line.  trust: whether code of the repository may run."""
    try:
        return auto.from_pretrained(str(source), trust_remote_code=trust, **options)
    except Exception as error:  # broken files raise whatever the libraries below happen to trip over
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        what = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ConfigError(f"model={source}: {what}{reason.strip()}") from error
