"""The explicit Llama forward agrees with transformers' own, and is not taken where it would not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fluid_model.forward import llama
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.kv_cache import KVCache

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "biases everywhere, as openPangu and more": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "one key head a query head, tied": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "wide heads": LlamaConfig(**SIZES, head_dim=16),
    "scaled positions": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3, norms of queries and keys": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


def model_of(config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)  # norms are all 1 at first
    return model


def backbone_of(config, stored="float32"):
    """A model whose weights are stored so."""
    model = model_of(config)
    return Backbone(model.bfloat16() if stored == "bfloat16" else model, int8=stored == "int8")


@pytest.mark.parametrize("name", CONFIGS)
def test_it_agrees_with_transformers(name):
    """Prompts of different length, then more slots after each, in ragged rows."""
    model = model_of(CONFIGS[name])
    backbone = Backbone(model)
    assert backbone.explicit is not None
    ids, lengths = torch.randint(0, 97, (3, 14)), [9, 4, 7]
    cache = KVCache(3, 20)
    prompts = backbone.forward(ids[:, :9], cache.set_write_positions(0, [0] * 3, 9, ids.device), cache)
    more = torch.stack([row[n : n + 5] for row, n in zip(ids, lengths, strict=True)])
    tails = backbone.forward(more, cache.set_write_positions(0, lengths, 5, ids.device), cache)
    for row, n in enumerate(lengths):
        logits = backbone.logits(torch.cat([prompts[row, :n], tails[row]]))
        expected = model(input_ids=ids[row : row + 1, : n + 5]).logits[0]
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("widths", [[5, 1, 2], [1, 1, 5], [1, 0, 5], [3, 3, 3], [1, 1, 1]])
def test_padding_changes_nothing(widths):
    """Padded slots change no number of those that count."""
    backbone, ids, lengths = Backbone(model_of(CONFIGS["llama"])), torch.randint(0, 97, (3, 14)), [9, 4, 7]
    hidden = []
    for counted in (None, widths):
        cache = KVCache(3, 20)
        backbone.forward(ids[:, :9], cache.set_write_positions(0, [0] * 3, 9, ids.device), cache)
        plan = replace(cache.set_write_positions(0, lengths, 5, ids.device), widths=counted)
        hidden.append(backbone.forward(ids[:, 9:], plan, cache))
    for row, width in enumerate(widths):
        assert torch.allclose(hidden[0][row, :width], hidden[1][row, :width], atol=1e-5)


def test_it_follows_weights_that_change():
    model = model_of(CONFIGS["llama"])
    backbone, ids = Backbone(model), torch.arange(6)[None]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    cache = KVCache(1, 6)
    logits = backbone.logits(backbone.forward(ids, cache.set_write_positions(0, [0], 6, ids.device), cache))
    assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}]
)
def test_other_configurations_run_in_transformers(change):
    model = model_of(LlamaConfig(**SIZES, **change))
    backbone = Backbone(model)
    assert backbone.forward_choice == ("transformers", llama.misfit(model))
    backbone.probe()


def test_sliding_windows_and_lora_run_in_transformers():
    assert "sliding window" in llama.misfit(model_of(MistralConfig(**SIZES, sliding_window=8)))
    adapted = get_peft_model(model_of(CONFIGS["llama"]), LoraConfig(target_modules=["v_proj"]))
    assert "LoRA" in llama.misfit(adapted.get_base_model())
    Backbone(adapted.get_base_model()).probe()
