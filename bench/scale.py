"""Overhead of sweeps beside their models, and scaling over workers: `python -m bench.scale [--json] [--quick]`.

1) driver, store and Ray with dummy workers that answer at once, over many samples  2) two workers against one on real
requests
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

import fluid_model
from fluid_eval.common.paths import resource
from fluid_eval.common.spec import RunSpec, build_spec
from fluid_eval.results.run_folder import Run
from fluid_eval.results.samples_file import SampleIndex
from fluid_eval.running.answer_records import base_record
from fluid_eval.running.chunks import Chunk, Pool, chunks_of
from fluid_eval.running.ray_pool import RayPool, WorkerActor
from fluid_eval.running.worker import Answer, Work
from fluid_model import Generation, Request
from fluid_model.engine.records import Trace

from . import bars
from .bars import Bar
from .decode import requests
from .prompts import all_written

MILLION = 2**20
PROMPT, ANSWER = 200, 100
"""Tokens of a dummy sample."""
WORKERS = 8
"""Dummy workers."""
_MODEL = {"tasks": "mini", "model": str(resource("checkpoints") / "tiny-fluid"), "decoder": "fluid"}


class _Dummy:
    """Answers at once."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def facts(self, spec: Any) -> dict[str, Any]:
        return {"weights": "none", "device": "none", "dtype": "none"}

    def run(self, spec: Any, work: Sequence[Work]) -> Iterator[Answer]:
        ids = tuple(range(ANSWER))
        for item in work:
            trace = Trace(predicted=[4] * 25, accepted=[4] * 25, slots=PROMPT + ANSWER)
            yield Generation(item.key, ids, "word " * ANSWER, "eos", trace, 0.01, PROMPT)


class DummyActor(WorkerActor):
    """Answers at once."""

    make = staticmethod(_Dummy)


class InProcess:
    """Dummy workers in this process, in alternation: the time left is that of the driver and the store."""

    size = WORKERS
    chunk_rows: int | None = 128

    def facts(self, spec: RunSpec) -> dict[str, Any]:
        """Those of a dummy."""
        return _Dummy().facts(spec)

    def run(self, chunks: Sequence[Chunk]) -> Iterator[tuple[str, Answer]]:
        """Answers of all workers in turn."""
        workers = [_Dummy() for _ in range(self.size)]
        for place, chunk in enumerate(chunks):
            for answer in workers[place % self.size].run(chunk.spec, chunk.work):
                yield chunk.point, answer

    def close(self) -> None:
        """Nothing to stop."""


def dummy(samples: int, workers: int) -> tuple[RunSpec, list[Request]]:
    """A spec with that many Ray workers, and dummy requests."""
    engine = {"kind": "ray", "workers": workers}
    spec = build_spec({"tasks": "mini", "model": "none", "engine": engine, "batch_size": 32})
    return spec, [Request(f"dummy/{n}", (n % 997, *range(PROMPT - 1)), ANSWER) for n in range(samples)]


def store_all(pool: Pool, spec: RunSpec, work: Sequence[Request], folder: Path) -> tuple[float, float]:
    """Seconds a sample from requests to lines on disk, and growth of the driver in MiB over the second half."""
    run = Run(folder, spec)
    run.begin({})
    prompt = "word " * PROMPT
    process = psutil.Process()
    half, memory = len(work) // 2, 0
    started = time.perf_counter()
    for number, (_, answer) in enumerate(pool.run(chunks_of(pool, "", spec, work))):
        assert isinstance(answer, Generation)
        base = base_record(answer, prompt)
        run.append({**base, "output": answer.text, "output_ids": list(answer.ids), "finish": answer.finish})
        if number == half:
            memory = process.memory_info().rss
    seconds = time.perf_counter() - started
    run.close()
    assert len(run.samples) == len(work)
    return seconds / len(work), (process.memory_info().rss - memory) / MILLION


