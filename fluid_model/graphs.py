"""Forwards captured once a shape and replayed: on CUDA a short forward otherwise waits for the host to launch it.

Shapes are rounded up to buckets, so that few are captured. What is filled up writes into columns that no row has come
to yet, and nobody reads it. The first replay of every shape is compared with the plain forward.

Legend: B rows, S slots fed, T key columns, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine.cache import SlotCache
from .errors import RunError

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
SLOTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COLUMNS = 256
"""Buckets: rows and slots up to these, key columns in multiples of this. What is larger runs as it is."""
WARM = 3
"""Plain forwards before one is captured, which choose kernels and take their memory."""
TOLERANCE = {torch.float32: 1e-4}
TOLERANCE_HALF = 3e-2
"""Largest difference of a replay from the plain forward, relative to the largest number."""

Forward = Callable[[Tensor, Tensor, Tensor, SlotCache], Tensor]
"""Of ids (B, S), positions (B, S), an additive mask (B, 1, S, T) and an aimed cache: (B, S, D)."""


@dataclass(frozen=True)
class _Shape:
    """One captured forward: what it reads, what it writes, and how to run it again."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    write_at: Tensor
    hidden: Tensor
    replay: Callable[[], None]


class Graphs:
    """Replays of one model's forward over one cache, which is kept from call to call."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._cache = SlotCache(0, 0)
        self._shapes: dict[tuple[int, int, int], _Shape] = {}
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @property
    def captured(self) -> list[tuple[int, int, int]]:
        """Rows, slots and columns of what was captured."""
        return list(self._shapes)

    def cache(self, slots: int, columns: int) -> SlotCache:
        """A cache with room for what buckets add. One that is large enough is used again."""
        rows = _bucket(slots, ROWS) or slots
        wide = -(-(columns + SLOTS[-1]) // COLUMNS) * COLUMNS
        if rows + 1 > self._cache.slots or wide > self._cache.columns:  # one more, for what prompts share
            self._shapes.clear()
            self._cache = SlotCache(rows + 1, wide)
        return self._cache

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor | None:
        """The forward's (B, S, D); None where it is for the plain forward to run: another cache, or a larger shape.

        Raises RunError if a replay does not say what the plain forward says.
        """
        rows, slots = _bucket(ids.shape[0], ROWS), _bucket(ids.shape[1], SLOTS)
        columns = -(-mask.shape[-1] // COLUMNS) * COLUMNS
        start, _, _ = cache.aimed
        if cache is not self._cache or start or not rows or not slots or columns > cache.columns:
            return None
        key = (rows, slots, columns)
        if key not in self._shapes:
            plain = self._forward(ids, positions, mask, cache)
            self._shapes[key] = self._capture(*key, ids, positions, mask, cache)
            self._check(key, self._run(self._shapes[key], ids, positions, mask, cache), plain)
            return plain
        return self._run(self._shapes[key], ids, positions, mask, cache)

    def _run(self, shape: _Shape, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache) -> Tensor:
        """Fill a shape's inputs up, replay it, and copy out what was asked for."""
        rows, slots = ids.shape
        shape.ids.zero_()[:rows, :slots] = ids
        shape.positions.zero_()[:rows, :slots] = positions
        shape.mask.fill_(torch.finfo(mask.dtype).min)[:rows, :, :slots, : mask.shape[-1]] = mask
        _, write_at, _ = cache.aimed
        shape.write_at.copy_(torch.arange(shape.ids.shape[1], device=ids.device).expand_as(shape.write_at))
        shape.write_at[:rows] += write_at[:, :1]
        shape.replay()
        return shape.hidden[:rows, :slots].clone()

    def _capture(
        self, rows: int, slots: int, columns: int, ids: Tensor, positions: Tensor, mask: Tensor, cache: SlotCache
    ) -> _Shape:
        """Inputs of this size, and a forward over them that can be run again. They stand at the rows' ends."""
        static_ids, static_positions, write_at = (ids.new_zeros(rows, slots) for _ in range(3))
        static_mask = mask.new_full((rows, 1, slots, columns), torch.finfo(mask.dtype).min)
        aimed = cache.aimed
        write_at[: len(ids)] = aimed[1][:, :1]
        write_at += torch.arange(slots, device=ids.device)

        def run() -> Tensor:
            cache.aim_at(0, write_at, columns)
            return self._forward(static_ids, static_positions, static_mask, cache)

        hidden, replay = self._record(run)
        cache.aim_at(*aimed)
        return _Shape(static_ids, static_positions, static_mask, write_at, hidden, replay)

    def _record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What a call returns each time it is replayed, and how to replay it."""
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

    def _check(self, key: tuple[int, int, int], replayed: Tensor, plain: Tensor) -> None:
        error = float((replayed - plain).abs().max() / plain.abs().max().clamp(min=1e-6))
        if not error <= TOLERANCE.get(plain.dtype, TOLERANCE_HALF):
            raise RunError(f"a captured forward of {key} rows, slots and columns differs by {error:.2g}: run without")


def _bucket(count: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest size that holds so many; None if none does."""
    return next((size for size in sizes if size >= count), None)
