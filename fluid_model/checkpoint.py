"""Checkpoints: any Hugging Face causal LM, and this project's FLUID folders (see `manifest`). Strict in, atomic out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from . import legacy
from .backbone import Backbone, context_window
from .errors import ConfigError
from .khead import KHead
from .manifest import ADAPTER_FOLDER, HEAD_FILE, MANIFEST_FILE, MASK_FILE, Manifest, read_manifest, write_manifest
from .tokens import Tokenizer, end_ids, single_id

LEGACY_K_MAX = 16
"""Widest stride of FLUID's published training, for adapters that do not say it."""


@dataclass
class Checkpoint:
    """A loaded model with all it needs to write.

    heads: one K-head per entry of manifest.tau (none for a plain AR model).  head: the chosen one.
    model: the transformers model, with LoRA layers inside if the folder holds an adapter.
    """

    backbone: Backbone
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    manifest: Manifest | None = None
    mask_id: int | None = None
    heads: list[KHead] = field(default_factory=list)
    head: KHead | None = None
    adapter: PeftModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.backbone.model


@dataclass(frozen=True)
class ModelInfo:
    """What can be said of a model without reading its weights. window: tokens.  tau: one per K-head.  method: what it
    was adapted to, None for a plain causal model.
    """

    architecture: str
    window: int
    k_max: int | None
    tau: tuple[float | None, ...]
    method: str | None = None

    @property
    def has_head(self) -> bool:
        return self.k_max is not None


def resolve(path: str) -> str:
    """A folder that exists, or a hub id. Raises ConfigError for a folder that cannot be a model."""
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", MANIFEST_FILE, legacy.ADAPTER_FILE)):
            raise ConfigError(f"model={path}: the folder holds no config.json (nor fluid.json, nor an adapter)")
        return str(folder)
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise ConfigError(f"model={path!r}: no such folder (a hub id reads owner/name)")
    return path


