"""A gated adapter: LoRA that acts on mask slots alone.

Under causal attention no token reads a mask slot of its draft, so keys, values and logits of every token stay the
parent's. What verification writes is then the parent's own greedy text, whatever the adapter has learnt.

    slot         t  t  t  M  M  M        t token, M mask
    linear map   W  W  W  +  +  +        +: W x + scale B A x

Source: LoRA (Hu et al. 2021); gating by slot as in Samragh et al. 2025 (arXiv 2507.11851, gated LoRA).

Legend: L layers, R rank, K inputs, N outputs, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linear maps of a layer that read the same input, in the order of their outputs."""


class LowRank(nn.Module):
    """One low-rank map, B A x.  down: A, (R, K).  up: B, (N, R), zero at first."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


class GroupedMap(NamedTuple):
    """The low-rank maps of one group as one.

    down: (R', K), one below another.  up: (N', R'), block-diagonal, times the scale.
    """

    down: Tensor
    up: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """(..., K) -> (..., N')."""
        return functional.linear(functional.linear(inputs, self.down), self.up)


class GatedLora(nn.Module):
    """The low-rank maps of every layer, and the mask token's embedding.

    mask_id: the token that opens the gate.  scale: alpha / rank.  layers: one `LowRank` per adapted map, by its last
    name.  mask_embedding: (D,).
    """

    def __init__(self, model: Any, mask_id: int, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
        """model: Llama-shaped, see `llama.misfit`.  targets: last names of the adapted maps; none: all."""
        super().__init__()
        self.mask_id, self.rank, self.alpha = mask_id, rank, alpha
        self.layers = nn.ModuleList()
        self._outputs = [_outputs(layer) for layer in model.base_model.layers]
        for layer in model.base_model.layers:
            maps = nn.ModuleDict()
            for path in (path for group in GROUPS.values() for path in group):
                linear = layer.get_submodule(path)
                if not targets or _last(path) in targets:
                    maps[_last(path)] = LowRank(linear.in_features, linear.out_features, rank)
            self.layers.append(maps)
        self.mask_embedding = nn.Parameter(model.get_input_embeddings().weight[mask_id].detach().float().clone())

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def gate(self, ids: Tensor) -> Tensor:
        """True at mask slots: (B, S) -> (B, S) bool."""
        return ids == self.mask_id

    def maps(self, layer: int) -> Mapping[str, LowRank]:
        """The low-rank maps of one layer, by the last name of the map that each belongs to."""
        return cast(Mapping[str, LowRank], self.layers[layer])

    def grouped(self, layer: int, dtype: torch.dtype) -> dict[str, GroupedMap]:
        """The low-rank maps of one layer, for each of `GROUPS` that has any. Gradients flow to the parameters."""
        maps = self.maps(layer)
        grouped = {}
        for group, paths in GROUPS.items():
            adapted = [path for path in paths if _last(path) in maps]
            if not adapted:
                continue
            # 1) A of the adapted maps, one below another
            down = torch.cat([maps[_last(path)].down for path in adapted])
            # 2) B of each in its own columns; no rows for a map that is not adapted would shift those behind it
            blocks, column = [], 0
            for path in paths:
                up: Tensor = down.new_zeros(self._outputs[layer][path], 0)
                if path in adapted:
                    up = maps[_last(path)].up
                right = down.shape[0] - column - up.shape[1]
                blocks.append(functional.pad(up, (column, right)))
                column += up.shape[1]
            grouped[group] = GroupedMap(down.to(dtype), (self.scale * torch.cat(blocks)).to(dtype))
        return grouped


class GroupedMaps:
    """The grouped maps of every layer, made once and again after the adapter's parameters have changed."""

    def __init__(self, adapter: GatedLora) -> None:
        self._adapter = adapter
        self._parameters = list(adapter.parameters())
        self._key: tuple[int, torch.dtype] | None = None
        self._maps: list[dict[str, GroupedMap]] = []

    def of(self, dtype: torch.dtype) -> list[dict[str, GroupedMap]]:
        """By layer. With gradients they are made anew, as part of the graph."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._parameters):
            return self._make(dtype)
        key = sum(parameter._version for parameter in self._parameters), dtype
        if key != self._key:
            self._key, self._maps = key, self._make(dtype)
        return self._maps

    def _make(self, dtype: torch.dtype) -> list[dict[str, GroupedMap]]:
        return [self._adapter.grouped(layer, dtype) for layer in range(len(self._adapter.layers))]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _outputs(layer: nn.Module) -> dict[str, int]:
    """Outputs of every linear map of a layer."""
    paths = [path for group in GROUPS.values() for path in group]
    return {path: layer.get_submodule(path).out_features for path in paths}  # type: ignore[misc]
