"""Forwards captured once a shape and replayed: on CUDA a short forward otherwise waits for the host to launch it.

Shapes are rounded up to buckets, so that few are captured. What is filled up writes into columns that no row has come
to yet, and nobody reads it. The first replay of every shape is compared with the plain forward.

One shape for all forwards makes a row's numbers independent of the batch, to the last bit: kernels are chosen by shape,
and within one every row's numbers are its own. That holds for decoders that feed the same whatever the batch is: of
FLUID's verified rounds the drafts follow the price of a slot, and a token that was a draft stood elsewhere in its row.

Legend: B rows, S slots fed, T key columns, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ConfigError, RunError
from .kv_cache import KVCache

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
SLOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COLUMNS = 256
"""Buckets: rows and slots up to these, key columns in multiples of this. What is larger runs as it is."""
WARM = 3
"""Plain forwards before one is captured, which choose kernels and take their memory."""
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_HALF = 3e-2
"""Largest difference of a replay from the plain forward, relative to the largest number."""

Forward = Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]
"""Of ids (B, S), positions (B, S), an additive mask (B, 1, S, T) and an aimed cache: (B, S, D)."""
Size = tuple[int, int, int]
"""Rows, slots, columns."""


@dataclass(frozen=True)
class _Shape:
    """One captured forward: what it reads, what it writes, and how to run it again."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    write_at: Tensor
    hidden: Tensor
    replay: Callable[[], Any]


class Graphs:
    """Replays of one model's forward over one cache, which is kept from call to call: for one engine at a time.

    only: the one shape that all forwards are filled up to, its columns those of the cache (None: buckets). What has
    more slots, long prompts, runs as it is, and nobody shares a forward with it.
    """

    def __init__(self, forward: Forward, only: Size | None = None) -> None:
        self._forward = forward
        self.only = only
        self._cache = KVCache(0, 0)
        self._shapes: dict[Size, _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @property
    def captured(self) -> list[Size]:
        """Rows, slots and columns of what was captured."""
        return list(self._shapes)

    def cache(self, slots: int, columns: int) -> KVCache:
        """A cache with room for what is filled up. One that is large enough is used again.

        Raises ConfigError if one shape is asked for and it is smaller than this.
        """
        if self.only is None:
            rows = _bucket(slots, ROWS) or slots
            wide = -(-(columns + SLOTS[-1]) // COLUMNS) * COLUMNS
        else:
            rows, most, wide = self.only
            if slots > rows + 1 or columns + most > wide:
                raise ConfigError(
                    f"{slots} rows of {columns} columns, {most} beside them: more than one shape {self.only}"
                )
        if rows + 1 > self._cache.slots or wide > self._cache.columns:  # one more, for what prompts share
            self._shapes.clear()
            self._cache = KVCache(rows + 1, wide)
        return self._cache

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor | None:
        """The forward's (B, S, D); None where it is for the plain forward to run: another cache, or a larger shape.

        Raises RunError if a replay does not say what the plain forward says.
        """
        key = self._size(ids.shape[0], ids.shape[1], mask.shape[-1], cache)
        if key is None:
            return None
        if key not in self._shapes:
            plain = self._forward(ids, positions, mask, cache)
            self._shapes[key] = self._capture(*key, ids, mask, cache)
            replayed = self._run(self._shapes[key], ids, positions, mask, cache)
            self._check(key, replayed, plain)
            return replayed
        return self._run(self._shapes[key], ids, positions, mask, cache)

    def _size(self, rows: int, slots: int, columns: int, cache: KVCache) -> Size | None:
        """The shape that a forward is filled up to; None if there is none."""
        start, _, _ = cache.write_columns
        if cache is not self._cache:
            return None
        if self.only is not None:
            return self.only if start + rows <= self.only[0] and slots <= self.only[1] else None
        filled, fed, wide = _bucket(rows, ROWS), _bucket(slots, SLOTS), -(-columns // COLUMNS) * COLUMNS
        return (filled, fed, wide) if filled and fed and not start and wide <= cache.columns else None

    def _run(self, shape: _Shape, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """Fill a shape's inputs up, replay it, and copy out what was asked for."""
        start, write_at, _ = cache.write_columns
        rows, slots = slice(start, start + len(ids)), ids.shape[1]
        shape.ids.zero_()[rows, :slots] = ids
        shape.positions.zero_()[rows, :slots] = positions
        shape.mask.fill_(torch.finfo(mask.dtype).min)[rows, :, :slots, : mask.shape[-1]] = mask
        self._aim(shape.write_at, rows, write_at, cache)
        shape.replay()
        return shape.hidden[rows, :slots].clone()

    def _aim(self, target: Tensor, rows: slice, write_at: Tensor, cache: KVCache) -> None:
        """Where all rows write: those that are fed behind their own length, the others at the cache's end."""
        slots = target.shape[1]
        target.copy_(torch.arange(slots, device=target.device).expand_as(target))
        target += cache.columns - slots
        target[rows] += write_at[:, :1] - (cache.columns - slots)

    def _capture(self, rows: int, slots: int, columns: int, ids: Tensor, mask: Tensor, cache: KVCache) -> _Shape:
        """Inputs of this size, and a forward over them that can be run again. While it is captured, rows write where
        those that are fed will write in earnest, and the others at the cache's end.
        """
        static_ids, static_positions, write_at = (ids.new_zeros(rows, slots) for _ in range(3))
        static_mask = mask.new_full((rows, 1, slots, columns), torch.finfo(mask.dtype).min)
        aimed = cache.write_columns
        self._aim(write_at, slice(aimed[0], aimed[0] + len(ids)), aimed[1], cache)

        def run() -> Tensor:
            cache.set_write_columns(0, write_at, columns)
            return self._forward(static_ids, static_positions, static_mask, cache)

        hidden, replay = self._record(run, ids.device)
        cache.set_write_columns(*aimed)
        return _Shape(static_ids, static_positions, static_mask, write_at, hidden, replay)

    def _record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
        """What a call returns each time it is replayed, and how to replay it. A CPU runs it again."""
        if device.type != "cuda":
            hidden = run()
            return hidden, lambda: hidden.copy_(run())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = run()
        return hidden, graph.replay

    def _check(self, key: Size, replayed: Tensor, plain: Tensor) -> None:
        """Of broken rows both have the same numbers that are none."""
        said, wanted = (each.nan_to_num(0.0, 0.0, 0.0) for each in (replayed, plain))
        error = float((said - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        if not error <= TOLERANCE.get(plain.dtype, TOLERANCE_HALF):
            raise RunError(f"a captured forward of {key} rows, slots and columns differs by {error:.2g}: run without")


def _bucket(count: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest size that holds so many; None if none does."""
    return next((size for size in sizes if size >= count), None)
