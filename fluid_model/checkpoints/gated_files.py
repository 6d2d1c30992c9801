"""The files of a gated adapter: LoRA matrices and configuration as PEFT writes them.

ADAPTER/adapter_config.json          PEFT's LoraConfig, with `gated_by`, the text of the mask token
ADAPTER/adapter_model.safetensors    lora_A and lora_B of every adapted map

PEFT reads these files, and would apply them to every token; it warns about `gated_by`, which it does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..common.errors import ConfigError
from ..common.files import read_json
from ..forward.gated_lora import GROUPS, GatedLora

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
GATED_BY = "gated_by"
"""Key of adapter_config.json."""


def save_gated(adapter: GatedLora, folder: Path, parent: str, mask_token: str) -> None:
    """Write a gated adapter's two files.  parent: as in the manifest."""
    folder.mkdir()
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=sorted(adapter.maps(0)), task_type="CAUSAL_LM",
        base_model_name_or_path=parent, inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    values = read_json(folder / CONFIG_FILE) | {GATED_BY: mask_token}
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(_tensors(adapter), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_gated(model: Any, folder: Path, mask_id: int) -> GatedLora:
    """The adapter in a folder, over its parent.

    Raises ConfigError for a configuration that is no plain LoRA, and for weights that do not fit the parent.
    """
    # 1) the files
    config = read_json(folder / CONFIG_FILE)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / WEIGHTS_FILE}: not a safetensors file: {error}") from error
    # 2) the configuration
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    plain = config.get("peft_type") == "LORA" and not config.get("use_rslora") and not config.get("use_dora")
    if not (plain and isinstance(rank, int) and isinstance(alpha, int | float) and isinstance(targets, list)):
        raise ConfigError(f"{folder / CONFIG_FILE}: a gated adapter is a plain LoRA with named target_modules")
    adapter = GatedLora(model, mask_id, rank, alpha, targets)
    # 3) the weights
    parameters = _tensors(adapter)
    if parameters.keys() != tensors.keys():
        other = min(parameters.keys() ^ tensors.keys())
        raise ConfigError(f"{folder / WEIGHTS_FILE}: not the weights of this adapter and parent, first {other}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)} for {tuple(parameter.shape)}"
                raise ConfigError(f"{folder / WEIGHTS_FILE}: {name} is {shapes}: another parent's?")
            parameter.copy_(tensors[name])
    return adapter.to(model.device).requires_grad_(False)


def refuse_gated(folder: Path) -> None:
    """Raise ConfigError for a folder that holds the PEFT files of a gated adapter alone, which PEFT would not gate."""
    if read_json(folder / CONFIG_FILE).get(GATED_BY) is not None:
        raise ConfigError(f"{folder}: a gated adapter, for mask slots alone; open the folder of its fluid.json")


def _tensors(adapter: GatedLora) -> dict[str, Tensor]:
    """The matrices by PEFT's names. Those in memory are shared, not copied."""
    tensors = {}
    for number in range(len(adapter.layers)):
        maps = adapter.maps(number)
        for path in (path for group in GROUPS.values() for path in group):
            name = path.rpartition(".")[2]
            if name in maps:
                prefix = f"base_model.model.model.layers.{number}.{path}"
                tensors[f"{prefix}.lora_A.weight"] = maps[name].down.detach()
                tensors[f"{prefix}.lora_B.weight"] = maps[name].up.detach()
    return tensors
