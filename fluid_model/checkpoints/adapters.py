"""PEFT adapters: loaded over their base model, and merged into its weights.

Every kind that PEFT can merge is supported (LoRA, DoRA, rsLoRA, IA3, ...), with trained token rows, saved modules and
larger vocabularies.
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
"""Prefix of the base model's parameter names in an adapter's file."""
PROBE_TOKENS = 12
"""Tokens on which a merged model must reproduce the adapter's logits."""


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Load the folder's adapter over the model, as PEFT does. The vocabulary grows to the adapter's size.

    Raises ConfigError if PEFT cannot load it, if a weight is missing, or if one does not belong to it.
    """
    # 1) the configuration, of a kind that can be merged
    if not any((folder / name).is_file() for name in FILES):
        raise ConfigError(f"{folder}: an adapter without weights: neither {' nor '.join(FILES)} is here")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning or config.is_adaption_prompt:
            kind = config.peft_type.value
            raise ConfigError(f"{folder}: peft_type={kind} cannot be merged into weights, as LoRA or IA3 can")
        config.inference_mode = True
        # 2) the weights, into a vocabulary that is large enough
        tensors = load_peft_weights(str(folder), device="cpu", key_mapping=ADAPTER_KEYS)
        if (rows := _vocabulary(model, tensors)) is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapter = PeftModelForCausalLM(model, config)
        set_peft_model_state_dict(adapter, tensors)
        # 3) the weights that the adapter must and may have
        needed = get_peft_model_state_dict(adapter, save_embedding_layers=False).keys()
        known = needed | get_peft_model_state_dict(adapter, save_embedding_layers=True).keys()
    except ConfigError:
        raise
    except Exception as error:  # of torch, PEFT, safetensors and transformers, without a common type
        raise ConfigError(f"{folder}: PEFT cannot load this adapter: {reason(error)}") from error
    for fault, names in (("missing", needed - tensors.keys()), ("unknown", tensors.keys() - known)):
        if names:
            first = min(names)
            raise ConfigError(f"{folder}: {len(names)} adapter weights are {fault}, first {first}: another base's?")
    return adapter


@torch.inference_mode()
def merge(adapter: PeftModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter merged into its weights. Raises ConfigError if its logits would differ."""
    base = adapter.get_base_model()
    ids = torch.arange(PROBE_TOKENS, device=base.device)[None] % base.config.get_text_config(decoder=True).vocab_size
    expected = adapter(input_ids=ids, use_cache=False).logits
    try:
        _untie(adapter)
        model: PreTrainedModel = adapter.merge_and_unload()
        logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # adapters that cannot be merged raise errors of many types
        raise ConfigError(f"{folder}: PEFT cannot merge this adapter: {reason(error)}") from error
    worst = difference(logits, expected)
    if not worst < tolerance(model.dtype):  # or not a number
        raise ConfigError(f"{folder}: merged into the weights, this adapter gives other logits (by {worst:.2g})")
    _restore_tie(model)
    return model


def _vocabulary(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> int | None:
    """Rows of the embedding tables saved with an adapter; None if it has none."""
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


def _untie(adapter: PeftModel) -> None:
    """Give every adapted module weights of its own, as merging changes them in place.

    Other modules may share these weights: tied embedding tables, and layers that an adapter repeats.
    """
    tables = [*embedding_tables(adapter.get_base_model()).values()]
    wrapped = {layer.get_base_layer() for layer in adapter.modules() if isinstance(layer, BaseTunerLayer)}
    users: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in adapter.modules():
        for name, weight in module.named_parameters(recurse=False):
            users.setdefault(weight, []).append((module, name))
    for weight, uses in users.items():
        if any(module in wrapped for module, _ in uses) or all(weight is not table for table in tables):
            for module, name in uses[1:]:
                setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=False))


def _restore_tie(model: PreTrainedModel) -> None:
    """Tie the embedding tables again if they are still equal; else clear the tie in the configuration."""
    tables = embedding_tables(model)
    if len(tables) == 2 and model.config.get_text_config(decoder=True).tie_word_embeddings:
        if torch.equal(tables["input"], tables["output"]):
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        else:
            model.config.get_text_config(decoder=True).tie_word_embeddings = model.config.tie_word_embeddings = False
