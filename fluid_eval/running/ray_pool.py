"""Ray actors as workers: the only module that imports Ray.

The driver (`RayPool`) sends chunks; each actor (`WorkerActor`) streams answers back in batches.

    driver                                        actor
    queue ─▶ 1) send: CHUNKS_IN_FLIGHT a worker ─▶ worker thread answers
             2) wait for any stream  ◀──────────── answers, up to BATCH, LINGER seconds apart at most
             3) yield answers; the chunk's rest stays in `unanswered`

Fault tolerance: an actor that dies is replaced and its unanswered requests are retried in halves. Halving isolates a
request that kills every worker: alone, it is tried MAX_TRIES times and then reported as a FailedRequest.
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
from typing import TYPE_CHECKING, Any

from fluid_model.common.errors import ConfigError, RunError
from fluid_model.common.files import Nested
from fluid_model.registry import DecoderNotFoundError

from ..common.spec import RunSpec
from .chunks import Chunk, FailedRequest

if TYPE_CHECKING:
    from .worker import Answer, Work

CHUNK_ROWS = 128
"""Requests of a chunk at most. At the end of each chunk the worker's batch runs empty, so small chunks cost."""
CHUNKS_IN_FLIGHT = 2
"""Chunks sent to a worker ahead of time, so that it never waits for the driver."""
BATCH = 64
"""Answers that an actor sends at once at most."""
LINGER = 0.05
"""Seconds that an answer waits for others to be sent with."""
UNSENT_BATCHES = 8
"""Batches of answers that an actor keeps ready before it waits for the driver to fetch them."""
MAX_TRIES = 3
"""Workers that a request may kill, alone, before it counts as failed."""
MAX_FAILED, MAX_DEATHS = 10, 12
"""Failed requests in all, and workers dead in a row without an answer, above which the run stops: the cause is then
not a single request.
"""
START_SECONDS = 600.0
"""Seconds that the run waits while no worker is up."""


