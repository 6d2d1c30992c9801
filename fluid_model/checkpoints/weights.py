"""A model's weights: exactly those that its configuration has a place for, and rows of its vocabulary."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..common.errors import ConfigError
from .source import Source, from_pretrained

HARMLESS = re.compile(
    r"(^|\.)(v_head|score)\.|(^|\.)position_ids$|rotary_emb\.(inv_freq|\w*cached)$"
    r"|\.(attn|attention|self_attn)\.(attention\.)?(masked_bias|bias)$"
)
"""Names of what changes no logit: heads that value or classify, tables that the model computes itself, causal masks."""
NO_ADAPTER = {"subfolder": "-"}
"""Where transformers looks for an adapter to put into a model unasked: nowhere. `adapters` does that."""
MOST_NAMED = 3
"""Weights that a message names."""


def load_weights(source: Source, dtype: str, device: torch.device) -> PreTrainedModel:
    """The base's weights, as one model on the device.  dtype: auto, float32, bfloat16.

    Raises ConfigError where the files lack a weight, hold one of another shape, or one that the model has no place for.
    """
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r}: known are auto, float32, bfloat16")
    number = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
        dtype, torch.float32 if device.type == "cpu" else "auto"
    )
    foreign = source.published.llama is not None
    options = {"config": source.config, "key_mapping": dict(source.published.keys)} if foreign else {}
    model, info = from_pretrained(
        AutoModelForCausalLM, source.base, source.trust, dtype=number, output_loading_info=True,
        ignore_mismatched_sizes=True, adapter_kwargs=dict(NO_ADAPTER), **options,
    )  # fmt: skip
    _check(source.base, info)
    if foreign:
        model._weight_conversions = None  # else transformers would save under the published names, which fit no config
    loaded: PreTrainedModel = model.to(device)
    return loaded


def _check(folder: Path, info: dict[str, Any]) -> None:
    """Raise ConfigError unless the files and the model hold the same weights.  info: what transformers tells."""
    misshapen = [f"{name} {tuple(found)} for {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    unknown = [name for name in info["unexpected_keys"] if not HARMLESS.search(name)]
    for what, names in (
        ("missing or misshapen", [*info["missing_keys"], *misshapen]),
        ("unknown", unknown),
    ):
        if names:
            named = ", ".join(sorted(names)[:MOST_NAMED])
            way = "; config.json has no place for them, it is another model's or says too little" * (what == "unknown")
            raise ConfigError(f"model={folder}: {len(names)} weights are {what}, first {named}{way}")


def embedding_tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Input and output embedding tables, (rows, D) each; one entry where they are tied."""
    tables = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    if tables["output"] is tables["input"]:
        del tables["output"]
    return tables


def grow(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding tables that many rows at least. New ones hold nothing of use yet."""
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)
