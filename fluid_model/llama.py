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
from .linear import FEWEST, Linear, bucket, packs

MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
LINEAR = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
"""Of every layer; anything but plain linear maps (LoRA, quantised weights) is transformers' to run."""
FEW = 32
"""Slots of many short rows on a CPU up to which attention is three plain products: the fused one is slower there."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on a slot's position alone."""


@dataclass(frozen=True)
class _Layer:
    """Of one layer: the weights of both norms, and its maps. read: to queries, keys and values.  opened: to the gate
    and what it lets through.
    """

    before: Tensor
    after: Tensor
    read: Linear
    out: Linear
    opened: Linear
    down: Linear


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
        self._cos, self._sin = cos, torch.cat((-sin[..., : self._size // 2], sin[..., self._size // 2 :]), -1)
        parts = [[layer.get_submodule(name) for name in LINEAR] for layer in base.layers]
        self.packs = packs([part.weight for layer in parts for part in layer])
        """Whether oneDNN runs the maps: then slots are filled up to a `bucket`."""
        self._layers = []
        for layer, linear in zip(base.layers, parts, strict=True):
            weights = [(part.weight, part.bias) for part in linear]
            maps = (Linear(some, pack=self.packs) for some in (weights[:3], weights[3:4], weights[4:6], weights[6:]))
            self._layers.append(_Layer(layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *maps))

    def __call__(
        self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache, widths: list[int] | None = None
    ) -> Tensor:
        """ids, positions: (B, S).  mask: (B, 1, S, T), 0 where readable.  widths: slots of each row that count, the
        rest being padding (None: all).  Returns (B, S, D) after the final norm.
        """
        rows, slots = ids.shape
        there, back = self._flat(rows, slots, widths, ids.device)
        hidden = self._embed(_take(ids.flatten(), there))  # (M, D)
        cos, sin = self._cos[positions], self._sin[positions]  # (B, S, 1, E)
        queries_keys = self._heads + self._key_heads
        for number, layer in enumerate(self._layers):
            fresh = layer.read(self._normed(hidden, layer.before))
            heads = _take(fresh, back).view(rows, slots, -1, self._size)
            _turn(heads[:, :, :queries_keys], cos, sin)
            heads = heads.transpose(1, 2)  # (B, heads, S, E)
            keys, values = cache.put(heads[:, self._heads :], number)  # (B, G, T, E)
            read = _attend(heads[:, : self._heads], keys, values, mask)  # (B, H, S, E)
            hidden = layer.out(_take(read.transpose(1, 2).reshape(rows * slots, -1), there), hidden)
            gate, through = layer.opened(self._normed(hidden, layer.after)).chunk(2, -1)
            hidden = layer.down(functional.silu(gate).mul_(through), hidden)
        return _take(self._normed(hidden, self._norm), back).view(rows, slots, -1)

    def _flat(
        self, rows: int, slots: int, widths: list[int] | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which of all B S slots the maps run for, (M,), and which of those each slot takes, (B S,); None: all."""
        count = rows * slots if widths is None else sum(widths)
        filled = bucket(count)
        if not self.packs or count < FEWEST or filled == rows * slots:
            return None, None
        widths = widths or [slots] * rows
        there = [row * slots + slot for row, width in enumerate(widths) for slot in range(width)]
        back, start = [], 0
        for width in widths:  # padding repeats its own row's first slot: what is broken in a row stays in it
            back += [*range(start, start + width), *[start] * (slots - width)]
            start += width
        there += [0] * (filled - count)
        return torch.tensor(there, device=device), torch.tensor(back, device=device)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm. hidden: (M, D)."""
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._eps, size, size, value=1 / hidden.shape[-1]).rsqrt_()
        return (hidden * scale).to(hidden.dtype).mul_(weight)


def _take(slots: Tensor, which: Tensor | None) -> Tensor:
    """Some of (M, ...); all if None."""
    return slots if which is None else slots.index_select(0, which)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding, in place.

    heads: (B, S, heads, E).  cos, sin: (B, S, 1, E), the sine of the left half negative.
    """
    left, right = heads.chunk(2, -1)
    other = torch.cat((right, left), -1)
    heads.mul_(cos).addcmul_(other, sin)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """queries: (B, H, S, E).  keys, values: (B, G, T, E).  mask: (B, 1, S, T).  Returns (B, H, S, E)."""
    (rows, heads, slots, size), key_heads = queries.shape, keys.shape[1]
    if rows == 1 or slots > FEW or queries.device.type != "cpu":
        return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    grouped = queries.reshape(rows, key_heads, -1, size)  # (B, G, H / G S, E)
    scores = (grouped @ keys.transpose(2, 3)).view(rows, key_heads, heads // key_heads, slots, -1)
    shares = torch.add(mask[:, :, None], scores, alpha=size**-0.5).softmax(-1)
    return (shares.view(rows, key_heads, -1, keys.shape[2]) @ values).view(rows, heads, slots, size)
