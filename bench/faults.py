"""Fault injection into sweeps: `python -m bench.faults [--json] [--quick]`.

Faults are real: processes are killed, a node is removed, a file reaches its size limit. After each, no sample may be
missing or doubled, and the sweep's table must equal that of an undisturbed one, times aside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fluid_eval.cli import EXIT_OK, EXIT_UNHEALTHY
from fluid_eval.common.paths import resource as bundled
from fluid_eval.common.spec import RunSpec
from fluid_eval.results.run_folder import read_samples
from fluid_eval.running.chunks import Pool
from fluid_eval.running.ray_pool import RayPool, WorkerActor
from fluid_eval.running.worker import Worker
from fluid_eval.running.workers import open_pool
from fluid_eval.sweeps.grid import plan
from fluid_eval.sweeps.sweep import Sweep

from . import bars
from .bars import Bar

POISON = "mini_gsm8k_1/3"
"""The sample that kills its worker."""
FULL = 0.6
"""Size limit of files, as a share of the largest one, that stands for a full disk."""
PADDING = 2_000_000
"""Characters added to each answer in the test of a small object store."""
STORE_BYTES = 80 * 2**20
"""The smallest object store that Ray accepts."""


def values(limit: int, batch_size: int | str = 8, **engine: Any) -> dict[str, Any]:
    """A sweep of three points."""
    return {
        "tasks": ["mini_gsm8k_1", "mini_math_1", "mini_mmlu_1"], "limit": limit, "max_new_tokens": 48,
        "model": str(bundled("checkpoints") / "tiny-fluid"), "decoder": "fluid", "batch_size": batch_size,
        "engine": {"kind": "ray", "workers": 2, **engine} if engine else {"kind": "inline"},
        "sweep": {"grid": {"decoder.verify": [True, False]}, "point": [{"decoder.name": "ar"}]},
    }  # fmt: skip


def scores(result: dict[str, Any]) -> list[Any]:
    """A sweep's table without times, and without figures that depend on the slot budget."""
    rows = [(p["name"], p["n"], p["score"]) for p in result["points"]]
    return list(json.loads(json.dumps(rows)))  # as read from a file


def texts(folder: Path) -> dict[str, list[int]]:
    """Answers by point and sample. Exits if a sample is stored twice."""
    answers: dict[str, list[int]] = {}
    for point in json.loads((folder / "sweep.json").read_text())["points"]:
        for record in read_samples(folder / point["folder"]):
            key = f"{point['name']}: {record['key']}"
            if key in answers:
                raise SystemExit(f"{key} is there twice")
            answers[key] = record["output_ids"] or record["output"]
    return answers


class Stage:
    """A folder for all sweeps, with the table, texts and seconds of an undisturbed one."""

    def __init__(self, folder: Path, limit: int, kills: int) -> None:
        self.folder, self.limit, self.kills = folder, limit, kills
        self.random = random.Random(0)
        started = time.monotonic()
        self.expected = scores(self.sweep("whole").work())
        self.seconds = time.monotonic() - started
        self.texts = texts(folder / "whole")

    def sweep(
        self, name: str, kind: type[WorkerActor] = WorkerActor, batch_size: int | str = 8, **engine: Any
    ) -> Sweep:
        """A sweep. kind: class of its Ray actors, if it has any."""
        pool: Callable[[RunSpec], Pool] = (lambda spec: RayPool(spec, kind)) if engine else open_pool
        planned = plan(values(self.limit, batch_size, **engine))
        return Sweep(planned, self.folder / name, resume=True, open_pool=pool)

    def same(self, name: str) -> bool:
        """Whether a sweep ended as the undisturbed one did."""
        file = self.folder / name / "result.json"
        if not file.exists():
            return False
        return scores(json.loads(file.read_text())) == self.expected and texts(self.folder / name) == self.texts

    def command(self, name: str, **engine: Any) -> list[str]:
        """The command line of the same sweep."""
        file = self.folder / f"{name}.toml"
        asked = values(self.limit, **engine)
        points = asked.pop("sweep")
        engine = asked.pop("engine")
        lines = [f"{key} = {json.dumps(value)}" for key, value in asked.items()]
        lines += [
            "[engine]",
            *(f"{key} = {json.dumps(value)}" for key, value in engine.items() if value is not None),
        ]
        lines += ["[sweep.grid]", *(f'"{key}" = {json.dumps(axis)}' for key, axis in points["grid"].items())]
        for point in points["point"]:
            lines += ["[[sweep.point]]", *(f'"{key}" = {json.dumps(value)}' for key, value in point.items())]
        file.write_text("\n".join(lines) + "\n")
        return [sys.executable, "-m", "fluid_eval", "sweep", str(file), "--out", str(self.folder / name), "--resume"]


