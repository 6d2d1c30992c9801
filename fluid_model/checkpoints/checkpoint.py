"""Checkpoints: any Hugging Face causal LM, this project's folders (`manifest`), others' (`published_layouts`).

Loading is strict, saving is atomic.
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
from ..forward import int8_rows
from ..forward.backbone import Backbone, context_window
from ..forward.khead import KHead
from ..tokens import Tokenizer, single_id
from . import adapters, gated_files, published_layouts
from .gguf_files import quantization
from .manifest import ADAPTER_FOLDER, CHECKPOINT_FILES, HEAD_FILE, MASK_FILE, Manifest, write_manifest
from .source import CheckpointFiles, find_checkpoint
from .special_tokens import answer_ends
from .weight_names import has_weights
from .weights import embedding_tables, fingerprint, grow_embeddings, load_weights

PUBLISHED_K_MAX = 16
"""Widest stride of FLUID's published training, for adapters that do not state it."""


@dataclass
class Checkpoint:
    """A loaded model with its tokenizer, special tokens and K-heads.

    heads: one K-head per entry of manifest.tau (none for a plain AR model).  head: the one in use.
    adapter: LoRA layers inside `model`, where the manifest states weights="adapter"; a gated one is the backbone's.
    folder: of the files.
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
        """The same weights with the K-head of one training-time bound (None: the default).

        Raises ConfigError if the checkpoint has no such K-head.
        """
        chosen = self.manifest.choose(tau) if self.manifest and self.heads else None
        if chosen is None and tau is not None:
            raise ConfigError(f"model.tau={tau}: {self.folder} has no K-head")
        head = self.heads[chosen].to(self.backbone.device) if chosen is not None else None
        return replace(self, head=head)


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a checkpoint that need no weights.

    window: tokens.  tau: one per K-head.  method: of the adaptation, None for a plain causal model.
    block_length: in tokens, if stated.  layout: the published `model_type`, empty for an architecture of transformers.
    shift: a masked token is predicted at the slot before it.  has_weights: weights are there, too.
    """

    architecture: str
    window: int
    k_max: int | None
    tau: tuple[float | None, ...]
    method: str | None = None
    block_length: int | None = None
    remote_code: tuple[str, ...] = ()
    """Classes of the repository's code that run."""
    quantization: str | None = None
    """How the weights are quantised, or were before they were read as plain numbers (GGUF); both, one after another."""
    layout: str = ""
    shift: bool = False
    has_weights: bool = True

    @property
    def has_head(self) -> bool:
        return self.k_max is not None


def describe(
    path: str,
    method: str | None = None,
    *,
    trust_remote_code: bool = False,
    base: str | None = None,
    dtype: str = "auto",
) -> ModelInfo:
    """Read configuration, manifest and K-heads, no weights.  method, trust_remote_code, base, dtype: see `load`.

    Raises ConfigError if it is no causal LM, or an invalid checkpoint.
    """
    files = find_checkpoint(path, weights=False, method=method, trust=trust_remote_code, base=base)
    config = files.config
    heads = _heads_of(files, _hidden_size(config))
    tau: tuple[float | None, ...] = files.manifest.tau if files.manifest else (None,) * len(heads)
    named = getattr(config, "architectures", None)
    architecture = str(named[0] if named and isinstance(named, list) else config.model_type)
    k_max = heads[0].k_max if heads else None
    block_length = files.manifest.block_length if files.manifest else files.published.block_length
    code = tuple(files.remote_code)
    roundings = [quantization(files.base), int8_rows.LABEL if dtype == "int8" else None]
    stored_as = "; then ".join(filter(None, roundings)) or None
    return ModelInfo(
        architecture, context_window(config), k_max, tau, files.method, block_length, code, stored_as,
        layout=files.published.layout,
        shift=(files.manifest or files.published).shift,
        has_weights=has_weights(files.base),
    )  # fmt: skip


def read_config(path: str, base: str | None = None) -> PretrainedConfig:
    """The configuration of a folder or hub id (for an adapter: its parent's).  base: see `load`."""
    return find_checkpoint(path, weights=False, base=base).config


def is_adapter(path: str) -> bool:
    """Whether a folder or hub id is a plain PEFT adapter, without a manifest."""
    return find_checkpoint(path, weights=False).adapted


