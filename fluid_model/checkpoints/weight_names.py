"""Names of the weights in a folder, read without the weights."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..common.errors import ConfigError
from ..common.files import read_json

HARMLESS = re.compile(
    r"(^|\.)(v_head|score)\.|(^|\.)position_ids$|rotary_emb\.(inv_freq|\w*cached)$"
    r"|\.(attn|attention|self_attn)\.(attention\.)?(masked_bias|bias)$"
)
"""Ignored weights, which change no logit: value and classification heads, rotary tables, causal masks."""
WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
"""How files of weights are named."""
MAX_NAMED = 3
"""Weights named by a message."""


def has_weights(folder: Path) -> bool:
    """Whether the folder holds weights of a model."""
    return any(file.is_file() for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def stored_names(folder: Path) -> set[str] | None:
    """Names of the weights in safetensors files, by index or header; None where there are none to be read."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weights: Any = read_json(index).get("weight_map")
        return set(weights) if isinstance(weights, dict) else None
    if not single.is_file():
        return None
    try:
        with safe_open(single, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError):
        return None  # reported when the weights are loaded


def refuse(folder: Path, missing: Collection[str], unknown: Collection[str]) -> None:
    """Raise ConfigError if weights are missing, or unknown ones are not harmless."""
    if missing:
        named = ", ".join(sorted(missing)[:MAX_NAMED])
        raise ConfigError(f"model={folder}: {len(missing)} weights are missing or misshapen, first {named}")
    unknown = [name for name in unknown if not HARMLESS.search(name)]
    if unknown:
        named = ", ".join(sorted(unknown)[:MAX_NAMED])
        why = "config.json has no place for them, it is another model's or says too little"
        raise ConfigError(f"model={folder}: {len(unknown)} weights are unknown, first {named}; {why}")
