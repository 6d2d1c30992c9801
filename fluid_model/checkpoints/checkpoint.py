"""Checkpoints: any Hugging Face causal LM, this project's folders (`manifest`), published layouts (`legacy`).

Strict in, atomic out.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from ..common import replace_folder
from ..common.errors import ConfigError
from ..forward.backbone import Backbone, context_window
from ..forward.khead import KHead
from ..tokens import Tokenizer, end_ids, single_id
from . import adapters, published_layouts
from .gguf_files import quantization
from .manifest import ADAPTER_FOLDER, CHECKPOINT_FILES, HEAD_FILE, MASK_FILE, Manifest, Method, write_manifest
from .source import Source, find
from .weights import embedding_tables, grow, load_weights

LEGACY_K_MAX = 16
"""Widest stride of FLUID's published training, for adapters that do not say it."""


@dataclass
class Checkpoint:
    """A loaded model with all it needs to write.

    heads: one K-head per entry of manifest.tau (none for a plain AR model).  head: the chosen one.
    model: the transformers model, with LoRA layers inside where the manifest says weights="adapter".
    folder: where the files lie.
    """

    backbone: Backbone
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    manifest: Manifest | None = None
    mask_id: int | None = None
    heads: list[KHead] = field(default_factory=list)
    head: KHead | None = None
    adapter: PeftModel | None = None
    folder: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model

    def with_tau(self, tau: float | None) -> Checkpoint:
        """The same weights with the K-head of one training-time bound (None: its own choice).

        Raises ConfigError if there is none for it.
        """
        chosen = self.manifest.choose(tau) if self.manifest and self.heads else None
        if chosen is None and tau is not None:
            raise ConfigError(f"model.tau={tau}: {self.folder} has no K-head")
        head = self.heads[chosen].to(self.backbone.device) if chosen is not None else None
        return replace(self, head=head)


@dataclass(frozen=True)
class ModelInfo:
    """What can be said of a model without reading its weights. window: tokens.  tau: one per K-head.  method: what it
    was adapted to, None for a plain causal model.  block_length: NBDiff's, in tokens, where the model says it.
    """

    architecture: str
    window: int
    k_max: int | None
    tau: tuple[float | None, ...]
    method: str | None = None
    block_length: int | None = None
    remote_code: tuple[str, ...] = ()
    """Classes of the repository's own code that run."""
    quantization: str | None = None
    """How the weights were quantised before they were read as plain numbers (GGUF)."""

    @property
    def has_head(self) -> bool:
        return self.k_max is not None


def describe(
    path: str, method: Method | None = None, *, trust_remote_code: bool = False, base: str | None = None
) -> ModelInfo:
    """Read configuration, manifest and heads, no weights.  method, trust_remote_code, base: see `load`.

    Raises ConfigError if it is no causal LM or a bad checkpoint.
    """
    source = find(path, weights=False, method=method, trust=trust_remote_code, base=base)
    config = source.config
    heads = _heads_of(source, _hidden_size(config))
    tau: tuple[float | None, ...] = source.manifest.tau if source.manifest else (None,) * len(heads)
    named = getattr(config, "architectures", None)
    architecture = str(named[0] if named and isinstance(named, list) else config.model_type)
    k_max = heads[0].k_max if heads else None
    block_length = source.manifest.block_length if source.manifest else source.published.block_length
    code = tuple(source.remote_code)
    return ModelInfo(architecture, context_window(config), k_max, tau, source.method, block_length, code, quantization(source.base))


def read_config(path: str, base: str | None = None) -> PretrainedConfig:
    """The configuration of a folder or hub id (for an adapter: its parent's).  base: see `load`."""
    return find(path, weights=False, base=base).config


def is_adapter(path: str) -> bool:
    """Whether a folder or hub id is a PEFT adapter that anyone may have saved."""
    return find(path, weights=False).adapted