def describe(path: str) -> ModelInfo:
    """Read configuration and manifest, no weights. Raises ConfigError if it is no causal LM or a bad checkpoint."""
    source = resolve(path)
    manifest = read_manifest(Path(source))
    base = _base_of(source, manifest)
    config = _from_pretrained(AutoConfig, base)
    k_max: int | None = None
    tau: tuple[float | None, ...] = ()
    method: str | None = None
    if manifest is not None:
        heads = _read_heads(Path(source), manifest, _hidden_size(config))
        k_max, tau, method = heads[0].k_max if heads else None, manifest.tau, manifest.method
    elif (file := Path(source) / legacy.HEAD_FILE).is_file():
        k_max, tau, method = legacy.read_head(file, _hidden_size(config)).k_max, (None,), "fluid"
    architecture = (getattr(config, "architectures", None) or [config.model_type])[0]
    return ModelInfo(architecture, context_window(config), k_max, tau, method)


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a folder or hub id (for an adapter: its parent's)."""
    source = resolve(path)
    return _from_pretrained(AutoConfig, _base_of(source, read_manifest(Path(source))))


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a folder or hub id (for an adapter: the folder's own, which knows the mask token)."""
    source = resolve(path)
    try:
        return _from_pretrained(AutoTokenizer, source)
    except ConfigError:
        if legacy.adapter_parent(Path(source)) is None:
            raise
        return _from_pretrained(AutoTokenizer, _base_of(source, None))


def load(
    path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tau: float | None = None,
    mask_token: str | None = None,
) -> Checkpoint:
    """Load a plain causal LM (folder or hub id), a FLUID folder, a folder with a published head (model_head.bin), or a
    bare PEFT adapter, as LLaMA-Factory saves stage 1.

    dtype: auto (float32 on CPU, the checkpoint's own elsewhere), float32, bfloat16.  device: auto, cpu, cuda.
    tau: which K-head to use, by its training-time bound.  mask_token: overrides the checkpoint's mask token text.
    Raises ConfigError for missing or misshapen parts, unknown format versions and unsupported architectures.
    """
    source = resolve(path)
    folder = Path(source)
    manifest = read_manifest(folder)
    target = pick_device(device)
    base = _base_of(source, manifest)
    tokenizer = load_tokenizer(source)
    model = _load_weights(base, dtype, target)
    hidden = _hidden_size(model.config)
    heads: list[KHead] = []
    adapter = None
    if manifest is not None:
        heads = _read_heads(folder, manifest, hidden)
        if manifest.weights == "adapter":
            adapter = _load_adapter(model, tokenizer, folder, manifest)
            model = adapter.get_base_model()
    elif (file := folder / legacy.HEAD_FILE).is_file():
        heads = [legacy.read_head(file, hidden)]
        text = mask_token or legacy.mask_text(tokenizer)
        manifest = Manifest(parent=path, mask_token=text, k_max=heads[0].k_max, tau=(None,))
    elif base != source:
        manifest = Manifest(base, mask_token or legacy.mask_text(tokenizer), LEGACY_K_MAX, weights="adapter")
        _grow(model, single_id(tokenizer, manifest.mask_token))
        adapter = _wrap(model, folder)
        model = adapter.get_base_model()
    chosen = manifest.choose(tau) if manifest and heads else None
    if chosen is None and tau is not None:
        raise ConfigError(f"model.tau={tau}: {path} has no K-head")
    backbone = Backbone(model)
    backbone.probe()
    return Checkpoint(
        backbone=backbone,
        tokenizer=tokenizer,
        end_ids=end_ids(tokenizer, model.config, model.generation_config),
        manifest=manifest,
        mask_id=single_id(tokenizer, mask_token or manifest.mask_token) if manifest else None,
        heads=heads,
        head=heads[chosen].to(target) if chosen is not None else None,
        adapter=adapter,
    )


def save(checkpoint: Checkpoint, path: str | os.PathLike[str], beside: Mapping[str, str] | None = None) -> None:
    """Write a folder, all or nothing: a failure leaves what stood there before.

    A checkpoint without a manifest becomes an ordinary Hugging Face folder.  beside: further text files by name.
    Raises ConfigError if heads and manifest do not fit.
    """
    manifest, target = checkpoint.manifest, Path(path)
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
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def add_mask_token(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> int:
    """Make `text` one token and give it an embedding (the mean of the others). Returns its id.

    A token the tokenizer knows is taken as it is; embeddings grow only if their table has no row for it.
    """
    if text in tokenizer.get_vocab():
        return single_id(tokenizer, text)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
    token = single_id(tokenizer, text)
    _grow(model, token)
    with torch.no_grad():
        for table in _embedding_tables(model).values():
            table[token] = table[:token].mean(0)
    return token


def pick_device(device: str) -> torch.device:
    """auto -> cuda if there is one. Raises ConfigError for cuda without a device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def _base_of(source: str, manifest: Manifest | None) -> str:
    """Where the weights are: the folder itself, or the parent of an adapter (a relative path counts from it)."""
    if manifest is not None and manifest.weights == "adapter":
        parent = manifest.parent
    elif manifest is None and (bare := legacy.adapter_parent(Path(source))) is not None:
        parent = bare
    else:
        return source
    beside = Path(source) / parent
    return str(beside) if beside.is_dir() else resolve(parent)


def _from_pretrained(auto: Any, source: str, **options: Any) -> Any:
    """transformers' own loading, its errors told in one line. Code from a model repository is never run."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model={source}: {reason.strip()}") from error


def _load_weights(source: str, dtype: str, device: torch.device) -> PreTrainedModel:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r}: known are auto, float32, bfloat16")
    number = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        dtype, torch.float32 if device.type == "cpu" else "auto"
    )
    model, info = _from_pretrained(AutoModelForCausalLM, source, dtype=number, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise ConfigError(f"model={source}: {len(missing)} weights are missing or misshapen, first {missing[0]}")
    return model.to(device)


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
        head = legacy.head_from_state(state, hidden_size, file)
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


def _embedding_tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Input and output embedding tables; one entry where they are tied."""
    tables = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    if tables["output"] is tables["input"]:
        del tables["output"]
    return tables


def _grow(model: PreTrainedModel, token: int) -> None:
    """Make room for a token the embedding tables have no row for."""
    if token >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(token + 1, mean_resizing=False)


def _save_adapter(checkpoint: Checkpoint, draft: Path) -> None:
    if checkpoint.adapter is None or checkpoint.mask_id is None:
        raise ConfigError(f"cannot save {draft.name}: weights=adapter needs a PEFT adapter and a mask token")
    checkpoint.adapter.save_pretrained(draft / ADAPTER_FOLDER, save_embedding_layers=False)
    rows = {n: t[checkpoint.mask_id].detach().clone().cpu() for n, t in _embedding_tables(checkpoint.model).items()}
    save_file(rows, draft / MASK_FILE)


def _load_adapter(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, manifest: Manifest) -> PeftModel:
    """Put LoRA layers into the parent and the mask token's embedding into its tables."""
    token = add_mask_token(model, tokenizer, manifest.mask_token)
    _grow(model, token)
    file = folder / MASK_FILE
    if not file.is_file():
        raise ConfigError(f"{file}: missing; an adapter folder needs its mask token's embedding")
    with torch.no_grad():
        for name, row in _read_tensors(file).items():
            table = _embedding_tables(model)[name]
            table[token] = row.to(table)
    if not (folder / ADAPTER_FOLDER / "adapter_config.json").is_file():
        raise ConfigError(f"{folder / ADAPTER_FOLDER}: missing; the manifest says weights=adapter")
    return _wrap(model, folder / ADAPTER_FOLDER)


def _wrap(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the folder's PEFT adapter."""
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: {str(error).splitlines()[0]}") from error


def _swap(draft: Path, target: Path) -> None:
    """Put the finished draft in the target's place by renames."""
    os.chmod(draft, 0o755)  # mkdtemp makes it private
    old = draft.with_name(draft.name + "-old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