def overhead(samples: int, folder: Path) -> list[Bar]:
    """Milliseconds a sample and growth of the driver, without and with Ray."""
    spec, work = dummy(samples, 2)
    before = psutil.Process().memory_info().rss
    seconds, _ = store_all(InProcess(), spec, work, folder / "inline")
    grown = (psutil.Process().memory_info().rss - before) / MILLION
    pool = RayPool(spec, DummyActor)
    try:
        through_ray, later = store_all(pool, spec, work, folder / "ray")
    finally:
        pool.close()
    name = f"{samples:,} dummy samples"
    return [
        bars.at_most(f"driver and store, {name}, {WORKERS} workers in this process, ms a sample", 1000 * seconds, 1),
        bars.at_most(f"driver, store and Ray, {name}, 2 actors, ms a sample", 1000 * through_ray, 1),
        bars.at_most(f"growth of the driver over {name}, MiB", grown, 300),
        bars.at_most(f"growth of the driver over the latter half of {name} through Ray, MiB", later, 300),
    ]


def memory_of_samples(count: int, folder: Path) -> list[Bar]:
    """Bytes of memory a sample: stored (its index entry), and pending with a shared prompt."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    prompt = tuple(range(PROMPT))
    waiting = [Request(f"dummy/{n}", prompt, ANSWER, ("Question:",), n) for n in range(10**9, 10**9 + count)]
    there = tracemalloc.get_traced_memory()[0]
    samples = SampleIndex(folder / "none")
    for n, request in enumerate(waiting):
        samples.add({"key": request.key, "prompt_hash": f"{n:016x}"}, 3000 * n, 3000)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return [
        Bar("bytes a waiting request, its prompt shared", round((there - before) / count), "", None),
        Bar("bytes a stored sample", round((after - there) / count), "", None),
    ]


def workers(prompts: int | None, runs: int) -> list[Bar]:
    """Throughput of two CPU workers, a thread each, over that of one, and the ratio of processor time a sample.

    One and two alternate without pause, and the median of their ratios counts: a shared machine changes within seconds.
    The ratio of processor times shows what two cores share, whatever they compute.
    """
    # 1) real requests, two workers of a thread each
    checkpoint = fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")
    work = requests(checkpoint, all_written()[:prompts])
    spec = build_spec({**_MODEL, "engine": {"kind": "ray", "workers": 2}})
    cores = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = RayPool(spec)
    # 2) one and two in alternation
    try:
        pool.facts(spec)
        both = pool._workers
        children = psutil.Process().children(recursive=True)
        actors = [process for process in children if "Actor" in " ".join(process.cmdline())]

        def measure(active: list[Any]) -> tuple[float, float]:
            """Samples a second and processor seconds a sample of these workers."""
            pool._workers = active
            busy, started = _busy(actors), time.perf_counter()
            count = sum(1 for _ in pool.run(chunks_of(pool, "", spec, work)))
            return count / (time.perf_counter() - started), (_busy(actors) - busy) / count

        turns = [(measure(both[:1]), measure(both)) for _ in range(1 + runs)][1:]  # the first warms up
    finally:
        pool.close()
        if cores is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = cores
    # 3) ratios
    ratios = [two[0] / one[0] for one, two in turns]
    speeds = [statistics.median(turn[who][0] for turn in turns) for who in (0, 1)]
    print(
        f"samples/s: {speeds[0]:.1f} by one worker, {speeds[1]:.1f} by two; {min(ratios):.2f} to {max(ratios):.2f} "
        f"times in {runs} turns",
        file=sys.stderr,
    )
    seconds = statistics.median(two[1] / one[1] for one, two in turns)
    return [
        bars.at_least("samples/s, two workers of a thread each / one", statistics.median(ratios), 1.7),
        Bar("processor time a sample, of two workers / of one alone", round(seconds, 3), "", None),
    ]


def _busy(processes: Sequence[psutil.Process]) -> float:
    """Processor seconds of these processes."""
    times = [process.cpu_times() for process in processes]
    return float(sum(used.user + used.system for used in times))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few samples: whether it works")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        results = overhead(2_000 if options.quick else 100_000, Path(folder))
        results += memory_of_samples(10_000, Path(folder))
    results += workers(64 if options.quick else None, 1 if options.quick else 11)
    print(bars.render(results, as_json=options.json))
    return 0 if all(bar.ok is not False for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
