"""Who answers a sweep's points: one pool of workers for all decoders, and one for each backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fluid_model.common.files import Nested

from ..common.spec import RunSpec
from ..running.chunks import Chunk, Pool

_DECODERS = ""
"""Key of the decoders' pool."""


class Writers:
    """The pools of a sweep, each opened when a point first needs it.

    Backends answer after the decoders, one after the other, so that none takes another's time.
    """

    def __init__(self, open_pool: Callable[[RunSpec], Pool]) -> None:
        self._open_pool = open_pool
        self._opened: dict[str, Pool] = {}

    def of(self, spec: RunSpec) -> Pool:
        """The pool that answers a spec. Raises ConfigError if it cannot be opened."""
        key = _key(spec.to_dict())
        if key not in self._opened:
            self._opened[key] = self._open_pool(spec)
        return self._opened[key]

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Any]]:
        """(point, answer) as answers arrive. The chunks' pools are open: `of` was asked for them."""
        keys = [_key(chunk.spec) for chunk in chunks]
        for key in sorted(dict.fromkeys(keys), key=lambda key: key != _DECODERS):
            yield from self._opened[key].run([chunk for chunk, own in zip(chunks, keys, strict=True) if own == key])

    def close(self) -> None:
        """Stop the workers. A backend stays: chats are rendered by it, and it ends with the process."""
        if (workers := self._opened.pop(_DECODERS, None)) is not None:
            workers.close()


def _key(values: Nested) -> str:
    """What specs share that one pool answers."""
    if values["backend"] is None:
        return _DECODERS
    return json.dumps([values["backend"], values["model"]["path"], values["batch_size"]], sort_keys=True)
