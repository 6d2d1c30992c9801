"""The forward of Llama-shaped models, written out over their own weights.

Short forwards of small models wait for Python more than for arithmetic; this is the same arithmetic in a few calls a
layer, and what CUDA graphs capture (`graphs`) and `native` compiles. `Backbone` takes it where it fits and `probe` has
shown that it says what transformers says.

Legend: B rows, S slots fed, T key columns, H query heads, G key heads, E head size, D hidden, W window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .kv_cache import KVCache

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
    """Of one layer: the weights of both norms, and its maps. read: to queries, keys and values.  opened: to the gate
    and what it lets through.
    """

    before: Tensor
    after: Tensor
    read: Sequence[nn.Linear]
    out: nn.Linear
    opened: Sequence[nn.Linear]
    down: nn.Linear


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
    return len(layers) > 0 and all(type(layer.get_submodule(name)) is nn.Linear for layer in layers for name in LINEAR)


class Forward:
    """Calls of one model."""

    def __init__(self, model: Any, window: int) -> None:
        base, config = model.base_model, model.config
        self._embed, self._norm = base.embed_tokens, base.norm.weight
        self._size = base.layers[0].self_attn.head_dim  # E
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._eps = torch.tensor(config.rms_norm_eps, device=model.device)
        turn = base.rotary_emb(base.norm.weight, torch.arange(window, device=model.device)[None])
        cos, sin = (table[0][:, None] for table in turn)  # (W, 1, E) each
        self.cos, self.sin = cos, torch.cat((-sin[..., : self._size // 2], sin[..., self._size // 2 :]), -1)
        self._layers = []
        for layer in base.layers:
            parts = [layer.get_submodule(name) for name in LINEAR]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self._layers.append(_Layer(*norms, parts[:3], parts[3], parts[4:6], parts[6]))

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """ids, positions: (B, S).  mask: (B, 1, S, T), 0 where readable.  Returns (B, S, D) after the final norm."""
        rows, slots = ids.shape
        hidden = self._embed(ids)  # (B, S, D)
        cos, sin = self.cos[positions], self.sin[positions]  # (B, S, 1, E)
        queries_keys = self._heads + self._key_heads
        for number, layer in enumerate(self._layers):
            normal = self._normed(hidden, layer.before)
            heads = torch.cat([part(normal) for part in layer.read], -1).view(rows, slots, -1, self._size)
            _turn(heads[:, :, :queries_keys], cos, sin)
            heads = heads.transpose(1, 2)  # (B, heads, S, E)
            keys, values = cache.put(heads[:, self._heads :], number)  # (B, G, T, E)
            read = functional.scaled_dot_product_attention(
                heads[:, : self._heads], keys, values, attn_mask=mask, enable_gqa=True
            )  # (B, H, S, E)
            hidden = hidden + layer.out(read.transpose(1, 2).reshape(rows, slots, -1))
            normal = self._normed(hidden, layer.after)
            gate, through = (part(normal) for part in layer.opened)
            hidden = hidden + layer.down(functional.silu(gate).mul_(through))
        return self._normed(hidden, self._norm)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm. hidden: (B, S, D)."""
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, size, size, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * scale).to(hidden.dtype).mul_(weight)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding, in place.

    heads: (B, S, heads, E).  cos, sin: (B, S, 1, E), the sine of the left half negative.
    """
    left, right = heads.chunk(2, -1)
    other = torch.cat((right, left), -1)
    heads.mul_(cos).addcmul_(other, sin)