def drivers(stage: Stage) -> str | None:
    """The driver is killed at random moments and restarted."""
    return _driver_dies(stage, "driver", stage.kills, 1.3 * stage.seconds + 4)


def ray_drivers(stage: Stage) -> str | None:
    """The driver of a private Ray cluster is killed: the cluster must end with it."""
    return _driver_dies(stage, "ray driver", max(1, stage.kills // 10), stage.seconds + 12, ray_address=None)


def _driver_dies(stage: Stage, name: str, kills: int, within: float, **engine: Any) -> str | None:
    """Kill a driver `kills` times, each within `within` seconds of its start; then let it finish."""
    for _ in range(kills):
        process = _begin(stage.command(name, **engine))
        time.sleep(stage.random.uniform(1, within))
        process.kill()
        process.wait()
        if left := _clusters_gone():
            return f"{left} left running"
    done = subprocess.run(stage.command(name, **engine), capture_output=True, text=True, check=False)
    ended = done.returncode in (EXIT_OK, EXIT_UNHEALTHY)  # 48 tokens cut some answers
    return None if ended and stage.same(name) else f"another table, exit {done.returncode}: {done.stderr}"


def interrupts(stage: Stage) -> str | None:
    """Ctrl-C, sent to every process of a terminal, keeps finished samples and ends the private cluster."""
    process = _begin(stage.command("interrupt", ray_address=None), start_new_session=True)
    _wait_for(lambda: any(file.stat().st_size for file in (stage.folder / "interrupt").rglob("samples.jsonl")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if left := _clusters_gone():
        return f"{left} left running"
    if process.returncode != 130 or "--resume goes on" not in errors:
        return f"exit {process.returncode}: {errors[-300:]}"
    stage.sweep("interrupt").work()
    return None if stage.same("interrupt") else "another table"


def quota(stage: Stage) -> str | None:
    """Files reach a size limit, as on a full disk."""
    most = int(FULL * max(file.stat().st_size for file in (stage.folder / "whole").rglob("samples.jsonl")))

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    process = _begin(stage.command("quota"), preexec_fn=limit_files)
    _, errors = process.communicate()
    if process.returncode != 1 or "finished samples are stored" not in errors or "Traceback" in errors:
        return f"exit {process.returncode}: {errors[-300:]}"
    stage.sweep("quota").work()
    return None if stage.same("quota") else "another table"


def workers(stage: Stage) -> str | None:
    """Workers are killed at random moments, over several sweeps."""
    killed, rounds = 0, 0
    while killed < stage.kills:
        rounds += 1
        ended = threading.Event()

        def reap(ended: threading.Event = ended) -> None:
            nonlocal killed
            while not ended.wait(stage.random.uniform(2, 12)) and killed < stage.kills:
                if victims := _workers():
                    stage.random.choice(victims).kill()
                    killed += 1

        reaper = threading.Thread(target=reap)
        reaper.start()
        try:
            with _cluster() as address:
                stage.sweep(f"workers {rounds}", ray_address=address).work()
        finally:
            ended.set()
            reaper.join()
        if not stage.same(f"workers {rounds}"):
            return f"another table after {killed} kills"
    return None


class _Poisoned(Worker):
    def run(self, spec: Any, work: Sequence[Any]) -> Iterator[Any]:
        if any(item.key == POISON for item in work):
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().run(spec, work)


class _Small(Worker):
    """A worker with memory for three rows."""

    def _generate(self, requests: Any, rows: int) -> Iterator[Any]:
        for number, answer in enumerate(super()._generate(requests, rows)):
            if number and rows > 3:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
            yield answer


class _Wordy(Worker):
    """A worker whose answers carry PADDING."""

    def run(self, spec: Any, work: Sequence[Any]) -> Iterator[Any]:
        for answer in super().run(spec, work):
            object.__setattr__(answer, "padding", "x" * PADDING)
            yield answer


class PoisonedActor(WorkerActor):
    """Killed by one sample."""

    make = staticmethod(_Poisoned)


class SmallActor(WorkerActor):
    """Has little memory."""

    make = staticmethod(_Small)


class WordyActor(WorkerActor):
    """Sends much."""

    make = staticmethod(_Wordy)


def poison(stage: Stage) -> str | None:
    """A sample kills every worker: it fails and is named, the rest is finished."""
    with _cluster() as address:
        result = stage.sweep("poison", PoisonedActor, ray_address=address).work()
    failed = {f"{p['name']}: {POISON}" for p in result["points"]}
    if set(result["lost"]) != failed:
        return f"quarantined: {result['lost']}"
    expected = {key: text for key, text in stage.texts.items() if key not in failed}
    rest = {key: text for key, text in texts(stage.folder / "poison").items() if key not in failed}
    return None if rest == expected else "the rest is not what it was"


def memory(stage: Stage) -> str | None:
    """Workers run out of memory and continue with fewer rows."""
    with _cluster() as address:
        stage.sweep("memory", SmallActor, "auto", ray_address=address).work()
    return None if stage.same("memory") else "another table"


def store(stage: Stage) -> str | None:
    """Answers are larger than the object store."""
    with _cluster(object_store_memory=STORE_BYTES) as address:
        stage.sweep("store", WordyActor, ray_address=address).work()
    return None if stage.same("store") else "another table"


def node(stage: Stage) -> str | None:
    """One of two nodes is removed during the sweep."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    seen: list[int] = []

    def lose() -> None:
        _wait_for(lambda: any((stage.folder / "node").rglob("samples.jsonl")), 120)
        time.sleep(1)
        seen.append(len(_workers()))
        cluster.remove_node(second, allow_graceful=False)

    thief = threading.Thread(target=lose)
    try:
        job = stage.sweep("node", ray_address=cluster.address)
        thief.start()
        job.work()
        thief.join()
    finally:
        cluster.shutdown()
    if seen != [2]:
        return f"{seen} workers before the loss"
    return None if stage.same("node") else "another table"


FAULTS: dict[str, Callable[[Stage], str | None]] = {
    "driver killed": drivers, "driver of a private cluster killed": ray_drivers, "interrupted": interrupts,
    "disk full": quota, "workers killed": workers, "a sample kills its worker": poison,
    "a worker's memory runs out": memory, "object store too small": store, "a node lost": node,
}  # fmt: skip
QUICK = ("driver killed", "disk full", "workers killed")


def _begin(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def _wait_for(there: Callable[[], bool], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not there() and time.monotonic() < ends:
        time.sleep(0.05)


def _clusters_gone() -> int:
    """Processes of Ray that outlive a driver: workers and servers die with it; two idle agents of Ray's own may wait a
    minute for the server's answer.
    """

    def left() -> list[psutil.Process]:
        processes = []
        for process in psutil.process_iter(["name", "cmdline"]):
            name, words = process.info["name"] or "", " ".join(process.info["cmdline"] or ())
            if name in ("raylet", "gcs_server") or words.startswith("ray::"):
                processes.append(process)
        return processes

    _wait_for(lambda: not left(), 80)
    return len(left())


def _workers() -> list[psutil.Process]:
    """Ray's processes that hold a worker."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "Actor" in " ".join(process.info["cmdline"] or ()) and "ray::" in " ".join(process.info["cmdline"] or ())
    ]


@contextmanager
def _cluster(**options: Any) -> Iterator[str]:
    """A Ray cluster of one node with two CPUs; gives its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **options})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Inject the faults and print a bar each. Exit code 1 if a sweep did not end as it should."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="three faults, few kills, under a minute")
    parser.add_argument("--only", choices=FAULTS, action="append", help="faults to make; default: all")
    options = parser.parse_args(arguments)
    chosen = options.only or (QUICK if options.quick else FAULTS)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), limit=10 if options.quick else 60, kills=1 if options.quick else 20)
        for name in chosen:
            started = time.monotonic()
            wrong = FAULTS[name](stage)
            print(f"{name}: {wrong or 'ends as it should'} ({time.monotonic() - started:.0f} s)", file=sys.stderr)
            times = f", {stage.kills} times" if "killed" in name and "cluster" not in name else ""
            results.append(Bar(name + times, float(wrong is None), "at least 1", wrong is None))
    print(bars.render(results, as_json=options.json))
    return 0 if all(bar.ok for bar in results) else 1


if __name__ == "__main__":
    sys.exit(main())