def load_tokenizer(path: str, *, trust_remote_code: bool = False, base: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or hub id (for an adapter: the folder's own, which has the mask token)."""
    return find_checkpoint(path, weights=False, trust=trust_remote_code, base=base).tokenizer


def load(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tau: float | None = None,
    mask_token: str | None = None,
    end_tokens: Sequence[str] | None = None,
    method: str | None = None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> Checkpoint:
    """Load a plain causal LM, a folder of this project, a published layout, or a PEFT adapter merged into its base.

    path: a folder or a hub id.  dtype: auto (float32 on CPU, the checkpoint's own elsewhere), float32, bfloat16, int8
    (on a CPU, see `int8_rows`).  device: auto, cpu, cuda.  tau: training-time bound of the K-head to use.  mask_token:
    overrides the mask token's text.  end_tokens: texts of the tokens that end an answer, instead of the model's own.
    method: of the adaptation, if the files do not state it.  trust_remote_code: code of the model's repository may run,
    with all rights of this process, if its layout is unknown here.  base: base model of an adapter, a folder or hub id.
    Raises ConfigError for missing or misshapen parts, unknown format versions and unsupported architectures.
    """
    # 1) all but the weights
    if end_tokens is not None and not end_tokens:
        raise ConfigError("end_tokens=[] leaves nothing that ends an answer; name one text at least")
    files = find_checkpoint(path, weights=True, method=method, trust=trust_remote_code, base=base)
    target = pick_device(device)
    tokenizer = files.tokenizer
    heads = _heads_of(files, _hidden_size(files.config))
    manifest = files.manifest or _manifest_for(files, path, tokenizer, heads, mask_token)
    # 2) the weights, with an adapter inside or merged
    model = load_weights(files, dtype, target)
    adapter = gated = None
    if files.manifest is not None and files.manifest.weights == "adapter":
        mask = _write_mask_embedding(model, tokenizer, files.folder, files.manifest)
        if files.manifest.gated:
            gated = gated_files.load_gated(model, files.folder / ADAPTER_FOLDER, mask)
        else:
            adapter = adapters.attach(model, files.folder / ADAPTER_FOLDER)
            model = adapter.get_base_model()
    elif files.adapted:
        gated_files.refuse_gated(files.folder)
        model = adapters.merge(adapters.attach(model, files.folder), files.folder)
    # 3) checks of the forward and of the mask token
    backbone = Backbone(model, gated, int8=dtype == "int8")
    backbone.probe()
    mask_id = single_id(tokenizer, mask_token or manifest.mask_token) if manifest else None
    if mask_id is not None and mask_id >= backbone.vocabulary:
        raise ConfigError(
            f"model={path}: the mask token is {mask_id}, and its {backbone.vocabulary} embeddings end before"
        )
    return Checkpoint(
        backbone=backbone,
        tokenizer=tokenizer,
        end_ids=answer_ends(tokenizer, files.method, model.config, model.generation_config, texts=end_tokens),
        manifest=manifest,
        mask_id=mask_id,
        heads=heads,
        adapter=adapter,
        folder=files.folder,
    ).with_tau(tau)


def save(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    beside: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a folder atomically: a failure leaves the old one in place.

    A checkpoint without a manifest becomes an ordinary Hugging Face folder.  beside: further text files by name.
    overwrite: replace an older checkpoint there, unless other files are beside it.
    Raises ConfigError if K-heads and manifest do not fit, or if the folder may not be replaced.
    """
    # 1) check
    manifest, target = checkpoint.manifest, Path(path).resolve()
    if not replace_folder.is_free(target):
        if not overwrite:
            raise ConfigError(f"cannot save {target}: it is not empty; pass overwrite=True, or choose another folder")
        replace_folder.check_ours("cannot save: path", target, CHECKPOINT_FILES)
    if len(checkpoint.heads) != len(manifest.tau if manifest else ()):
        raise ConfigError(f"cannot save {target}: a FLUID checkpoint needs a manifest and one K-head per tau")
    if checkpoint.backbone.int8 and (manifest is None or manifest.weights == "merged"):
        raise ConfigError(
            f"cannot save {target}: its weights are rounded to int8; load it with dtype=float32 to save it"
        )
    # 2) write a draft beside the target, then swap them
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
            _save_adapter(checkpoint, manifest, draft)
        else:
            checkpoint.model.save_pretrained(draft)
        replace_folder.swap(draft, target, CHECKPOINT_FILES)
    finally:
        replace_folder.discard(draft)


def add_mask_token(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> int:
    """Add the token `text`, its embedding the mean of all others. Returns its id.

    A known token is left as it is. Embedding tables grow only if they have no row for the new one.
    """
    if text in tokenizer.get_vocab():
        return single_id(tokenizer, text)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
    token = single_id(tokenizer, text)
    grow_embeddings(model, token + 1)
    with torch.no_grad():
        for table in embedding_tables(model).values():
            table[token] = table[:token].mean(0)
    return token


def pick_device(device: str) -> torch.device:
    """The torch device; auto is cuda if present. Raises ConfigError for cuda without a device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def device_name() -> str:
    """The driver's name of the first CUDA device; empty without one."""
    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else ""


def _heads_of(files: CheckpointFiles, hidden_size: int) -> list[KHead]:
    if files.manifest is not None:
        return _read_heads(files.folder, files.manifest, hidden_size)
    file = published_layouts.head_file(files.folder)
    return [published_layouts.read_head(file, hidden_size)] if file is not None else []


def _manifest_for(
    files: CheckpointFiles, path: str, tokenizer: Tokenizer, heads: list[KHead], mask_token: str | None
) -> Manifest | None:
    """The manifest of a published checkpoint, which has no fluid.json; None for a plain causal model."""
    if files.method is None:
        return None
    is_fluid = files.method == "fluid"
    return Manifest(
        parent=files.parent or path,
        mask_token=mask_token or published_layouts.mask_text(tokenizer, files.published),
        k_max=(heads[0].k_max if heads else PUBLISHED_K_MAX) if is_fluid else None,
        tau=(None,) * len(heads),
        method=files.method,
        block_length=files.published.block_length,
        shift=files.published.shift,
    )


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
        prefix = f"{index}."  # "0.2.bias" is head 0, layer 2
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


def _save_adapter(checkpoint: Checkpoint, manifest: Manifest, draft: Path) -> None:
    mask, adapter, gated = checkpoint.mask_id, checkpoint.adapter, checkpoint.backbone.adapter
    if mask is None or (gated is None if manifest.gated else adapter is None):
        raise ConfigError(f"cannot save {draft.name}: weights=adapter needs an adapter and a mask token")
    rows = {n: t[mask].detach().clone().cpu() for n, t in embedding_tables(checkpoint.model).items()}
    if gated is not None:
        gated_files.save_gated(gated, draft / ADAPTER_FOLDER, manifest.parent, manifest.mask_token)
        rows["input"] = gated.mask_embedding.detach().clone().cpu()
    elif adapter is not None:
        adapter.save_pretrained(draft / ADAPTER_FOLDER, save_embedding_layers=False)
    save_file(rows, draft / MASK_FILE)


def _write_mask_embedding(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, manifest: Manifest) -> int:
    """Write an adapter's mask embedding into its parent's tables. Returns the mask token's id.

    Raises ConfigError for another parent's weights, and for missing files.
    """
    # 1) the parent that the adapter was trained over
    here = fingerprint(model)
    if manifest.parent_hash not in (None, here):
        raise ConfigError(
            f"{folder}: an adapter over weights {manifest.parent_hash}, and {manifest.parent} has {here}; "
            "--set model.base=FOLDER names another parent"
        )
    # 2) the mask token's rows
    token = add_mask_token(model, tokenizer, manifest.mask_token)
    grow_embeddings(model, token + 1)
    file = folder / MASK_FILE
    if not file.is_file():
        raise ConfigError(f"{file}: missing; an adapter folder needs its mask token's embedding")
    with torch.no_grad():
        for name, row in _read_tensors(file).items():
            table = embedding_tables(model)[name]
            table[token] = row.to(table)
    if not (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
        raise ConfigError(f"{folder / ADAPTER_FOLDER}: missing; the manifest says weights=adapter")
    return token
