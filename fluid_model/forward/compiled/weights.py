"""Weights as the compiled code reads them.

A linear map's weights are packed in panels of output columns, so that a matrix product reads them once and in order.
That is a second copy of the model in memory, beside torch's. Weights are stored in the format they have, float32 or
bfloat16, or as int8 with a scale a row (`int8_rows`) where that is asked for.

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

from .. import int8_rows
from ..gated_lora import GroupedMap
from . import structs

MEMORY_SHARE = 0.75
"""Largest part of the free memory that the second copy may take."""
ARENA = 1 << 26
"""Bytes of one piece of memory for panels, at most, where a single map needs no more."""
ALIGNED = 64
"""Panels start at a multiple of so many bytes, a cache line."""
READABLE = (torch.float32, torch.bfloat16)
"""Formats of weights that compiled code reads."""

_version = attrgetter("_version")


class PackedWeights:
    """Holds the copies that C structures point to."""

    def __init__(self, lanes: int, library: ctypes.CDLL, expected: int, *, int8: bool = False) -> None:
        """library: compiled for `lanes`.  expected: about how many bytes come, of all linear maps.  int8: linear maps
        are stored as int8 with a scale a row; low-rank maps are not.
        """
        self._lanes, self._library, self._int8 = lanes, library, int8
        self._held: list[Tensor] = []
        self._arena, self._piece = torch.empty(0, dtype=torch.uint8), min(expected, ARENA)

    def address(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a tensor's numbers in this format; copied if they have another, or are not contiguous."""
        self._held.append(tensor.detach().to(dtype).contiguous())
        return self._held[-1].data_ptr()

    def linear(self, modules: Sequence[nn.Linear]) -> structs.Linear:
        """Linear maps of one input, packed as one map with their outputs one behind another."""
        bias = _biases(modules) if any(module.bias is not None for module in modules) else None
        weights = [module.weight.detach() for module in modules]
        if not self._int8:
            return self.matrix(weights, bias)
        rounded = [int8_rows.rounded(weight) for weight in weights]
        packed = self.matrix([integers for integers, _ in rounded], bias)
        packed.scales = self.address(torch.cat([scales for _, scales in rounded]))
        return packed

    def gated(self, modules: Sequence[nn.Linear], low_rank: GroupedMap | None) -> structs.GatedLinear:
        """Linear maps of one input, and what an adapter adds to them at mask slots."""
        full = self.linear(modules)
        if low_rank is None:
            return structs.GatedLinear(full)
        return structs.GatedLinear(full, self.matrix([low_rank.down]), self.matrix([low_rank.up]))

    def matrix(self, weights: Sequence[Tensor], bias: Tensor | None = None) -> structs.Linear:
        """weights: (., K) each of one format, together (N, K).  bias: (N,)."""
        dtype, outputs, inputs = weights[0].dtype, sum(map(len, weights)), weights[0].shape[1]  # N, K
        width = (2 if dtype == torch.float32 else 4) * self._lanes  # P
        panels, first = self._panels(-(-outputs // width) * width * inputs * dtype.itemsize), 0
        panels[outputs // width * width * inputs * dtype.itemsize :] = 0  # the last panel is filled up
        format_, threads = structs.FORMATS[dtype], torch.get_num_threads()
        for weight in weights:
            rows = weight.detach().contiguous()
            self._library.pack(rows.data_ptr(), format_, first, len(rows), inputs, panels.data_ptr(), threads)
            first += len(rows)
        biases = None if bias is None else self.address(bias)
        return structs.Linear(
            panels=panels.data_ptr(), bias=biases, inputs=inputs, outputs=outputs, format=format_
        )  # fmt: skip

    def _panels(self, size: int) -> Tensor:
        """So many bytes, part of a large piece of memory, which the system can map in large pages."""
        taken = -(-size // ALIGNED) * ALIGNED
        if len(self._arena) < taken:
            # pages that are never written take no memory
            self._arena = torch.empty(max(taken, self._piece), dtype=torch.uint8)
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
    """Whether compiled code can read these numbers: float32 on a CPU."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def packable(weights: Sequence[Tensor]) -> bool:
    """Whether a model's weights can be packed: on a CPU, all float32 or all bfloat16."""
    same = {(weight.device.type, weight.dtype) for weight in weights}
    return len(same) == 1 and same <= {("cpu", dtype) for dtype in READABLE}


def untracked(weights: Sequence[Tensor]) -> bool:
    """Whether changes could not be noticed: inference tensors have no version."""
    return any(weight.is_inference() for weight in weights)


def no_room(weights: Sequence[Tensor], *, int8: bool = False) -> str:
    """Why there is no room for a second copy of these, in one line; empty where there is.  int8: it is stored so."""
    needed, free = sum(weight.numel() if int8 else weight.nbytes for weight in weights), free_bytes()
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
