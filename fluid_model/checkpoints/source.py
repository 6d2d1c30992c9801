"""The files of a checkpoint without its weights: folders, manifest, published layout, configuration, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..common.errors import ConfigError, reason
from ..tokens import Tokenizer
from . import field_layouts, hub, published_layouts, sentencepiece
from .manifest import MANIFEST_FILE, Manifest, read_manifest
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
"""Files of tokenizers; this project reads the first two, transformers the others."""
CONFIGS: dict[field_layouts.Architecture, type[PretrainedConfig]] = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
}  # fmt: skip


@dataclass(frozen=True)
class CheckpointFiles:
    """folder: the user's.  base: the folder with the base model's weights, another one for an adapter.

    parent: an adapter's name for its base.  trust: the repository's code may run where its layout is unknown here.
    """

    folder: Path
    base: Path
    parent: str | None
    manifest: Manifest | None
    published: Published
    trust: bool = False

    @property
    def adapted(self) -> bool:
        """Whether the folder holds a PEFT adapter, with or without weights beside it."""
        return self.manifest is None and (self.folder / published_layouts.ADAPTER_FILE).is_file()

    @property
    def method(self) -> str | None:
        return self.manifest.method if self.manifest else self.published.method

    @cached_property
    def config(self) -> PretrainedConfig:
        """transformers' configuration of the base. Raises ConfigError for an unknown architecture."""
        architecture = self.published.architecture
        if architecture is None:
            self._check_known()
            return from_pretrained(AutoConfig, self.base, self.trust)
        try:
            return CONFIGS[architecture](**self.published.fields)
        except Exception as error:  # transformers' validation errors share no type
            shape = architecture.capitalize()
            raise ConfigError(f"{self.base / 'config.json'}: not a {shape}-shaped model: {reason(error)}") from error

    def _check_known(self) -> None:
        """Raise ConfigError for a `model_type` that neither transformers nor a published layout knows."""
        model_type = published_layouts.read_raw(self.base / "config.json").get("model_type")
        if self.trust or not isinstance(model_type, str) or model_type in CONFIG_MAPPING:
            return
        raise ConfigError(
            f"model={self.base}: model_type {model_type!r} of config.json is unknown; known are transformers' own and "
            f"{published_layouts.known_layouts()}; --trust-remote-code runs the repository's code"
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; the base's for an adapter without one."""
        try:
            return _read_tokenizer(self.folder, self.trust, self._known_config)
        except ConfigError:
            if self.manifest is not None or self.base == self.folder:
                raise
            return _read_tokenizer(self.base, self.trust, self._known_config)

    @property
    def _known_config(self) -> PretrainedConfig | None:
        """The configuration of a published layout, whose `model_type` transformers does not know."""
        return self.config if self.published.layout else None

    @property
    def remote_code(self) -> list[str]:
        """Classes of the repository's code that run; none without trust."""
        named = published_layouts.own_classes(self.base, "config.json") if not self.published.layout else []
        named += published_layouts.own_classes(self.folder, "tokenizer_config.json")
        return sorted(set(named)) if self.trust else []


def find_checkpoint(
    path: str, *, weights: bool, method: str | None = None, trust: bool = False, base: str | None = None
) -> CheckpointFiles:
    """Find a checkpoint's files, and its base model's if it is an adapter.

    path: a folder or a hub id.  weights: weights are needed, too.  method: the adaptation, as the user states it.
    trust: the repository's code may run.  base: the base model, instead of the one that an adapter names.
    Raises ConfigError for a path that is no model, and for files that contradict the arguments.
    """
    # 1) the folder, its manifest, the name of its base
    folder = hub.local_folder(path, weights=weights, code=trust)
    manifest = read_manifest(folder)
    if manifest is None:
        parent = published_layouts.adapter_parent(folder, base)
    else:
        parent = manifest.parent if manifest.weights == "adapter" else None
        if method not in (None, manifest.method):
            raise ConfigError(f"model.method={method}: {folder / MANIFEST_FILE} says {manifest.method}")
    if base is not None and parent is None:
        raise ConfigError(f"model.base={base}: {path} is no adapter and holds all its weights")
    # 2) the base model's folder
    base_folder = folder
    if base is not None:
        base_folder, parent = hub.local_folder(base, weights=weights, code=trust), base
    elif parent is not None:
        base_folder, parent = _find_base(folder, parent, weights, trust)
    # 3) its layout; a published K-head identifies FLUID
    published = published_layouts.read_published(base_folder, parent or path, method)
    if published.method is None and published_layouts.head_file(folder) is not None:
        published = replace(published, method="fluid")
    return CheckpointFiles(folder, base_folder, parent, manifest, published, trust)


def _find_base(folder: Path, named: str, weights: bool, trust: bool) -> tuple[Path, str]:
    """The folder of the base that an adapter names, and its name in messages and manifests.

    named: a folder relative to the adapter's, or as in `hub.local_folder`. Raises ConfigError with the way out.
    """
    try:
        beside = (folder / named).is_dir()
        base_folder = folder / named if beside else hub.local_folder(named, weights=weights, code=trust)
    except ConfigError as error:
        raise ConfigError(
            f"{folder}: an adapter over {named!r}: {error}; --set model.base=FOLDER names another"
        ) from error
    if not (base_folder / "config.json").is_file():
        raise ConfigError(f"{folder}: an adapter over {named!r}, which holds no config.json: merge that one first")
    return base_folder, str(base_folder) if beside else named


def _read_tokenizer(folder: Path, trust: bool, config: PretrainedConfig | None = None) -> Tokenizer:
    """The tokenizer of tokenizer.json, else of tokenizer.model, else transformers' own choice.

    With `trust`, always transformers' choice, which may be a class of the repository.  config: of the model, where
    transformers cannot read it.
    """
    own = [] if trust else published_layouts.own_classes(folder, "tokenizer_config.json")
    if not trust and not (folder / "tokenizer.json").is_file() and (folder / sentencepiece.MODEL_FILE).is_file():
        return sentencepiece.load_sentencepiece(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        why = "; its tokenizer is code of the repository, which runs with --trust-remote-code alone" if own else ""
        if own or not trust:
            raise ConfigError(f"model={folder}: no tokenizer here: neither {' nor '.join(TOKENIZER_FILES[:2])}{why}")
    elif own:
        named = published_layouts.read_raw(folder / "tokenizer_config.json").get("tokenizer_class")
        is_qwen2 = named in field_layouts.QWEN2_TOKENIZERS and not (folder / "tokenizer.json").is_file()
        tokenizer = from_pretrained(Qwen2Tokenizer if is_qwen2 else PreTrainedTokenizerFast, folder)
        tokenizer.init_kwargs.pop("auto_map", None)  # else it would be saved with a reference to missing code
        return _checked(tokenizer, folder)
    options = {} if config is None else {"config": config}
    return _checked(from_pretrained(AutoTokenizer, folder, trust, **options), folder)


def _checked(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer, after a trial: some faults of its configuration show only in use."""
    try:
        tokenizer("a")
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # errors of many types
        raise ConfigError(
            f"model={folder}: its tokenizer does not work: {type(error).__name__}: {reason(error)}"
        ) from error
    return tokenizer


def from_pretrained(auto: Any, source: Path, trust: bool = False, **options: Any) -> Any:
    """transformers' own loading, with ConfigErrors of one line.  trust: the repository's code may run."""
    try:
        return auto.from_pretrained(str(source), trust_remote_code=trust, **options)
    except Exception as error:  # broken files raise errors of many types
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ConfigError(f"model={source}: {kind}{reason(error)}") from error