def load_tokenizer(path: str, *, trust_remote_code: bool = False, base: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub id (for an adapter: the folder's own, which knows the mask token)."""
    return find(path, weights=False, trust=trust_remote_code, base=base).tokenizer


def load(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tau: float | None = None,
    mask_token: str | None = None,
    end_tokens: Sequence[str] | None = None,
    method: Method | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> Checkpoint:
    """Load a plain causal LM, a folder of this project, a published layout, or a PEFT adapter, which is merged into the
    weights it names. path: a folder or a hub id.

    dtype: auto (float32 on CPU, the checkpoint's own elsewhere), float32, bfloat16.  device: auto, cpu, cuda.
    tau: which K-head to use, by its training-time bound.  mask_token: overrides the checkpoint's mask token text.
    end_tokens: texts of the tokens that end an answer, instead of what configuration and tokenizer say.
    method: what the model was adapted to, where its files do not tell.  trust_remote_code: whether code of the model's
    repository may run, with all the rights of this process, where no layout known here is its own.  base: folder or hub
    id that an adapter is put into, instead of the one it names.
    Raises ConfigError for missing or misshapen parts, unknown format versions and unsupported architectures.
    """
    if end_tokens is not None and not end_tokens:
        raise ConfigError("end_tokens=[] leaves nothing that ends an answer; name one text at least")
    source = find(path, weights=True, method=method, trust=trust_remote_code, base=base)
    target = pick_device(device)
    tokenizer = source.tokenizer
    heads = _heads_of(source, _hidden_size(source.config))
    manifest = source.manifest or _manifest_for(source, path, tokenizer, heads, mask_token)
    model = load_weights(source, dtype, target)
    adapter = None
    if source.manifest is not None and source.manifest.weights == "adapter":
        adapter = _load_adapter(model, tokenizer, source.folder, source.manifest)
        model = adapter.get_base_model()
    elif source.adapted:
        model = adapters.merge(adapters.put(model, source.folder), source.folder)
    backbone = Backbone(model)
    backbone.probe()
    mask_id = single_id(tokenizer, mask_token or manifest.mask_token) if manifest else None
    if mask_id is not None and mask_id >= backbone.vocabulary:
        raise ConfigError(
            f"model={path}: the mask token is {mask_id}, and its {backbone.vocabulary} embeddings end before"
        )
    return Checkpoint(
        backbone=backbone,
        tokenizer=tokenizer,
        end_ids=_end_ids(tokenizer, model, manifest, end_tokens),
        manifest=manifest,
        mask_id=mask_id,
        heads=heads,
        adapter=adapter,
        folder=source.folder,
    ).with_tau(tau)


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    beside: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder, all or nothing: a failure leaves what stood there before.

    A checkpoint without a manifest becomes an ordinary Hugging Face folder.  beside: further text files by name.
    overwrite: a checkpoint that stands there is replaced; one with files of somebody else's beside it is not.
    Raises ConfigError if heads and manifest do not fit, or if the folder holds what may not be replaced.
    """
    manifest, target = checkpoint.manifest, Path(path).resolve()
    if not replace_folder.is_free(target):
        if not overwrite:
            raise ConfigError(f"cannot save {target}: it is not empty; pass overwrite=True, or choose another folder")
        replace_folder.check_ours("cannot save: path", target, CHECKPOINT_FILES)
    if len(checkpoint.heads) != len(manifest.tau if manifest else ()):
        raise ConfigError(f"cannot save {target}: a FLUID checkpoint needs a manifest and one K-head per tau")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        checkpoint.tokenizer.save_pretrained(draft)
        for name, text in (beside or {}).items():
            (draft / name).write_text(text, encoding="utf-8")
        if manifest is not None:
            write_manifest(draft, manifest)
        if checkpoint.heads:
            save_file(_head_tensors(checkpoint.heads), draft / HEAD_FILE)
        if manifest is not None and manifest.weights == "adapter":
            _save_adapter(checkpoint, draft)
        else:
            checkpoint.model.save_pretrained(draft)
        replace_folder.swap(draft, target, CHECKPOINT_FILES)
    finally:
        replace_folder.discard(draft)


def add_mask_token(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> int:
    """Make `text` one token and give it an embedding (the mean of the others). Returns its id.

    A token the tokenizer knows is taken as it is; embeddings grow only if their table has no row for it.
    """
    if text in tokenizer.get_vocab():
        return single_id(tokenizer, text)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
    token = single_id(tokenizer, text)
    grow(model, token + 1)
    with torch.no_grad():
        for table in embedding_tables(model).values():
            table[token] = table[:token].mean(0)
    return token


def pick_device(device: str) -> torch.device:
    """auto -> cuda if there is one. Raises ConfigError for cuda without a device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def device_name() -> str:
    """The first CUDA device's, as its driver names it; empty without one."""
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else ""


def _heads_of(source: Source, hidden_size: int) -> list[KHead]:
    if source.manifest is not None:
        return _read_heads(source.folder, source.manifest, hidden_size)
    file = source.folder / published_layouts.HEAD_FILE
    return [published_layouts.read_head(file, hidden_size)] if file.is_file() else []


def _manifest_for(
    source: Source, path: str, tokenizer: Tokenizer, heads: list[KHead], mask_token: str | None
) -> Manifest | None:
    """What a manifest would say of a checkpoint that has none; None for a plain causal model."""
    if source.method is None:
        return None
    is_fluid = source.method == "fluid"
    return Manifest(
        parent=source.parent or path,
        mask_token=mask_token or published_layouts.mask_text(tokenizer, source.published),
        k_max=(heads[0].k_max if heads else LEGACY_K_MAX) if is_fluid else None,
        tau=(None,) * len(heads),
        method=source.method,
        block_length=source.published.block_length,
    )


def _end_ids(
    tokenizer: Tokenizer, model: PreTrainedModel, manifest: Manifest | None, texts: Sequence[str] | None
) -> tuple[int, ...]:
    """Ids of the texts that end an answer, or all that configuration, tokenizer and the published method name."""
    if texts is not None:
        return tuple(sorted(single_id(tokenizer, text, "end token") for text in texts))
    known = published_layouts.END_TEXTS.get(manifest.method, ()) if manifest else ()
    vocabulary = tokenizer.get_vocab()
    more = {vocabulary[text] for text in known if text in vocabulary}
    return tuple(sorted(more.union(end_ids(tokenizer, model.config, model.generation_config))))


def _hidden_size(config: Any) -> int:
    size: int = config.get_text_config(decoder=True).hidden_size
    return size


def _read_heads(folder: Path, manifest: Manifest, hidden_size: int) -> list[KHead]:
    file = folder / HEAD_FILE
    if not manifest.tau:
        return []
    if not file.is_file():
        raise ConfigError(f"{file}: missing; a FLUID checkpoint needs its K-heads")
    tensors = _read_tensors(file)
    heads = []
    for index in range(len(manifest.tau)):
        prefix = f"{index}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        head = published_layouts.head_from_state(state, hidden_size, file)
        if head.k_max != manifest.k_max:
            raise ConfigError(
                f"{file}: head {index} has {head.k_max} classes, the manifest says k_max={manifest.k_max}"
            )
        heads.append(head)
    return heads


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
        return tensors
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: not a safetensors file: {error}") from error


def _head_tensors(heads: list[KHead]) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t.contiguous().cpu() for i, h in enumerate(heads) for name, t in h.state_dict().items()}


def _save_adapter(checkpoint: Checkpoint, draft: Path) -> None:
    if checkpoint.adapter is None or checkpoint.mask_id is None:
        raise ConfigError(f"cannot save {draft.name}: weights=adapter needs a PEFT adapter and a mask token")
    checkpoint.adapter.save_pretrained(draft / ADAPTER_FOLDER, save_embedding_layers=False)
    rows = {n: t[checkpoint.mask_id].detach().clone().cpu() for n, t in embedding_tables(checkpoint.model).items()}
    save_file(rows, draft / MASK_FILE)


def _load_adapter(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, manifest: Manifest) -> PeftModel:
    """Put LoRA layers into the parent and the mask token's embedding into its tables."""
    token = add_mask_token(model, tokenizer, manifest.mask_token)
    grow(model, token + 1)
    file = folder / MASK_FILE
    if not file.is_file():
        raise ConfigError(f"{file}: missing; an adapter folder needs its mask token's embedding")
    with torch.no_grad():
        for name, row in _read_tensors(file).items():
            table = embedding_tables(model)[name]
            table[token] = row.to(table)
    if not (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
        raise ConfigError(f"{folder / ADAPTER_FOLDER}: missing; the manifest says weights=adapter")
    return adapters.put(model, folder / ADAPTER_FOLDER)
