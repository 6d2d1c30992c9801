"""Weights as the compiled code reads them.

A linear map's weights are packed in panels of 2 * lanes output columns, so that a matrix product reads them once and in
order. That is a second copy of the model: MAX_BYTES says how large a model may be.

Legend: N outputs, K inputs, P panel width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..gated_lora import GroupedMap
from . import structs

MAX_BYTES = 2**28
"""Bytes of weights of the largest model that runs compiled: 67 million parameters. It bounds the memory of the second
copy; no code depends on it otherwise. Threads share a batch by rows, so one row takes one thread at any size.
"""

_version = attrgetter("_version")


class PackedWeights:
    """Holds the copies that C structures point to."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._held: list[Tensor] = []

    def address(self, tensor: Tensor) -> int:
        """Address of a tensor's numbers, as they are; copied if they are not contiguous."""
        self._held.append(tensor.detach().contiguous())
        return self._held[-1].data_ptr()

    def linear(self, modules: Sequence[nn.Linear]) -> structs.Linear:
        """Linear maps of one input, packed as one map with their outputs one behind another."""
        bias = _biases(modules) if any(module.bias is not None for module in modules) else None
        return self.matrix(torch.cat([module.weight.detach() for module in modules]), bias)

    def gated(self, modules: Sequence[nn.Linear], low_rank: GroupedMap | None) -> structs.GatedLinear:
        """Linear maps of one input, and what an adapter adds to them at mask slots."""
        full = self.linear(modules)
        if low_rank is None:
            return structs.GatedLinear(full)
        return structs.GatedLinear(full, self.matrix(low_rank.down.detach()), self.matrix(low_rank.up.detach()))

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> structs.Linear:
        """weight: (N, K).  bias: (N,)."""
        width = 2 * self._lanes  # P
        filled = functional.pad(weight, (0, 0, 0, -len(weight) % width))
        panels = filled.view(-1, width, weight.shape[1]).transpose(1, 2)  # (N / P, K, P)
        address = None if bias is None else self.address(bias)
        return structs.Linear(self.address(panels), address, weight.shape[1], len(weight))


def _biases(modules: Sequence[nn.Linear]) -> Tensor:
    """(N,), zeros where a map has no bias."""
    return torch.cat([
        module.weight.new_zeros(module.out_features) if module.bias is None else module.bias.detach()
        for module in modules
    ])  # fmt: skip


class Versions:
    """Tells whether weights were changed in place since they were packed."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = list(weights)
        self._packed = -1

    def changed(self) -> bool:
        """True at first, and after every change; the change then counts as seen."""
        before, self._packed = self._packed, sum(map(_version, self._weights))
        return self._packed != before


def readable(tensors: Sequence[Tensor]) -> bool:
    """Whether compiled code can read these: float32 on a CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def untracked(weights: Sequence[Tensor]) -> bool:
    """Whether changes could not be noticed: inference tensors have no version."""
    return any(weight.is_inference() for weight in weights)
