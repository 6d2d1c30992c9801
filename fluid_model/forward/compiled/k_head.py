"""The K-head's predicted strides, compiled.

Legend: M hidden states, D hidden.
"""

from __future__ import annotations

import ctypes
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import build
from .weights import PackedWeights, Versions, readable, untracked


class _PackedKHead:
    """A K-head with packed weights. Follows weights that are changed in place."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        self._versions = Versions([*first.parameters(), *second.parameters()])

    def strides(self, first: nn.Linear, second: nn.Linear, hidden: Tensor, library: ctypes.CDLL) -> Tensor:
        if self._versions.changed():
            expected = first.weight.nbytes + second.weight.nbytes
            self._packed = PackedWeights(build.native_lanes(), library, expected)
            self._first, self._second = self._packed.linear([first]), self._packed.linear([second])
        hidden, strides = hidden.contiguous(), torch.empty(len(hidden), dtype=torch.long)
        workspace = torch.empty(len(hidden) * self._first.outputs + self._second.outputs)
        addresses = hidden.data_ptr(), workspace.data_ptr(), strides.data_ptr()
        library.k_head_strides(self._first, self._second, len(hidden), *addresses)
        return strides


_packed: WeakKeyDictionary[nn.Linear, _PackedKHead] = WeakKeyDictionary()
"""By the first map of a K-head. The values hold no reference to it."""


def strides(first: nn.Linear, second: nn.Linear, hidden: Tensor) -> Tensor | None:
    """Predicted strides of a K-head, see `khead.KHead`: (M, D) -> (M,). None where torch is to compute them."""
    weights = first.weight, second.weight
    if not readable([hidden, *weights]) or untracked(weights):
        return None
    library = build.library(build.native_lanes())
    if library is None:
        return None
    if first not in _packed:
        _packed[first] = _PackedKHead(first, second)
    return _packed[first].strides(first, second, hidden, library)
