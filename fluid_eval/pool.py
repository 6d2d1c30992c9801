"""Who works: one worker in this process, or long-lived Ray actors. The only file that knows Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fluid_model.engine import prefixes
from fluid_model.engine.records import Request
from fluid_model.errors import ConfigError, RunError

from .spec import RunSpec

if TYPE_CHECKING:
    from .worker import Answer, Work

CHUNK_ROWS = 32
"""Requests a Ray worker gets at a time: small enough to lose little, large enough to fill a batch."""
IN_FLIGHT = 2
"""Chunks a Ray worker holds, so that it never waits for the driver."""


class Pool(Protocol):
    """Works through requests; `size` workers."""

    size: int

    def facts(self) -> dict[str, Any]:
        """What the workers run on."""

    def run(self, work: Sequence[Work]) -> Iterator[Answer]:
        """Answers as they come, in any order."""

    def close(self) -> None:
        """Let go of what the pool started."""


def open_pool(spec: RunSpec) -> Pool:
    """The pool a spec asks for, its models loaded."""
    return InlinePool(spec) if spec.engine.kind == "inline" else RayPool(spec)


class InlinePool:
    """One worker, in this process."""

    size = 1

    def __init__(self, spec: RunSpec) -> None:
        from .worker import Worker

        self._worker = Worker(spec.to_dict())
        self._facts = self._worker.facts()

    def facts(self) -> dict[str, Any]:
        return self._facts

    def run(self, work: Sequence[Work]) -> Iterator[Answer]:
        return self._worker.run(work)

    def close(self) -> None:
        pass


class RayPool:
    """Ray actors, one per GPU or as many as asked. A local cluster is private to the run and ends with it."""

    def __init__(self, spec: RunSpec) -> None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        import ray

        self._ray = ray
        address = spec.engine.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        workers = spec.engine.workers
        cpus = max(cores(), workers or 1) if address == "local" else None
        try:
            ray.init(
                address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            hint = "; a cluster that Ray guards by a token wants RAY_AUTH_MODE=token" if address != "local" else ""
            raise ConfigError(f"ray address {address!r}: {str(error).splitlines()[0]}{hint}") from error
        try:
            self._start(spec, workers)
        except BaseException:
            self.close()
            raise

    def _start(self, spec: RunSpec, workers: int | None) -> None:
        from .worker import Worker

        have = self._ray.cluster_resources()
        gpus = 0 if spec.model.device == "cpu" else int(have.get("GPU", 0))
        self.size = workers or gpus or 1
        kind, share = ("GPU", {"num_gpus": 1}) if gpus else ("CPU", {"num_cpus": 1})
        if self.size > int(have.get(kind, 0)):
            raise ConfigError(
                f"engine.workers={self.size}: the cluster has {have.get(kind, 0):.0f} {kind}s, one a worker"
            )
        threads = None if gpus else max(1, cores() // self.size)
        values = spec.to_dict()
        if (model := Path(spec.model.path).expanduser()).is_dir():
            values["model"]["path"] = str(model.resolve())  # workers of a running cluster start in another folder
        actor = self._ray.remote(Worker).options(**share)
        self._actors = [actor.remote(values, threads) for _ in range(self.size)]
        facts = [actor.facts.remote() for actor in self._actors]  # all load at once
        self._facts: dict[str, Any] = [self._get(reference) for reference in facts].pop()

    def _get(self, reference: Any) -> Any:
        """A remote result; what a worker raised is raised here as itself."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (ConfigError, RunError)) else error) from None
        except self._ray.exceptions.RayActorError as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"a Ray worker died ({reason}); what is finished is stored, --resume goes on") from None

    def facts(self) -> dict[str, Any]:
        return self._facts

    def run(self, work: Sequence[Work]) -> Iterator[Answer]:
        """In small chunks, the longest first; each worker has the next one waiting."""
        chunks = chunks_of(work, max(1, min(CHUNK_ROWS, -(-len(work) // (2 * self.size)))))
        chunks.reverse()
        busy: dict[Any, Any] = {}

        def feed(actor: Any) -> None:
            if chunks:
                stream = actor.run.options(num_returns="streaming").remote(chunks.pop())
                busy[stream] = actor

        for _ in range(IN_FLIGHT):
            for actor in self._actors:
                feed(actor)
        while busy:
            (ready, *_), _ = self._ray.wait(list(busy), num_returns=1)
            try:
                yield self._get(next(ready))
            except StopIteration:
                feed(busy.pop(ready))

    def close(self) -> None:
        self._ray.shutdown()


def cores() -> int:
    """CPU cores this process may use: as OMP_NUM_THREADS says, or all it may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


def chunks_of(work: Sequence[Work], size: int) -> list[list[Work]]:
    """Work in chunks of at most `size`, what begins alike together, since a worker reads that once a chunk."""
    prompts = [item.prompt if isinstance(item, Request) else item.pairs[0][0] for item in work]
    groups = prefixes.group(prompts, own=[1] * len(work))
    return [
        [work[place] for place in each.members[start : start + size]]
        for each in groups
        for start in range(0, len(each.members), size)
    ]
