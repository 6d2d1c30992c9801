"""Captured forwards: CUDA graphs, one of each shape, replayed. Short forwards otherwise wait for the host's launches.

Shapes are rounded up to buckets, so that few are captured:

    3 rows x 5 slots over 300 columns -> a graph of 4 rows x 8 slots over 512 columns

The padding writes into columns that no row has reached yet, and nothing attends to it. The first replay of every shape
is compared with the plain forward.

With one shape for all forwards, a row's numbers do not depend on the batch, to the last bit: kernels are chosen by
shape, and within one the rows are independent. That takes decoders that feed the same slots whatever the batch is.
Verified FLUID does not: its drafts follow the marginal cost of a slot, and an accepted draft token was fed elsewhere in
its row.

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
"""Buckets: rows and slots up to these, key columns in multiples of this. Larger forwards run plain."""
WARM = 3
"""Plain forwards before one is captured, which choose kernels and take their memory."""
TOLERANCE = {torch.float32: 1e-4}
"""Largest difference of a replay from the plain forward, relative to the largest number."""
TOLERANCE_HALF = 3e-2
"""The same for half precision."""

PlainForward = Callable[[Tensor, Tensor, Tensor, KVCache], Tensor]
"""ids (B, S), positions (B, S), additive mask (B, 1, S, T), cache with its write positions set -> (B, S, D)."""
Size = tuple[int, int, int]
"""Rows, slots, columns."""


@dataclass(frozen=True)
class _CapturedForward:
    """One graph: its static inputs, its output, and the call that replays it."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    write_at: Tensor
    hidden: Tensor
    replay: Callable[[], Any]


class Graphs:
    """Captured forwards of one model over one cache, kept from call to call: for one engine at a time.

    only: the one shape that all forwards are padded to, its columns those of the cache (None: buckets). Forwards with
    more slots, such as long prompts, run plain and of one row each.
    """

    def __init__(self, forward: PlainForward, only: Size | None = None) -> None:
        self._forward = forward
        self.only = only
        self._cache = KVCache(0, 0)
        self._captured: dict[Size, _CapturedForward] = {}
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @property
    def captured(self) -> list[Size]:
        """Rows, slots and columns of the captured forwards."""
        return list(self._captured)

    def cache(self, rows: int, columns: int) -> KVCache:
        """A cache with room for padding. The current one is used again if it is large enough.

        Raises ConfigError if the one shape asked for is too small.
        """
        if self.only is None:
            padded = _bucket(rows, ROWS) or rows
            wide = -(-(columns + SLOTS[-1]) // COLUMNS) * COLUMNS
        else:
            padded, most, wide = self.only
            if rows > padded + 1 or columns + most > wide:
                raise ConfigError(
                    f"{rows} rows of {columns} columns, {most} beside them: more than one shape {self.only}"
                )
        if padded + 1 > self._cache.rows or wide > self._cache.columns:  # one row more: shared prefixes
            self._captured.clear()
            self._cache = KVCache(padded + 1, wide)
        return self._cache

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor | None:
        """(B, S, D) as the plain forward returns it. None where no graph serves: another cache, or a larger shape.

        Raises RunError if the first replay of a shape differs from the plain forward.
        """
        key = self._size(ids.shape[0], ids.shape[1], mask.shape[-1], cache)
        if key is None:
            return None
        if key not in self._captured:
            plain = self._forward(ids, positions, mask, cache)
            self._captured[key] = self._capture(*key, ids, mask, cache)
            replayed = self._run(self._captured[key], ids, positions, mask, cache)
            self._check(key, replayed, plain)
            return replayed
        return self._run(self._captured[key], ids, positions, mask, cache)

    def _size(self, rows: int, slots: int, columns: int, cache: KVCache) -> Size | None:
        """The shape that a forward is padded to; None if none serves."""
        start, _, _ = cache.write_columns
        if cache is not self._cache:
            return None
        if self.only is not None:
            return self.only if start + rows <= self.only[0] and slots <= self.only[1] else None
        padded, fed, wide = _bucket(rows, ROWS), _bucket(slots, SLOTS), -(-columns // COLUMNS) * COLUMNS
        return (padded, fed, wide) if padded and fed and not start and wide <= cache.columns else None

    def _run(self, graph: _CapturedForward, ids: Tensor, positions: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
        """Fill the static inputs, replay the graph, and copy out the rows and slots asked for."""
        start, write_at, _ = cache.write_columns
        rows, slots = slice(start, start + len(ids)), ids.shape[1]
        graph.ids.zero_()[rows, :slots] = ids
        graph.positions.zero_()[rows, :slots] = positions
        graph.mask.fill_(torch.finfo(mask.dtype).min)[rows, :, :slots, : mask.shape[-1]] = mask
        self._set_write_columns(graph.write_at, rows, write_at, cache)
        graph.replay()
        return graph.hidden[rows, :slots].clone()

    def _set_write_columns(self, target: Tensor, rows: slice, write_at: Tensor, cache: KVCache) -> None:
        """Columns that all rows write: fed rows behind their own length, the others at the cache's end.

        target: (rows, slots) of the graph, filled in place.  write_at: (B, S) of the fed rows.
        """
        slots = target.shape[1]
        target.copy_(torch.arange(slots, device=target.device).expand_as(target))
        target += cache.columns - slots
        target[rows] += write_at[:, :1] - (cache.columns - slots)

    def _capture(
        self, rows: int, slots: int, columns: int, ids: Tensor, mask: Tensor, cache: KVCache
    ) -> _CapturedForward:
        """A graph of this size. Capturing runs the forward, so its rows already write where they will at replay."""
        static_ids, static_positions, write_at = (ids.new_zeros(rows, slots) for _ in range(3))
        static_mask = mask.new_full((rows, 1, slots, columns), torch.finfo(mask.dtype).min)
        before = cache.write_columns
        start, fed_columns, _ = before
        self._set_write_columns(write_at, slice(start, start + len(ids)), fed_columns, cache)

        def run() -> Tensor:
            cache.set_write_columns(0, write_at, columns)
            return self._forward(static_ids, static_positions, static_mask, cache)

        hidden, replay = self._record(run, ids.device)
        cache.set_write_columns(*before)
        return _CapturedForward(static_ids, static_positions, static_mask, write_at, hidden, replay)

    def _record(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], Any]]:
        """The output tensor of a call, and the function that computes it anew. A CPU runs the call again."""
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
        """Compare a replay with the plain forward. Non-finite numbers count as equal: rows may have them in both."""
        replayed, expected = replayed.nan_to_num(0.0, 0.0, 0.0), plain.nan_to_num(0.0, 0.0, 0.0)
        error = float((replayed - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not error <= TOLERANCE.get(plain.dtype, TOLERANCE_HALF):
            raise RunError(f"a captured forward of {key} rows, slots and columns differs by {error:.2g}: run without")


def _bucket(count: int, sizes: tuple[int, ...]) -> int | None:
    """The smallest size that holds so many; None if none does."""
    return next((size for size in sizes if size >= count), None)
