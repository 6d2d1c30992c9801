"""The explicit Llama forward: the arithmetic of Llama-shaped models in few calls a layer, over the model's own weights.

Short forwards of small models wait for Python more than for arithmetic. This one has no module calls. CUDA graphs
capture it (`cuda_graphs`), and `compiled` is the same in C. `Backbone` takes it where `misfit` gives no reason against
it; `Backbone.probe` compares it with transformers' own.

Source: Llama (Touvron et al. 2023), grouped-query attention (Ainslie et al. 2023), rotary embedding (Su et al. 2021),
norms of queries and keys (Qwen3, Yang et al. 2025).

Legend: B rows, S slots fed, T key columns, H query heads, G key heads, E head size, D hidden, W window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .gated_lora import GatedLora, GroupedMap, GroupedMaps
from .kv_cache import KeyValueStore

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Linear maps of every layer. Anything but plain ones (LoRA, quantised weights) is left to transformers."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on a slot's position alone."""


@dataclass(frozen=True)
class _LayerWeights:
    """The weights of one layer: RMS norms and linear maps.  head_norms: of queries and keys, none but in Qwen3."""

    attention_norm: Tensor
    mlp_norm: Tensor
    qkv: Sequence[nn.Linear]
    attention_out: nn.Linear
    gate_up: Sequence[nn.Linear]
    down: nn.Linear
    head_norms: tuple[Tensor, Tensor] | None


