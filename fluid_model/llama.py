"""The forward of Llama-shaped models, written out over their own weights.

Short forwards of small models wait for Python more than for arithmetic; this is the same arithmetic in a few calls a
layer. `Backbone` takes it where it fits and `probe` has shown that it says what transformers says.

Legend: B rows, S slots fed, T key columns, H query heads, G key heads, E head size, D hidden, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .engine.cache import SlotCache

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Of every layer; anything but plain linear maps (LoRA, quantised weights) is transformers' to run."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on a slot's position alone."""


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, the model's own tensors: of both norms, and (weight, bias) in the order of LINEAR."""

    before: Tensor
    after: Tensor
    linear: tuple[tuple[Tensor, Tensor | None], ...]


def fits(model: Any) -> bool:
    """Whether this module's forward is the model's: a known architecture, plain linear layers, nothing wrapped."""
    if type(model).__name__ not in MODELS or model.config.hidden_act != "silu":
        return False
    if getattr(model.config, "sliding_window", None) is not None:
        return False
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in FIXED_ROPES:
        return False
    layers = model.base_model.layers
    return all(type(layer.get_submodule(name)) is nn.Linear for layer in layers for name in LINEAR)


class Forward:
    """Calls of one model."""

    def __init__(self, model: Any, window: int) -> None:
        base, config = model.base_model, model.config
        self._embed, self._norm, self._eps = base.embed_tokens, base.norm.weight, config.rms_norm_eps
        self._size = base.layers[0].self_attn.head_dim  # E
        places = torch.arange(window, device=model.device)[None]
        turn = base.rotary_emb(base.norm.weight, places)
        self._cos, self._sin = (table[0][:, None] for table in turn)  # (W, 1, E) each
        self._layers = []
        for layer in base.layers:
            parts = [layer.get_submodule(name) for name in LINEAR]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self._layers.append(_Layer(*norms, tuple((part.weight, part.bias) for part in parts)))

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """ids, positions: (B, S).  mask: (B, 1, S, T), 0 where readable.  Returns (B, S, D) after the final norm."""
        hidden = self._embed(ids)
        cos, sin = self._cos[positions], self._sin[positions]  # (B, S, 1, E)
        heads = (*ids.shape, -1, self._size)
        for number, layer in enumerate(self._layers):
            query, key, value, out, gate, up, down = layer.linear
            fresh = functional.rms_norm(hidden, hidden.shape[-1:], layer.before, self._eps)
            queries, keys, values = (functional.linear(fresh, *part).view(heads) for part in (query, key, value))
            queries, keys = (_turn(each, cos, sin).transpose(1, 2) for each in (queries, keys))  # (B, heads, S, E)
            keys, values = cache.update(keys, values.transpose(1, 2), number)  # (B, G, T, E)
            read = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            hidden += functional.linear(read.transpose(1, 2).flatten(2), *out)
            fresh = functional.rms_norm(hidden, hidden.shape[-1:], layer.after, self._eps)
            opened = functional.silu(functional.linear(fresh, *gate), inplace=True).mul_(functional.linear(fresh, *up))
            hidden += functional.linear(opened, *down)
        return functional.rms_norm(hidden, hidden.shape[-1:], self._norm, self._eps)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. heads: (B, S, heads, E).  cos, sin: (B, S, 1, E)."""
    left, right = heads.chunk(2, -1)
    return torch.addcmul(heads * cos, torch.cat((-right, left), -1), sin)
