"""Chunks of requests for a pool of workers, and the interface of a pool. Neither torch nor Ray.

    requests of a run ──chunks_of──▶ Chunk(spec, 128 requests) … ──Pool.run──▶ answers, in any order

A chunk carries its own spec, so that one pool serves all runs of a sweep. Requests that share a prefix stay in one
chunk: a worker prefills a shared prefix once a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fluid_model.common.files import Nested
from fluid_model.engine import shared_prefixes
from fluid_model.engine.records import Request

from ..common.spec import RunSpec

if TYPE_CHECKING:
    from .worker import Answer, Work

CHUNKS_PER_WORKER = 4
"""Chunks that each worker should receive at least: with fewer, some workers idle at the end of a run."""


@dataclass(frozen=True)
class Chunk:
    """Requests that one worker receives together.

    point: the run they belong to, returned with each answer (a sweep's point).  spec: as RunSpec.to_dict gives it.
    tries: workers that died of a chunk of one request.  suspect: a worker died of it, or of the chunk it was split
    from. A suspect chunk runs alone on its worker, so that a second death has one possible cause.
    """

    point: str
    spec: Nested
    work: tuple[Work, ...]
    tries: int = 0
    suspect: bool = False


@dataclass(frozen=True)
class FailedRequest:
    """A request without an answer, after every retry failed. reason: the last worker's error."""

    key: str
    reason: str


class Pool(Protocol):
    """Workers that answer requests.

    size: number of workers.  chunk_rows: requests of a chunk at most (None: no limit).
    """

    size: int
    chunk_rows: int | None

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        """Device, dtype, threads and weights that answer a spec. Raises ConfigError if its model cannot load."""

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer | FailedRequest]]:
        """(point, answer) as answers arrive, in any order. Chunks start in the order given."""

    def close(self) -> None:
        """Stop the processes that the pool started."""


def chunks_of(pool: Pool, point: str, spec: RunSpec, work: Sequence[Work]) -> list[Chunk]:
    """Requests of one run in chunks that fit a pool, the longest group first.

    A chunk is at most `pool.chunk_rows` long, and short enough that each worker receives CHUNKS_PER_WORKER of them.
    """
    if not work:
        return []
    values = spec.to_dict()
    if pool.chunk_rows is None:
        return [Chunk(point, values, tuple(work))]
    fair_share = -(-len(work) // (CHUNKS_PER_WORKER * pool.size))
    rows = max(1, min(pool.chunk_rows, fair_share))
    return [Chunk(point, values, tuple(part)) for part in split_by_prefix(work, rows)]


def split_by_prefix(work: Sequence[Work], rows: int) -> list[list[Work]]:
    """Requests in parts of at most `rows`, those with a shared prefix in the same part."""
    prompts = [item.prompt if isinstance(item, Request) else item.pairs[0][0] for item in work]
    groups = shared_prefixes.group(prompts, own=[1] * len(work))
    return [
        [work[place] for place in group.members[start : start + rows]]
        for group in groups
        for start in range(0, len(group.members), rows)
    ]
