"""Static key/value slots, written in place at each row's own length.

A rejected suffix is simply overwritten by the next write: nothing is cropped or copied.
Legend: B slots (rows of the cache), S slots fed, T columns, H heads, Dh head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import masks


class SlotCache:
    """What a transformers attention layer sees as `past_key_values`: it calls `update`, nothing else.

    Call `aim` before each forward to say which rows are fed and where their keys go. Storage is allocated per layer
    at first use, with the shapes the model itself produces.
    """

    def __init__(self, slots: int, columns: int) -> None:
        self.slots = slots
        self.columns = columns
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(slab.nbytes for store in (self._keys, self._values) for slab in store.values())

    def aim(self, start: int, lengths: list[int], fed: int, device: torch.device) -> masks.Reading:
        """Point the next forward at rows start.., feeding `fed` slots after each row's length.

        lengths: tokens already cached of each of these rows; all zero is a prefill, which reads only itself.
        Returns their reading, causal unless changed.
        """
        self._rows = slice(start, start + len(lengths))
        self._write_at = masks.slot_columns(torch.tensor(lengths, device=device), fed)
        self._total = max(lengths) + fed
        return masks.Reading(self._write_at, self._total)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store (B, H, S, Dh) keys and values of one layer; return the (B, H, T, Dh) columns to read."""
        return self._put(self._keys, keys, layer), self._put(self._values, values, layer)

    def _put(self, store: dict[int, Tensor], fresh: Tensor, layer: int) -> Tensor:
        _, heads, _, size = fresh.shape
        if layer not in store:
            store[layer] = fresh.new_zeros(self.slots, heads, self.columns, size)
        rows = store[layer][self._rows]
        where = self._write_at[:, None, :, None].expand(-1, heads, -1, size)
        rows.scatter_(2, where, fresh)
        return rows[:, :, : self._total]

    def spread(self, source: int, start: int, count: int, columns: int) -> None:
        """Copy one slot's first columns to `count` slots from `start` on: what their prompts begin with."""
        for store in (self._keys, self._values):
            for slab in store.values():
                slab[start : start + count, :, :columns] = slab[source, :, :columns]

    def move(self, source: int, target: int) -> None:
        """Copy one slot's columns over another's, to keep the active rows together."""
        for store in (self._keys, self._values):
            for slab in store.values():
                slab[target].copy_(slab[source])
