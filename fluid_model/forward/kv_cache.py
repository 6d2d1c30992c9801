"""Static key/value cache: one buffer a layer, written in place at each row's own length.

Rejected slots need no rollback: the next write overwrites them. Only an accepted path that skips fed slots is moved, by
`compact`. A row of length 3 that fed a bonus token and four draft tokens, of which the 2nd and 4th were accepted:

    column    0 1 2 | 3 4 5 6 7
    written   p r o | b w x y z        b bonus, w y rejected, x z accepted
    compact   p r o | b x z . .        the next forward writes from column 6 on

Legend: B rows of the cache (`slots` of the batch), S slots fed, T columns in use, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import attention_masks


class KeyValueStore(Protocol):
    """What a forward needs of a cache: to write keys and values of one layer, and to read those attended to."""

    def put(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """The `past_key_values` of a transformers model: its attention layers call `update`, nothing else.

    Call `set_write_positions` before each forward. Buffers are allocated per layer at first use, with the shapes that
    the model itself produces.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = rows
        self.columns = columns
        self._layers: dict[int, Tensor] = {}  # (2, B, H, columns, Dh) of each layer, keys then values
        self._storage: Tensor | None = None  # all layers as one buffer, where `storage` made it

    @property
    def _buffers(self) -> list[Tensor]:
        """All keys and values, (any, B, H, columns, Dh), in as few tensors as there are."""
        return [*self._layers.values()] if self._storage is None else [self._storage.flatten(0, 1)]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self._layers.values())

    def set_write_positions(
        self,
        start: int,
        lengths: Sequence[int] | np.ndarray,
        fed: int,
        device: torch.device,
        widths: Sequence[int] | np.ndarray | None = None,
        intervals: attention_masks.AttentionIntervals | None = None,
    ) -> attention_masks.AttentionPlan:
        """Set where the next forward writes: rows start.. of the cache, `fed` slots behind each row's length.

        lengths: cached tokens of each of these rows.  widths, intervals: see `AttentionPlan`, which is returned.
        """
        lengths = np.asarray(lengths)
        self.set_write_columns(start, slot_columns(lengths, fed).to(device), int(lengths.max()) + fed)
        return attention_masks.AttentionPlan(self._write_at, self._total, widths, intervals)

    def set_write_columns(self, start: int, write_at: Tensor, total: int) -> None:
        """The same by columns. write_at: (B, S), of rows start.. .  total: T, columns that attention reads."""
        self._start, self._write_at, self._total = start, write_at, total
        self._scatter_index: Tensor | None = None

    @property
    def write_columns(self) -> tuple[int, Tensor, int]:
        """First row, columns written (B, S), and number of columns read, of the next forward."""
        return self._start, self._write_at, self._total

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write keys and values of one layer, (B, H, S, Dh) each; return the (B, H, T, Dh) that attention reads."""
        return self.put(torch.cat((keys, values), 1), layer)

    def put(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """`update` of both in one tensor: (B, 2 H, S, Dh), key heads first."""
        rows, size = len(keys_values), keys_values.shape[-1]
        fresh = keys_values.view(rows, 2, -1, *keys_values.shape[2:]).transpose(0, 1)  # (2, B, H, S, Dh)
        if layer not in self._layers:
            self._layers[layer] = keys_values.new_zeros(2, self.rows, fresh.shape[2], self.columns, size)
        if self._scatter_index is None or self._scatter_index.shape != fresh.shape:  # the same for all layers
            self._scatter_index = self._write_at[:, None, :, None].expand_as(fresh)
        cached = self._layers[layer][:, self._start : self._start + rows]
        cached.scatter_(3, self._scatter_index, fresh)
        keys, values = cached.narrow(3, 0, self._total).unbind(0)  # (B, H, T, Dh) each
        return keys, values

    def storage(self, layers: int, heads: int, size: int) -> Tensor:
        """The buffer of all layers, (layers, 2, B, H, columns, Dh) float32 on the CPU, for forwards that write it
        themselves.
        """
        if self._storage is None:
            self._storage = torch.zeros(layers, 2, self.rows, heads, self.columns, size)
            self._layers = dict(enumerate(self._storage))
        return self._storage

    def broadcast_prefix(self, source: int, start: int, count: int, columns: int) -> None:
        """Copy the first columns of row `source`, a shared prefix, to `count` rows from `start` on."""
        for buffer in self._buffers:
            buffer[:, start : start + count, :, :columns] = buffer[:, source, None, :, :columns]

    def compact(self, lengths: Sequence[int], slots: Sequence[tuple[int, int, int]]) -> None:
        """Move fed slots that stay cached behind their row's cached tokens.

        lengths: cached tokens of each row before this forward, of rows 0.. .
        slots: row, fed slot, and the place behind those tokens that it moves to, before its own; rows and places rise.
        """
        moves = [(row, lengths[row] + slot, lengths[row] + place) for row, slot, place in slots]
        if self._storage is not None:  # on the CPU, where one by one is faster: moves are few
            cells = self._storage.flatten(0, 1).numpy()
            for row, source, target in moves:
                cells[:, row, :, target] = cells[:, row, :, source]
            return
        row_index, source_index, target_index = torch.tensor(moves, device=self._buffers[0].device).unbind(1)
        for buffer in self._buffers:
            buffer[:, row_index, :, target_index] = buffer[:, row_index, :, source_index]

    def zero_row(self, row: int) -> None:
        """Zero all columns of a row. Masks hide finite leftovers of a retired row, but not NaN or infinity."""
        for buffer in self._buffers:
            buffer[:, row] = 0

    def copy_row(self, source: int, target: int, columns: int) -> None:
        """Copy one row's first columns, those it has cached, over another's, so that active rows stay contiguous."""
        for buffer in self._buffers:
            buffer[:, target, :, :columns] = buffer[:, source, :, :columns]


def slot_columns(lengths: Sequence[int] | np.ndarray, slots: int) -> Tensor:
    """Cache column of every fed slot: a row's slots follow its own length.

    lengths: of B rows, tokens already cached.  Returns (B, S) long, on the host.
    """
    first = np.array(lengths)[:, None]
    return torch.from_numpy(first if slots == 1 else first + np.arange(slots))
