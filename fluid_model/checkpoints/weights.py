"""Model weights, loaded strictly: exactly those of the configuration. Embedding tables and their growth."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..common.errors import ConfigError
from .source import CheckpointFiles, from_pretrained
from .weight_names import refuse, stored_names

NO_ADAPTER = {"subfolder": "-"}
"""Keeps transformers from loading an adapter unasked; `adapters` loads it."""
FINGERPRINT_NUMBERS = 64
"""Numbers of each weight in a fingerprint; an embedding table's are of its first tokens, whatever its size."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""Number format in which torch holds the weights, by `dtype`; int8 is rounded later, see `int8_rows`."""


def load_weights(source: CheckpointFiles, dtype: str, device: torch.device) -> PreTrainedModel:
    """The base model with its weights, on the device.  dtype: auto, float32, bfloat16, or int8: float32, to be rounded.

    Raises ConfigError for a missing weight, one of another shape, or one that the model does not have.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={dtype!r}: known are auto, {', '.join(DTYPES)}")
    if dtype == "int8" and device.type != "cpu":
        raise ConfigError(f"dtype=int8 on {device.type}: these weights are for a CPU; use bfloat16")
    number = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
    is_published = source.published.architecture is not None
    options: dict[str, Any] = {}
    if is_published:
        _check_names(source.base, source.config, source.published.keys)
        options = {"config": source.config, "key_mapping": dict(source.published.keys)}
    model, info = from_pretrained(
        AutoModelForCausalLM, source.base, source.trust, dtype=number, output_loading_info=True,
        ignore_mismatched_sizes=True, adapter_kwargs=dict(NO_ADAPTER), **options,
    )  # fmt: skip
    _check(source.base, info)
    if is_published:
        model._weight_conversions = None  # else transformers would save under the published names, not the config's
    loaded: PreTrainedModel = model.to(device)
    return loaded


def _check_names(folder: Path, config: PretrainedConfig, keys: Mapping[str, str]) -> None:
    """Raise ConfigError, before any weight is read, unless the folder's names are those of the configuration.

    keys: patterns of published names, and the architecture's names for them.
    """
    stored = stored_names(folder)
    if stored is None:
        return
    for pattern, name in keys.items():
        stored = {re.sub(pattern, name, old) for old in stored}
    with torch.device("meta"):
        needed = set(AutoModelForCausalLM.from_config(config).state_dict())
    if config.tie_word_embeddings:
        needed.discard("lm_head.weight")
        stored.discard("lm_head.weight")
    refuse(folder, needed - stored, stored - needed)


def _check(folder: Path, info: dict[str, Any]) -> None:
    """Raise ConfigError unless files and model have the same weights.  info: transformers' loading report."""
    missing = list(info["missing_keys"])
    missing += [f"{name} {tuple(stored)} for {tuple(needed)}" for name, stored, needed in info["mismatched_keys"]]
    refuse(folder, missing, info["unexpected_keys"])


def embedding_tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Input and output embedding tables, (rows, D) each; one entry where they are tied."""
    tables = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    if tables["output"] is tables["input"]:
        del tables["output"]
    return tables


def fingerprint(model: PreTrainedModel) -> str:
    """12 hex digits that tell a model's weights from another's, in milliseconds: over some numbers of every weight.

    They are rounded to bfloat16 first, so that the same weights loaded in another number format agree.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()[:FINGERPRINT_NUMBERS].bfloat16().cpu()
        digest.update(name.encode() + numbers.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:12]


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Grow the embedding tables to at least `rows` rows. New rows are not initialised usefully."""
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