def head_norms(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Weights of the RMS norms that Qwen3 applies to every head's queries and keys, before they are rotated."""
    attention = layer.self_attn
    return (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None


def misfit(model: Any) -> str:
    """Why this module's forward is not the model's, in one line; empty where it is."""
    if type(model).__name__ not in MODELS:
        return f"{type(model).__name__} is none of {', '.join(MODELS)}"
    if model.config.hidden_act != "silu":
        return f"the MLP's activation is {model.config.hidden_act}, not silu"
    if getattr(model.config, "sliding_window", None) is not None:
        return "attention has a sliding window"
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPES:
        return f"rotary embedding {rope} depends on more than the position"
    layers = model.base_model.layers
    if not len(layers):
        return "the model has no layers"
    plain = all(type(layer.get_submodule(name)) is nn.Linear for layer in layers for name in LINEAR)
    return "" if plain else "some linear maps are not plain ones (LoRA, quantised weights)"


class _Gate:
    """The gated adapter in one forward: low-rank maps that act on its mask slots."""

    def __init__(self, maps: Sequence[Mapping[str, GroupedMap]], embedding: Tensor, gate: Tensor) -> None:
        """maps: of every layer.  embedding: of the mask token, (D,).  gate: (B, S) bool, True at mask slots."""
        self.embedding, self.mask = embedding, gate[..., None]  # (B, S, 1)
        self._maps, self._factor = maps, self.mask.to(embedding.dtype)

    def add(self, layer: int, group: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        """outputs: (B, S, N) of the group's own maps for inputs (B, S, K). Those of other slots are unchanged."""
        low_rank: GroupedMap | None = self._maps[layer].get(group)
        return outputs if low_rank is None else outputs + low_rank(inputs) * self._factor


class ExplicitForward:
    """The forward of one model, in torch. Differentiable in a gated adapter's parameters."""

    def __init__(self, model: Any, window: int, adapter: GatedLora | None = None) -> None:
        base, config = model.base_model, model.config
        self._adapter = adapter
        self._grouped = None if adapter is None else GroupedMaps(adapter)
        self._embed, self._final_norm = base.embed_tokens, base.norm.weight
        self._head_size = base.layers[0].self_attn.head_dim  # E
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._eps = torch.tensor(config.rms_norm_eps, device=model.device)
        wide = base.norm.weight.float()  # tables in this precision
        angles = base.rotary_emb(wide, torch.arange(window, device=model.device)[None])
        cos, sin = (table[0][:, None] for table in angles)  # (W, 1, E) each
        half = self._head_size // 2
        self.cos, self.sin = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
        """By position, (W, 1, E) float32 each, the sine of the left half negative."""
        self._tables = self.cos.to(model.dtype), self.sin.to(model.dtype)
        self._layers = []
        for layer in base.layers:
            maps = [layer.get_submodule(name) for name in LINEAR]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            self._layers.append(_LayerWeights(*norms, maps[:3], maps[3], maps[4:6], maps[6], head_norms(layer)))

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KeyValueStore) -> Tensor:
        """ids, positions: (B, S).  mask: (B, 1, S, T) additive, 0 where a query attends to a key.

        Returns (B, S, D) after the final norm.
        """
        hidden = self._embed(ids)  # (B, S, D)
        gate = self._open_gate(ids, hidden.dtype)
        if gate is not None:
            hidden = torch.where(gate.mask, gate.embedding, hidden)
        cos, sin = (table[positions] for table in self._tables)  # (B, S, 1, E)
        for number, layer in enumerate(self._layers):
            hidden = hidden + self._attention(number, layer, hidden, cos, sin, mask, cache, gate)
            hidden = hidden + self._mlp(number, layer, hidden, gate)
        return self._rms_norm(hidden, self._final_norm)

    def _attention(
        self,
        number: int,
        layer: _LayerWeights,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        cache: KeyValueStore,
        gate: _Gate | None,
    ) -> Tensor:
        """What the attention of one layer adds to the residual stream, (B, S, D)."""
        rows, slots, _ = hidden.shape
        normalized = self._rms_norm(hidden, layer.attention_norm)
        qkv = torch.cat([linear(normalized) for linear in layer.qkv], -1)
        if gate is not None:
            qkv = gate.add(number, "qkv", normalized, qkv)
        qkv = self._normalize_heads(layer, qkv.view(rows, slots, -1, self._head_size))  # (B, S, H + 2 G, E)
        _rope(qkv[:, :, : self._heads + self._key_heads], cos, sin)
        qkv = qkv.transpose(1, 2)  # (B, H + 2 G, S, E)
        keys, values = cache.put(qkv[:, self._heads :], number)  # (B, G, T, E)
        heads = functional.scaled_dot_product_attention(
            qkv[:, : self._heads], keys, values, attn_mask=mask, enable_gqa=True
        )  # (B, H, S, E)
        heads = heads.transpose(1, 2).reshape(rows, slots, -1)
        out: Tensor = layer.attention_out(heads)
        return out if gate is None else gate.add(number, "attention_out", heads, out)

    def _normalize_heads(self, layer: _LayerWeights, qkv: Tensor) -> Tensor:
        """qkv: (B, S, H + 2 G, E), whose queries and keys are normalized where the layer has norms for them."""
        if layer.head_norms is None:
            return qkv
        queries, keys, values = torch.split(qkv, [self._heads, self._key_heads, self._key_heads], 2)
        query_norm, key_norm = layer.head_norms
        return torch.cat((self._rms_norm(queries, query_norm), self._rms_norm(keys, key_norm), values), 2)

    def _mlp(self, number: int, layer: _LayerWeights, hidden: Tensor, gate: _Gate | None) -> Tensor:
        """What the MLP of one layer adds to the residual stream, (B, S, D)."""
        normalized = self._rms_norm(hidden, layer.mlp_norm)
        if gate is None:
            left, right = (linear(normalized) for linear in layer.gate_up)  # (B, S, F) each
        else:
            both = torch.cat([linear(normalized) for linear in layer.gate_up], -1)
            left, right = gate.add(number, "gate_up", normalized, both).chunk(2, -1)
        inner = functional.silu(left).mul_(right)
        out: Tensor = layer.down(inner)
        return out if gate is None else gate.add(number, "down", inner, out)

    def _open_gate(self, ids: Tensor, dtype: torch.dtype) -> _Gate | None:
        """The adapter's part in this forward; None without an adapter, or on a CPU without mask slots."""
        if self._adapter is None or self._grouped is None:
            return None
        gate = self._adapter.gate(ids)
        if gate.device.type == "cpu" and not bool(gate.any()):
            return None
        return _Gate(self._grouped.of(dtype), self._adapter.mask_embedding.to(dtype), gate)

    def _rms_norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm, its scale taken in float32 at least. hidden: (B, S, D)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=wide)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * scale).to(hidden.dtype).mul_(weight)


def _rope(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding, in place.

    heads: (B, S, heads, E).  cos, sin: (B, S, 1, E), the sine of the left half negative.
    """
    left, right = heads.chunk(2, -1)
    swapped = torch.cat((right, left), -1)
    heads.mul_(cos).addcmul_(swapped, sin)
