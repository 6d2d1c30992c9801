"""Who works: one worker in this process, or long-lived Ray actors. The only file that knows Ray.

Work comes in chunks, each with the spec it belongs to; answers leave as they come. A Ray worker that dies is replaced
and its chunk tried again in halves, until a sample that kills every worker it meets stands alone and is given up.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Protocol

from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested
from fluid_model.engine import shared_prefixes
from fluid_model.engine.records import Request

from ..common.spec import RunSpec

if TYPE_CHECKING:
    from .worker import Answer, Work

CHUNK_ROWS = 128
"""Requests a Ray worker gets at a time at most: a worker's rows run empty at the end of each chunk."""
IN_FLIGHT = 2
"""Chunks a Ray worker holds, so that it never waits for the driver."""
PARCEL = 64
"""Answers a Ray worker sends at once at most."""
LINGER = 0.05
"""Seconds that an answer waits for others to be sent with."""
UNSENT = 8
"""Parcels a Ray worker keeps ready before it waits for the driver to fetch them."""
TRIES = 3
"""Times a sample may kill a worker, alone, before it is given up."""
MOST_LOST, MOST_DEATHS = 10, 12
"""Samples given up, and workers dead in a row without an answer, from which on the fault is not the samples'."""
START_SECONDS = 600.0
"""How long no worker at all may be ready."""


@dataclass(frozen=True)
class Chunk:
    """Requests that a worker gets together.

    point: whose they are, told back with each answer.  spec: as RunSpec.to_dict gives it.  tries: workers a chunk of
    one request has killed.  suspect: whether a worker died of it, or of what it is a part of: then it is given to a
    worker that has nothing else, so that nothing else can be to blame.
    """

    point: str
    spec: Nested
    work: tuple[Work, ...]
    tries: int = 0
    suspect: bool = False


@dataclass(frozen=True)
class Lost:
    """A request that was given up. reason: what became of the workers that tried."""

    key: str
    reason: str


class Pool(Protocol):
    """Works through requests; `size` workers.

    chunk_rows: requests of a chunk at most (None: as many as there are).
    """

    size: int
    chunk_rows: int | None

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        """What the workers run a spec on. Raises ConfigError if its model cannot load."""

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer | Lost]]:
        """Points and answers as they come, in any order. Chunks are begun in the order given."""

    def close(self) -> None:
        """Let go of what the pool started."""


def open_pool(spec: RunSpec) -> Pool:
    """The pool a spec asks for."""
    return InlinePool() if spec.engine.kind == "inline" else RayPool(spec)


class InlinePool:
    """One worker, in this process."""

    size: int = 1
    chunk_rows: int | None = None

    def __init__(self) -> None:
        from .worker import Worker

        self._worker = Worker()

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        return self._worker.facts(spec.to_dict())

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer | Lost]]:
        for chunk in chunks:
            for answer in self._worker.run(chunk.spec, chunk.work):
                yield chunk.point, answer

    def close(self) -> None:
        pass


