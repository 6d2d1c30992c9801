"""Static key/value slots, written in place at each row's own length.

A rejected suffix is simply overwritten by the next write: nothing is cropped, and copied only what is kept behind
something that is not.
Legend: B slots (rows of the cache), S slots fed, T columns, H heads, Dh head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention_masks


class KVCache:
    """What a transformers attention layer sees as `past_key_values`: it calls `update`, nothing else.

    Call `aim` before each forward to say which rows are fed and where their keys go. Storage is allocated per layer
    at first use, with the shapes the model itself produces.
    """

    def __init__(self, slots: int, columns: int) -> None:
        self.slots = slots
        self.columns = columns
        self._slabs: dict[int, Tensor] = {}  # of each layer: (2, slots, H, columns, Dh), keys then values
        self._cells: Tensor | None = None  # all of these, where they are one

    @property
    def _stored(self) -> list[Tensor]:
        """All keys and values, (some, slots, H, columns, Dh), in as few tensors as there are."""
        return [*self._slabs.values()] if self._cells is None else [self._cells.flatten(0, 1)]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(slab.nbytes for slab in self._slabs.values())

    def set_write_positions(
        self,
        start: int,
        lengths: Sequence[int],
        fed: int,
        device: torch.device,
        widths: list[int] | None = None,
        intervals: attention_masks.AttentionIntervals | None = None,
    ) -> attention_masks.AttentionPlan:
        """Point the next forward at rows start.., feeding `fed` slots after each row's length.

        lengths: tokens already cached of each of these rows; all zero is a prefill, which reads only itself.
        widths, intervals: see `masks.AttentionPlan`, which is returned.
        """
        self.set_write_columns(start, attention_masks.slot_columns(lengths, fed).to(device), max(lengths) + fed)
        return attention_masks.AttentionPlan(self._write_at, self._total, widths, intervals)

    def set_write_columns(self, start: int, write_at: Tensor, total: int) -> None:
        """The same by columns: rows start.. write where write_at (B, S) says and read the first `total`."""
        self._start, self._write_at, self._total = start, write_at, total
        self._where: Tensor | None = None

    @property
    def write_columns(self) -> tuple[int, Tensor, int]:
        """First row, columns (B, S) written, and columns read, of the next forward."""
        return self._start, self._write_at, self._total

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Store (B, H, S, Dh) keys and values of one layer; return the (B, H, T, Dh) columns to read."""
        return self.put(torch.cat((keys, values), 1), layer)

    def put(self, fresh: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """`update` of keys and values in one: fresh is (B, 2 H, S, Dh), key heads first."""
        both = fresh.view(len(fresh), 2, -1, *fresh.shape[2:]).transpose(0, 1)  # (2, B, H, S, Dh)
        if layer not in self._slabs:
            self._slabs[layer] = fresh.new_zeros(2, self.slots, both.shape[2], self.columns, fresh.shape[-1])
        if self._where is None or self._where.shape != both.shape:
            self._where = self._write_at[:, None, :, None].expand_as(both)
        rows = self._slabs[layer][:, self._start : self._start + len(fresh)]
        rows.scatter_(3, self._where, both)
        keys, values = rows.narrow(3, 0, self._total).unbind(0)
        return keys, values

    def cells(self, layers: int, heads: int, size: int) -> Tensor:
        """Storage of all layers, (layers, 2, slots, H, columns, Dh), float32 on the CPU: for who writes it himself."""
        if self._cells is None:
            self._cells = torch.zeros(layers, 2, self.slots, heads, self.columns, size)
            self._slabs = dict(enumerate(self._cells))
        return self._cells

    def broadcast_prefix(self, source: int, start: int, count: int, columns: int) -> None:
        """Copy one slot's first columns to `count` slots from `start` on: what their prompts begin with."""
        for slab in self._stored:
            slab[:, start : start + count, :, :columns] = slab[:, source, None, :, :columns]

    def compact(self, lengths: list[int], kept: list[list[int]]) -> None:
        """Move what was fed and is kept to the front: of rows 0.. the slots `kept` behind their `lengths`.

        kept: slots counted from a row's first, rising (none for rows that keep their first ones anyway).
        """
        moved = [
            (row, lengths[row] + source, lengths[row] + target)
            for row, slots in enumerate(kept)
            for target, source in enumerate(slots)
            if source != target
        ]
        if not moved:
            return
        row, source, target = torch.tensor(moved, device=self._stored[0].device).unbind(1)
        for slab in self._stored:
            slab[:, row, :, target] = slab[:, row, :, source]

    def clear(self, slot: int) -> None:
        """Forget a slot's columns. Ordinary ones need not be: nobody reads them. What is not finite does harm even
        where a mask hides it.
        """
        for slab in self._stored:
            slab[:, slot] = 0

    def move(self, source: int, target: int) -> None:
        """Copy one slot's columns over another's, to keep the active rows together."""
        for slab in self._stored:
            slab[:, target].copy_(slab[:, source])
