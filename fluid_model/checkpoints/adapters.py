"""PEFT adapters over the model they name: as anyone saves them, and as this project's folders hold them.

Any kind that can be merged into weights is read (LoRA, DoRA, rsLoRA, IA3, ...), with token rows, whole modules and
grown vocabularies of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..common.errors import ConfigError, reason
from ..forward.backbone import difference, tolerance
from .published_layouts import ADAPTER_KEYS
from .weights import embedding_tables

FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""Before the base's own names, in an adapter's files."""
TRIED = 12
"""Tokens on which a merged model must say what PEFT says."""


def put(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the folder's adapter in it, as PEFT itself loads it; its vocabulary as large as the adapter's.

    Raises ConfigError where PEFT refuses, and where the folder lacks a weight or holds one that found no place.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise ConfigError(f"{folder}: an adapter without weights: neither {' nor '.join(FILES)} is here")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning or config.is_adaption_prompt:
            kind = config.peft_type.value
            raise ConfigError(f"{folder}: peft_type={kind} cannot be merged into weights, as LoRA or IA3 can")
        config.inference_mode = True
        tensors = load_peft_weights(str(folder), device="cpu", key_mapping=ADAPTER_KEYS)
        if (rows := _vocabulary(model, tensors)) is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapter = PeftModelForCausalLM(model, config)
        set_peft_model_state_dict(adapter, tensors)
        needed = get_peft_model_state_dict(adapter, save_embedding_layers=False).keys()
        known = needed | get_peft_model_state_dict(adapter, save_embedding_layers=True).keys()
    except ConfigError:
        raise
    except Exception as error:  # of torch, PEFT, safetensors and transformers, whose types share nothing
        raise ConfigError(f"{folder}: PEFT cannot load this adapter: {reason(error)}") from error
    for what, names in (("missing", needed - tensors.keys()), ("unknown", tensors.keys() - known)):
        if names:
            raise ConfigError(f"{folder}: {len(names)} adapter weights are {what}, first {min(names)}: another base's?")
    return adapter


@torch.inference_mode()
def merge(adapter: PeftModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter merged into its weights. Raises ConfigError where it would not say the same."""
    base = adapter.get_base_model()
    ids = torch.arange(TRIED, device=base.device)[None] % base.config.get_text_config(decoder=True).vocab_size
    expected = adapter(input_ids=ids, use_cache=False).logits
    try:
        _unshare(adapter)
        model: PreTrainedModel = adapter.merge_and_unload()
        found = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # some kinds of adapters cannot be merged, each in words of its own
        raise ConfigError(f"{folder}: PEFT cannot merge this adapter: {reason(error)}") from error
    if not (worst := difference(found, expected)) < tolerance(model.dtype):
        raise ConfigError(f"{folder}: merged into the weights, this adapter says something else (by {worst:.2g})")
    _settle_tie(model)
    return model


def _vocabulary(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> int | None:
    """Rows of the embedding tables that an adapter's file holds whole; None if it holds none."""
    tables = {id(module): name for name, module in model.named_modules()}
    names = [tables[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    width = model.get_input_embeddings().weight.shape[1]
    rows = [
        tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith(".weight") and ".lora_" not in key and tensor.ndim == 2 and tensor.shape[1] == width
        if any(key.startswith(f"{PREFIX}{name}.") for name in names)
    ]
    return max(rows, default=None)


def _unshare(adapter: PeftModel) -> None:
    """Give every module that an adapter wraps weights of its own: merging writes into them, and others may read the
    same ones (tied tables). The layers that an adapter repeats share all they have.
    """
    tables = [*embedding_tables(adapter.get_base_model()).values()]
    wrapped = {layer.get_base_layer() for layer in adapter.modules() if isinstance(layer, BaseTunerLayer)}
    users: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in adapter.modules():
        for name, weight in module.named_parameters(recurse=False):
            users.setdefault(weight, []).append((module, name))
    for weight, places in users.items():
        if any(module in wrapped for module, _ in places) or all(weight is not table for table in tables):
            for module, name in places[1:]:
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))


def _settle_tie(model: PreTrainedModel) -> None:
    """Tie the embedding tables again if they came out equal; else say in the configuration that they are two."""
    tables = embedding_tables(model)
    if len(tables) == 2 and model.config.get_text_config(decoder=True).tie_word_embeddings:
        if torch.equal(tables["input"], tables["output"]):
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        else:
            model.config.get_text_config(decoder=True).tie_word_embeddings = model.config.tie_word_embeddings = False