class Actor:
    """A worker as Ray holds it, in a thread of its own: what it has answered leaves in one parcel after LINGER seconds
    at most, whatever the next answer takes: each sending costs about a millisecond of the processors that workers use.
    """

    def __init__(self, threads: int | None) -> None:
        self._thread = ThreadPoolExecutor(1)  # torch counts threads by who asks
        self._worker = self._thread.submit(self.make, threads).result()

    @staticmethod
    def make(threads: int | None) -> Any:
        """The worker; another kind in tests."""
        from .worker import Worker

        return Worker(threads)

    def ready(self) -> str:
        """The node it is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def facts(self, spec: Nested) -> dict[str, Any]:
        found: dict[str, Any] = self._thread.submit(self._worker.facts, spec).result()
        return found

    def run(self, spec: Nested, work: Sequence[Work]) -> Iterator[list[Answer]]:
        answers: Queue[Answer | None] = Queue(maxsize=PARCEL)  # None ends them

        def answer() -> None:
            try:
                for each in self._worker.run(spec, work):
                    answers.put(each)
            finally:
                answers.put(None)

        done = self._thread.submit(answer)
        going = True
        while going:
            parcel = [answers.get()]
            due = time.monotonic() + LINGER
            while len(parcel) < PARCEL and parcel[-1] is not None:
                try:
                    parcel.append(answers.get(timeout=max(0.0, due - time.monotonic())))
                except Empty:
                    break
            going = parcel[-1] is not None
            if found := [each for each in parcel if each is not None]:
                yield found
        done.result()  # raises what the worker raised


@dataclass
class _Given:
    """A chunk a worker has. left: requests not answered yet, by key."""

    chunk: Chunk
    left: dict[str, Work]


@dataclass
class _Hand:
    """A Ray actor. starting: resolves when it is up (None: it is).  node: where it is then.  given: its chunks by the
    stream of their answers, the oldest first.
    """

    actor: Any
    starting: Any
    node: str | None = None
    given: dict[Any, _Given] = field(default_factory=dict)

    def takes(self, chunk: Chunk) -> bool:
        """Whether it can have this one now."""
        if self.starting is not None or len(self.given) >= IN_FLIGHT:
            return False
        alone = chunk.suspect or any(given.chunk.suspect for given in self.given.values())
        return not (alone and self.given)


class RayPool:
    """Ray actors, one per GPU or as many as asked. A local cluster is private to the run and ends with it."""

    chunk_rows: int | None = CHUNK_ROWS

    def __init__(self, spec: RunSpec, kind: type[Actor] = Actor) -> None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError(
                "engine=ray: Ray is not installed; pip install 'fluid-eval[ray]', or use --engine inline"
            ) from error

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
        self._errors = ray.exceptions
        _quiet(ray)
        try:
            self._start(spec, workers, kind)
        except BaseException:
            self.close()
            raise

    def _start(self, spec: RunSpec, workers: int | None, kind: type[Actor]) -> None:
        have = self._ray.cluster_resources()
        gpus = 0 if spec.model.device == "cpu" else int(have.get("GPU", 0))
        self.size = workers or gpus or 1
        resource, share = ("GPU", {"num_gpus": 1}) if gpus else ("CPU", {"num_cpus": 1})
        if self.size > int(have.get(resource, 0)):
            raise ConfigError(
                f"engine.workers={self.size}: the cluster has {have.get(resource, 0):.0f} {resource}s, one a worker"
            )
        self._threads = None if gpus else max(1, int(have["CPU"]) // self.size)
        self._actor = self._ray.remote(kind).options(**share)
        self._hands = [self._hire() for _ in range(self.size)]
        self._deaths = self._lost = 0

    @property
    def nodes(self) -> set[str]:
        """Ray's names of the machines whose workers are up."""
        return {hand.node for hand in self._hands if hand.node is not None}

    def _hire(self) -> _Hand:
        actor = self._actor.remote(self._threads)
        return _Hand(actor, actor.ready.remote())

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        """Of one worker; the others load the model meanwhile."""
        values = self._values(spec.to_dict())
        for _ in range(TRIES):
            found = [hand.actor.facts.remote(values) for hand in self._hands]
            for hand, facts in zip(list(self._hands), found, strict=True):
                try:
                    told: dict[str, Any] = self._ray.get(facts)
                    return told
                except self._errors.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, (ConfigError, RunError)) else error) from None
                except self._errors.RayError as error:
                    reason = _first_line(error)
                    self._replace(hand, reason)
        raise RunError(f"every Ray worker died as it loaded the model, {TRIES} times ({reason})")

    def _replace(self, hand: _Hand, reason: str) -> None:
        logging.getLogger(__name__).warning("a Ray worker died (%s); its samples are tried again", reason)
        self._ray.kill(hand.actor)  # where Ray merely lost sight of it
        self._hands[self._hands.index(hand)] = self._hire()

    def _values(self, spec: Nested) -> Nested:
        """A spec for workers, which may have started in another folder."""
        model = Path(spec["model"]["path"]).expanduser()
        return {**spec, "model": {**spec["model"], "path": str(model.resolve())}} if model.is_dir() else spec

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer | Lost]]:
        """Each worker has the next chunk waiting."""
        queue = deque(replace(chunk, spec=self._values(chunk.spec)) for chunk in chunks)
        waiting_since = time.monotonic()
        while queue or any(hand.given for hand in self._hands):
            for hand in self._hands:
                while queue and hand.takes(queue[0]):
                    self._give(hand, queue.popleft())
            if any(hand.starting is None for hand in self._hands):
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > START_SECONDS:
                raise RunError(f"no Ray worker has come up in {START_SECONDS:.0f} s; --resume goes on")
            owners = {stream: hand for hand in self._hands for stream in hand.given}
            owners |= {hand.starting: hand for hand in self._hands if hand.starting is not None}
            ready, _ = self._ray.wait(list(owners), num_returns=1, timeout=5.0)
            for each in ready:
                yield from self._hear(owners[each], each, queue)

    def _give(self, hand: _Hand, chunk: Chunk) -> None:
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": UNSENT}
        stream = hand.actor.run.options(**options).remote(chunk.spec, chunk.work)
        hand.given[stream] = _Given(chunk, {item.key: item for item in chunk.work})

    def _hear(self, hand: _Hand, ready: Any, queue: deque[Chunk]) -> Iterator[tuple[str, Answer | Lost]]:
        """What a worker has to say: it is up, answers, an end, or that it is dead."""
        try:
            if ready is hand.starting:
                hand.node = self._ray.get(ready)
                hand.starting = None
                return
            given = hand.given[ready]
            try:
                parcel = self._ray.get(next(ready))
            except StopIteration:
                del hand.given[ready]
                return
        except self._errors.RayTaskError as error:
            if isinstance(error.cause, (ConfigError, RunError)):
                raise error.cause from None
            yield from self._failed(hand.given.pop(ready), queue, str(error.cause or error).strip().splitlines()[-1])
            return
        except self._errors.RayError as error:
            yield from self._died(hand, queue, _first_line(error))
            return
        self._deaths = 0
        for answer in parcel:
            del given.left[answer.key]
            yield given.chunk.point, answer

    def _died(self, hand: _Hand, queue: deque[Chunk], reason: str) -> Iterator[tuple[str, Answer | Lost]]:
        """Replace a worker. What it was at is suspect; what it had not begun is not."""
        self._deaths += 1
        if self._deaths >= MOST_DEATHS:
            raise RunError(f"{self._deaths} Ray workers died in a row ({reason}); what is finished is stored")
        self._replace(hand, reason)
        for number, given in enumerate(hand.given.values()):
            begun = number == 0 or len(given.left) < len(given.chunk.work)
            if begun and given.left:
                yield from self._failed(given, queue, f"its worker died: {reason}")
            elif not begun:
                queue.appendleft(given.chunk)

    def _failed(self, given: _Given, queue: deque[Chunk], reason: str) -> Iterator[tuple[str, Answer | Lost]]:
        """Try a chunk's unanswered requests again: in halves, or, of one that stands alone, TRIES times in all."""
        left = list(given.left.values())
        if len(left) == 1 and len(given.chunk.work) == 1 and given.chunk.tries + 1 >= TRIES:
            self._lost += 1
            if self._lost > MOST_LOST:
                raise RunError(f"more than {MOST_LOST} samples fail ({left[0].key}: {reason}): look for another cause")
            yield given.chunk.point, Lost(left[0].key, reason)
            return
        tries = given.chunk.tries + 1 if len(given.chunk.work) == 1 else 0
        half = -(-len(left) // 2)
        for part in (left[:half], left[half:]):
            if part:
                queue.append(replace(given.chunk, work=tuple(part), tries=tries, suspect=True))

    def close(self) -> None:
        self._ray.shutdown()


def _quiet(ray: Any) -> None:
    """Ray writes what befalls its workers to standard output, where results go; the pool tells it itself."""
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cores() -> int:
    """CPU cores this process may use: as OMP_NUM_THREADS says, or all it may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


def chunks_of(pool: Pool, point: str, spec: RunSpec, work: Sequence[Work]) -> list[Chunk]:
    """Work in chunks a pool likes: no more than it may take at once, small enough to keep all workers busy to the end,
    and what begins alike together, since a worker reads that once a chunk. The longest first.
    """
    if not work:
        return []
    values = spec.to_dict()
    if pool.chunk_rows is None:
        return [Chunk(point, values, tuple(work))]
    size = max(1, min(pool.chunk_rows, -(-len(work) // (4 * pool.size))))
    return [Chunk(point, values, tuple(part)) for part in parts_of(work, size)]


def parts_of(work: Sequence[Work], size: int) -> list[list[Work]]:
    """Work in parts of at most `size`, what begins alike together."""
    prompts = [item.prompt if isinstance(item, Request) else item.pairs[0][0] for item in work]
    groups = shared_prefixes.group(prompts, own=[1] * len(work))
    return [
        [work[place] for place in each.members[start : start + size]]
        for each in groups
        for start in range(0, len(each.members), size)
    ]