class WorkerActor:
    """A worker inside a Ray actor. Answers leave in batches: each message costs about a millisecond of processor time.

    The worker has a thread of its own, so that a slow answer does not hold back those that are ready.
    """

    def __init__(self, threads: int | None) -> None:
        self._thread = ThreadPoolExecutor(1)  # torch's thread count holds for the thread that set it
        self._worker = self._thread.submit(self.make, threads).result()

    @staticmethod
    def make(threads: int | None) -> Any:
        """The worker; tests put another one here."""
        from .worker import Worker

        return Worker(threads)

    def ready(self) -> str:
        """Ray's id of the node that the actor runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def facts(self, spec: Nested) -> dict[str, Any]:
        facts: dict[str, Any] = self._thread.submit(self._worker.facts, spec).result()
        return facts

    def run(self, spec: Nested, work: Sequence[Work]) -> Iterator[list[Answer]]:
        """Batches of answers. Raises, at the end, what the worker raised."""
        answers: Queue[Answer | None] = Queue(maxsize=BATCH)  # None marks the end

        def answer_all() -> None:
            try:
                for answer in self._worker.run(spec, work):
                    answers.put(answer)
            finally:
                answers.put(None)

        done = self._thread.submit(answer_all)
        ended = False
        while not ended:
            # 1) block for the first answer, then collect others for LINGER seconds
            batch = [answers.get()]
            due = time.monotonic() + LINGER
            while len(batch) < BATCH and batch[-1] is not None:
                try:
                    batch.append(answers.get(timeout=max(0.0, due - time.monotonic())))
                except Empty:
                    break
            # 2) send, without the end mark
            ended = batch[-1] is None
            if ready := [answer for answer in batch if answer is not None]:
                yield ready
        done.result()  # raises the worker's exception


@dataclass
class _SentChunk:
    """A chunk that a worker holds. unanswered: its requests without an answer, by key."""

    chunk: Chunk
    unanswered: dict[str, Work]


@dataclass
class _RemoteWorker:
    """The driver's view of one actor.

    starting: resolves when the actor is up (None: it is up).  node: Ray's id of its node, once up.
    sent: chunks it holds, by their stream of answers, the oldest first.
    """

    actor: Any
    starting: Any
    node: str | None = None
    sent: dict[Any, _SentChunk] = field(default_factory=dict)

    def accepts(self, chunk: Chunk) -> bool:
        """Whether it can receive this chunk now. A suspect chunk shares a worker with no other."""
        if self.starting is not None or len(self.sent) >= CHUNKS_IN_FLIGHT:
            return False
        exclusive = chunk.suspect or any(sent.chunk.suspect for sent in self.sent.values())
        return not (exclusive and self.sent)


class RayPool:
    """Ray actors, one a GPU or as many as `engine.workers` asks for. A local cluster is private and ends with the run.

    Raises ConfigError if Ray is not installed, or the cluster cannot be reached or has fewer devices than workers.
    """

    chunk_rows: int | None = CHUNK_ROWS

    def __init__(self, spec: RunSpec, actor_class: type[WorkerActor] = WorkerActor) -> None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError(
                "engine=ray: Ray is not installed; pip install 'fluid-eval[ray]', or use --engine inline"
            ) from error

        # 1) connect to the cluster, or start a private one
        self._ray = ray
        address = spec.engine.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        workers = spec.engine.workers
        cpus = max(cores(), workers or 1) if address == "local" else None
        try:
            ray.init(
                address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
            )
        except Exception as error:  # a node that does not start in time raises a plain Exception
            guarded = "a cluster that Ray guards by a token wants RAY_AUTH_MODE=token"
            hint = "try again, or use --engine inline" if address == "local" else guarded
            raise ConfigError(f"ray address {address!r}: {_first_line(error).rstrip('.')}; {hint}") from error
        # 2) start the actors
        self._errors = ray.exceptions
        _silence(ray)
        try:
            self._start_workers(spec, workers, actor_class)
        except BaseException:
            self.close()
            raise

    def _start_workers(self, spec: RunSpec, workers: int | None, actor_class: type[WorkerActor]) -> None:
        """One actor a GPU where there are any, else a share of the CPUs each."""
        resources = self._ray.cluster_resources()
        gpus = 0 if spec.model.device == "cpu" else int(resources.get("GPU", 0))
        self.size = workers or gpus or 1
        resource, share = ("GPU", {"num_gpus": 1}) if gpus else ("CPU", {"num_cpus": 1})
        if self.size > int(resources.get(resource, 0)):
            raise ConfigError(
                f"engine.workers={self.size}: the cluster has {resources.get(resource, 0):.0f} {resource}s, "
                "one a worker"
            )
        self._threads = None if gpus else max(1, int(resources["CPU"]) // self.size)
        self._actor_class = self._ray.remote(actor_class).options(**share)
        self._workers = [self._start_worker() for _ in range(self.size)]
        self._deaths_in_row = self._failed = 0

    @property
    def nodes(self) -> set[str]:
        """Ray's ids of the nodes whose workers are up."""
        return {worker.node for worker in self._workers if worker.node is not None}

    def _start_worker(self) -> _RemoteWorker:
        actor = self._actor_class.remote(self._threads)
        return _RemoteWorker(actor, actor.ready.remote())

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        """Those of the first worker to reply; the others load the model meanwhile."""
        values = self._absolute(spec.to_dict())
        for _ in range(MAX_TRIES):
            replies = [worker.actor.facts.remote(values) for worker in self._workers]
            for worker, reply in zip(list(self._workers), replies, strict=True):
                try:
                    facts: dict[str, Any] = self._ray.get(reply)
                    return facts
                except self._errors.RayTaskError as error:
                    raise (
                        _with_way_out(error.cause) if isinstance(error.cause, (ConfigError, RunError)) else error
                    ) from None
                except self._errors.RayError as error:
                    reason = _first_line(error)
                    self._replace(worker, reason)
        raise RunError(f"every Ray worker died as it loaded the model, {MAX_TRIES} times ({reason})")

    def _replace(self, worker: _RemoteWorker, reason: str) -> None:
        logging.getLogger(__name__).warning("a Ray worker died (%s); its requests are retried", reason)
        self._ray.kill(worker.actor)  # Ray may have lost contact with a live one
        self._workers[self._workers.index(worker)] = self._start_worker()

    def _absolute(self, spec: Nested) -> Nested:
        """A spec whose model folder is an absolute path: workers may run in another working directory."""
        model = Path(spec["model"]["path"]).expanduser()
        return {**spec, "model": {**spec["model"], "path": str(model.resolve())}} if model.is_dir() else spec

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer | FailedRequest]]:
        """See `Pool.run`. Raises RunError if no worker starts, too many die or too many requests fail."""
        queue = deque(replace(chunk, spec=self._absolute(chunk.spec)) for chunk in chunks)
        last_seen_up = time.monotonic()
        while queue or any(worker.sent for worker in self._workers):
            # 1) send chunks ahead, in order
            for worker in self._workers:
                while queue and worker.accepts(queue[0]):
                    self._send(worker, queue.popleft())
            if any(worker.starting is None for worker in self._workers):
                last_seen_up = time.monotonic()
            elif time.monotonic() - last_seen_up > START_SECONDS:
                raise RunError(f"no Ray worker started in {START_SECONDS:.0f} s; --resume continues")
            # 2) wait for any event: a stream of answers, or a worker that starts
            owners = {stream: worker for worker in self._workers for stream in worker.sent}
            owners |= {worker.starting: worker for worker in self._workers if worker.starting is not None}
            ready, _ = self._ray.wait(list(owners), num_returns=1, timeout=5.0)
            # 3) yield its answers
            for event in ready:
                yield from self._handle(owners[event], event, queue)

    def _send(self, worker: _RemoteWorker, chunk: Chunk) -> None:
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": UNSENT_BATCHES}
        stream = worker.actor.run.options(**options).remote(chunk.spec, chunk.work)
        worker.sent[stream] = _SentChunk(chunk, {item.key: item for item in chunk.work})

    def _handle(
        self, worker: _RemoteWorker, event: Any, queue: deque[Chunk]
    ) -> Iterator[tuple[str, Answer | FailedRequest]]:
        """One event of a worker: it is up, has answers, finished a chunk, raised, or died."""
        # 1) fetch it; failures are handled here
        try:
            if event is worker.starting:
                worker.node = self._ray.get(event)
                worker.starting = None
                return
            sent = worker.sent[event]
            try:
                batch = self._ray.get(next(event))
            except StopIteration:
                del worker.sent[event]
                return
        except self._errors.RayTaskError as error:
            if isinstance(error.cause, (ConfigError, RunError)):
                raise _with_way_out(error.cause) from None
            reason = str(error.cause or error).strip().splitlines()[-1]
            yield from self._retry(worker.sent.pop(event), queue, reason)
            return
        except self._errors.RayError as error:
            yield from self._recover(worker, queue, _first_line(error))
            return
        # 2) a batch of answers
        self._deaths_in_row = 0
        for answer in batch:
            del sent.unanswered[answer.key]
            yield sent.chunk.point, answer

    def _recover(
        self, worker: _RemoteWorker, queue: deque[Chunk], reason: str
    ) -> Iterator[tuple[str, Answer | FailedRequest]]:
        """Replace a dead worker. Chunks it had begun are retried as suspects; others return to the queue unchanged."""
        self._deaths_in_row += 1
        if self._deaths_in_row >= MAX_DEATHS:
            raise RunError(f"{self._deaths_in_row} Ray workers died in a row ({reason}); finished samples are stored")
        self._replace(worker, reason)
        for number, sent in enumerate(worker.sent.values()):
            begun = number == 0 or len(sent.unanswered) < len(sent.chunk.work)
            if begun and sent.unanswered:
                yield from self._retry(sent, queue, f"its worker died: {reason}")
            elif not begun:
                queue.appendleft(sent.chunk)

    def _retry(
        self, sent: _SentChunk, queue: deque[Chunk], reason: str
    ) -> Iterator[tuple[str, Answer | FailedRequest]]:
        """Queue a chunk's unanswered requests again, in halves. A request alone fails after MAX_TRIES."""
        left = list(sent.unanswered.values())
        alone = len(sent.chunk.work) == 1
        if alone and len(left) == 1 and sent.chunk.tries + 1 >= MAX_TRIES:
            self._failed += 1
            if self._failed > MAX_FAILED:
                raise RunError(f"more than {MAX_FAILED} samples fail ({left[0].key}: {reason}): look for another cause")
            yield sent.chunk.point, FailedRequest(left[0].key, reason)
            return
        tries = sent.chunk.tries + 1 if alone else 0
        half = -(-len(left) // 2)
        for part in (left[:half], left[half:]):
            if part:
                queue.append(replace(sent.chunk, work=tuple(part), tries=tries, suspect=True))

    def close(self) -> None:
        self._ray.shutdown()


def _silence(ray: Any) -> None:
    """Keep Ray's reports of worker deaths off standard output, where results go: the pool logs them itself."""
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None


def _with_way_out(error: ConfigError | RunError) -> ConfigError | RunError:
    """A worker's error as the driver raises it. A decoder that is known here but not there: the way out."""
    if not isinstance(error, DecoderNotFoundError):
        return error
    return ConfigError(
        f"{error}: raised in a Ray worker, another process, which must find the decoder by itself: in a package "
        "installed there, in the working directory, or by PYTHONPATH"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cores() -> int:
    """CPU cores this process may use: OMP_NUM_THREADS if set, else those of its affinity mask."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))
