"""The workers of a run: one in this process (`inline`), or long-lived Ray actors (`ray`).

RunSpec.engine.kind   pool         where                           chunks
inline                InlinePool   this process, one model         one, with every request
inline, and a backend BackendPool  lm-eval's model, or its server  one, see `backend_pool`
ray                   RayPool      one actor a GPU, or as asked    CHUNK_ROWS requests each, see `ray_pool`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..common.spec import RunSpec
from .chunks import Chunk, FailedRequest, Pool
from .ray_pool import RayPool

if TYPE_CHECKING:
    from .worker import Answer


def open_pool(spec: RunSpec) -> Pool:
    """The pool that `spec.engine` names. Raises ConfigError if a Ray cluster cannot be reached or is too small."""
    if spec.backend is not None:
        from .backend_pool import BackendPool

        return BackendPool(spec)  # type: ignore[return-value]  # its requests and answers are texts
    return InlinePool() if spec.engine.kind == "inline" else RayPool(spec)


class InlinePool:
    """One worker, in this process."""

    size: int = 1
    chunk_rows: int | None = None

    def __init__(self) -> None:
        from .worker import Worker  # torch takes seconds to import

        self._worker = Worker()

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        return self._worker.facts(spec.to_dict())

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer | FailedRequest]]:
        for chunk in chunks:
            for answer in self._worker.run(chunk.spec, chunk.work):
                yield chunk.point, answer

    def close(self) -> None:
        """Nothing to stop."""
