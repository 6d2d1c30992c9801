"""Weights as the compiled code reads them.

A linear map's weights are packed in panels of 2 * lanes output columns, so that a matrix product reads them once and in
order. That is a second copy of the model in memory, beside torch's.

Legend: N outputs, K inputs, P panel width.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from ..gated_lora import GroupedMap
from . import structs

MEMORY_SHARE = 0.75
"""Largest part of the free memory that the second copy may take."""
ARENA = 1 << 24
"""Floats of one piece of memory for panels, at most, where a single map needs no more."""
ALIGNED = 16
"""Panels start at a multiple of so many floats, a cache line."""

_version = attrgetter("_version")


class PackedWeights:
    """Holds the copies that C structures point to."""

    def __init__(self, lanes: int, library: ctypes.CDLL, expected: int) -> None:
        """library: compiled for `lanes`.  expected: about how many weights come, of all linear maps."""
        self._lanes, self._library = lanes, library
        self._held: list[Tensor] = []
        self._arena, self._piece = torch.empty(0), min(expected, ARENA)

    def address(self, tensor: Tensor) -> int:
        """Address of a tensor's numbers, as they are; copied if they are not contiguous."""
        self._held.append(tensor.detach().contiguous())
        return self._held[-1].data_ptr()

    def linear(self, modules: Sequence[nn.Linear]) -> structs.Linear:
        """Linear maps of one input, packed as one map with their outputs one behind another."""
        bias = _biases(modules) if any(module.bias is not None for module in modules) else None
        return self.matrix([module.weight for module in modules], bias)

    def gated(self, modules: Sequence[nn.Linear], low_rank: GroupedMap | None) -> structs.GatedLinear:
        """Linear maps of one input, and what an adapter adds to them at mask slots."""
        full = self.linear(modules)
        if low_rank is None:
            return structs.GatedLinear(full)
        return structs.GatedLinear(full, self.matrix([low_rank.down]), self.matrix([low_rank.up]))

    def matrix(self, weights: Sequence[Tensor], bias: Tensor | None = None) -> structs.Linear:
        """weights: (., K) each, together (N, K).  bias: (N,)."""
        width, outputs, inputs = 2 * self._lanes, sum(map(len, weights)), weights[0].shape[1]  # P, N, K
        panels, first = self._panels(-(-outputs // width) * width * inputs), 0
        panels[outputs // width * width * inputs :] = 0  # the last panel is filled up
        for weight in weights:
            rows = weight.detach().contiguous()
            self._library.pack(rows.data_ptr(), first, len(rows), inputs, panels.data_ptr(), torch.get_num_threads())
            first += len(rows)
        return structs.Linear(panels.data_ptr(), None if bias is None else self.address(bias), inputs, outputs)

    def _panels(self, floats: int) -> Tensor:
        """So many floats, part of a large piece of memory, which the system can map in large pages."""
        taken = -(-floats // ALIGNED) * ALIGNED
        if len(self._arena) < taken:
            self._arena = torch.empty(max(taken, self._piece))  # pages that are never written take no memory
            self._held.append(self._arena)
            self._library.prepare_panels(self._arena.data_ptr(), self._arena.nbytes)
        panels, self._arena = self._arena[:taken], self._arena[taken:]
        return panels


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


def no_room(weights: Sequence[Tensor]) -> str:
    """Why there is no room for a second copy of these, in one line; empty where there is."""
    needed, free = sum(weight.nbytes for weight in weights), free_bytes()
    if needed <= MEMORY_SHARE * free:
        return ""
    return f"a second copy of the weights takes {needed >> 20} MiB, and {free >> 20} MiB of memory are free"


def free_bytes() -> int:
    """Memory that can be had without swapping; where the system does not say, as much as one wants."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize
    try:  # of a container
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text("ascii") for name in ("memory.max", "memory.current"))
        return min(free, int(most) - int(used))
    except (OSError, ValueError):  # no container, or no limit ("max")
        return free
